#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <ctime>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "examples/text2sql/random.h"
#include "examples/text2sql/task.h"
#include "examples/text2sql/tokenizer.h"
#include "tests/examples/text2sql_world.h"

namespace text2sql {
namespace {

std::vector<std::string> task_corpus() {
  return Task({.log_questions = 1500, .practice_questions = 500, .held_out_questions = 0}).corpus();
}

const Tokenizer& trained() {
  static const Tokenizer kTokenizer = Tokenizer::train(task_corpus());
  return kTokenizer;
}

std::vector<std::string> pieces(const Tokenizer& tokenizer, std::string_view text) {
  std::vector<std::string> result;
  for (const int32_t id : tokenizer.encode(text)) result.push_back(tokenizer.piece(id));
  return result;
}

void expect_round_trip(const Tokenizer& tokenizer, const std::string& text) {
  const std::vector<int32_t> ids = tokenizer.encode(text);
  EXPECT_EQ(tokenizer.decode(ids), text) << testing::PrintToString(pieces(tokenizer, text));
  for (const int32_t id : ids) EXPECT_GT(id, Tokenizer::eos);
}

TEST(Tokenizer, MergesTheMostFrequentPair) {
  // Twice "ab", once "ac": a + ##b is the only pair that occurs twice.
  const Tokenizer tokenizer = Tokenizer::train({"ab ac", "ab"}, 24);
  EXPECT_THAT(pieces(tokenizer, "ab ac abc"), testing::ElementsAre("ab", "a", "##c", "ab", "##c"));
  EXPECT_EQ(tokenizer.size(), 4 + 16 + 4);  // specials, half bytes; ##b ##c a ab
}

TEST(Tokenizer, OfEqualPairsTakesTheFirstInByteOrder) {
  // "xy" and "ab" twice each, room for one: a + ##b comes first.
  const Tokenizer tokenizer = Tokenizer::train({"xy ab xy ab"}, 4 + 16 + 4 + 1);
  EXPECT_THAT(pieces(tokenizer, "ab xy"), testing::ElementsAre("ab", "x", "##y"));
}

TEST(Tokenizer, SharesPiecesBetweenQuestionAndSql) {
  EXPECT_THAT(pieces(trained(), "students from Oslo older than 25"),
              testing::ElementsAre("students", "from", "Oslo", "older", "than", "2", "##5"));
  EXPECT_THAT(
      pieces(trained(),
             "SELECT COUNT(DISTINCT student.id) FROM student WHERE student.city = 'Oslo'"),
      testing::ElementsAre("SELECT", "COUNT(", "DISTINCT", "student", "##.id", "##)", "FROM",
                           "student", "WHERE", "student", "##.city", "=", "'", "Oslo", "##'"));
}

TEST(Tokenizer, WritesUnknownBytesAsHalves) {
  EXPECT_THAT(pieces(trained(), "Oslo~ "),
              testing::ElementsAre("Oslo", "<0x7>", "<0xE>", "<0x2>", "<0x0>"));
}

TEST(Tokenizer, RoundTripsEverything) {
  for (const std::string& text : {std::string(),
                                  std::string(" "),
                                  std::string("  "),
                                  std::string(" a"),
                                  std::string("a "),
                                  std::string("a  b"),
                                  std::string("a\nb\tc\r\n"),
                                  std::string("\0\0", 2),
                                  std::string("name the student"),
                                  std::string("' Oslo'"),
                                  std::string("'Oslo' AND 'Rome'"),
                                  std::string("COUNT( *)"),
                                  std::string("COUNT(  *)"),
                                  std::string("((("),
                                  std::string("####a ## #"),
                                  std::string("3.5 .5 . .city .. student..city"),
                                  std::string("Wie gro\xc3\x9f ist \xf0\x9f\x98\x80?"),
                                  std::string("\xff\xfe\x80"),
                                  std::string("<pad> <0x4> <sql>"),
                                  std::string(5000, ' '),
                                  std::string(5000, 'a')}) {
    expect_round_trip(trained(), text);
  }
}

TEST(Tokenizer, RoundTripsRandomBytes) {
  Random random(11);
  for (int i = 0; i < 5000; ++i) {
    std::string text;
    for (size_t length = random.below(40); length > 0; --length) {
      text += static_cast<char>(random.below(256));
    }
    expect_round_trip(trained(), text);
  }
}

// The bytes in which spaces, openers and marks meet are rare in random ones.
TEST(Tokenizer, RoundTripsRandomFragments) {
  const std::vector<std::string> fragments = {" ",    "  ", "'",     "(", "COUNT(",   "##",
                                              "Oslo", "5",  ".city", ".", "a",        "SELECT",
                                              "\xe9", "\n", ")",     "#", "students", "*"};
  Random random(12);
  for (int i = 0; i < 20000; ++i) {
    std::string text;
    for (size_t length = random.below(8); length > 0; --length) {
      text += fragments[random.below(fragments.size())];
    }
    expect_round_trip(trained(), text);
  }
}

TEST(Tokenizer, DecodesAnyIds) {
  const Tokenizer& tokenizer = trained();
  const int32_t half = tokenizer.encode("~")[0];
  const int32_t oslo = tokenizer.encode("Oslo")[0];
  const std::vector<int32_t> ids = {
      Tokenizer::bos, oslo, half, oslo, Tokenizer::sql, oslo, Tokenizer::eos, Tokenizer::pad, half};
  EXPECT_EQ(tokenizer.decode(ids), "Oslo OsloOslo");  // a lone half is nothing
  Random random(13);
  for (int i = 0; i < 2000; ++i) {
    std::vector<int32_t> any(random.below(30));
    for (int32_t& id : any) {
      id = static_cast<int32_t>(random.below(static_cast<size_t>(tokenizer.size())));
    }
    expect_round_trip(tokenizer, tokenizer.decode(any));
  }
}

TEST(Tokenizer, PromptsHaveTheirSpecials) {
  const std::vector<int32_t> ids = trained().prompt("count the students");
  EXPECT_EQ(ids.size(), 5u);
  EXPECT_EQ(ids.front(), Tokenizer::bos);
  EXPECT_EQ(ids.back(), Tokenizer::sql);
  EXPECT_EQ(trained().decode(ids), "count the students");
}

TEST(Tokenizer, SavesAndLoads) {
  std::stringstream file;
  trained().save(file);
  const Tokenizer loaded = Tokenizer::load(file);
  EXPECT_EQ(loaded, trained());
  EXPECT_EQ(loaded.encode("show all students"), trained().encode("show all students"));
}

std::string load_error(const std::string& text) {
  std::stringstream file(text);
  try {
    Tokenizer::load(file);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "loaded";
}

TEST(Tokenizer, RejectsABrokenFile) {
  EXPECT_EQ(load_error(""), "Tokenizer: file must begin with \"text2sql tokenizer 1\", got \"\"");
  EXPECT_EQ(
      load_error("text2sql tokenizer 2\n0\n"),
      "Tokenizer: file must begin with \"text2sql tokenizer 1\", got \"text2sql tokenizer 2\"");
  EXPECT_EQ(load_error("text2sql tokenizer 1\nmany\n"),
            "Tokenizer: second line must be the number of pieces");
  EXPECT_EQ(load_error("text2sql tokenizer 1\n3\na\n##b\n"),
            "Tokenizer: file must hold 3 pieces, got 2");
  EXPECT_EQ(load_error("text2sql tokenizer 1\n2\na\na\n"),
            "Tokenizer: pieces must be different, got \"a\" twice");
  EXPECT_EQ(load_error("text2sql tokenizer 1\n1\n\xc3\xa9\n"),
            "Tokenizer: a piece must be printable and without spaces, got \"\xc3\xa9\"");
  EXPECT_EQ(load_error("text2sql tokenizer 1\n2\na\n##b\n"), "loaded");
}

TEST(Tokenizer, RejectsAVocabularyThatIsTooSmall) {
  EXPECT_THAT([] { Tokenizer::train({"ab"}, 20); },
              testing::ThrowsMessage<std::invalid_argument>(
                  "Tokenizer::train: vocabulary must be at least 22 for this corpus, got 20"));
}

TEST(Tokenizer, RejectsAnIdOutOfRange) {
  const std::vector<int32_t> ids = {-1};
  EXPECT_THAT([&ids] { trained().decode(ids); },
              testing::ThrowsMessage<std::out_of_range>(
                  testing::MatchesRegex("Tokenizer: id must be in \\[0, [0-9]+\\), got -1")));
}

TEST(Tokenizer, IsDeterministicAndFitsTheVocabulary) {
  const std::vector<std::string> corpus = task_corpus();
  EXPECT_EQ(Tokenizer::train(corpus), trained());
  EXPECT_LE(trained().size(), 384);
  const Tokenizer small = Tokenizer::train(corpus, 200);
  EXPECT_LE(small.size(), 200);
  EXPECT_GE(small.size(), 195);
  for (const std::string& text : corpus) expect_round_trip(small, text);
}

TEST(Tokenizer, IsFast) {
  const std::vector<std::string> corpus = task_corpus();
  const std::clock_t start = std::clock();
  Tokenizer::train(corpus);
  const std::clock_t trained_at = std::clock();
  size_t characters = 0, tokens = 0;
  for (const std::string& text : corpus) {
    characters += text.size();
    tokens += trained().encode(text).size();
  }
  const double training = cpu_seconds(start, trained_at);
  const double encoding = cpu_seconds(trained_at, std::clock());
  std::printf(
      "%d ids; training %.2f s, encoding %.1f million characters/s, %.1f characters/token\n",
      trained().size(), training, static_cast<double>(characters) / encoding / 1e6,
      static_cast<double>(characters) / static_cast<double>(tokens));
  EXPECT_LT(training, 3);
  EXPECT_GT(static_cast<double>(characters) / encoding, 1e6);
}

}  // namespace
}  // namespace text2sql
