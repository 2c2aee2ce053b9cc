#include "logits/vocabulary_shards.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "logits/rows.h"
#include "tests/error_message.h"

namespace tether {
namespace {

using Ids = std::vector<int64_t>;

// What one rank sends: its header and the statistics of its columns [begin, end) of `logits`
// [rows, vocabulary].
std::vector<RowStatistics> block(const std::vector<double>& logits, int64_t vocabulary,
                                 int64_t begin, int64_t end, const Ids& targets,
                                 RowOptions options = {}) {
  options.first_id = begin;
  options.ids = vocabulary;
  const auto rows = static_cast<int64_t>(targets.size());
  const ConstLogits own{.data = logits.data() + begin,
                        .dtype = DType::float64,
                        .rows = rows,
                        .vocabulary = end - begin,
                        .row_stride = vocabulary};
  std::vector<RowStatistics> out(targets.size() + 1);
  out[0] = std::bit_cast<RowStatistics>(shard_header(options, end - begin, targets.data(), rows));
  row_statistics(own, targets.data(), options, out.data() + 1, {});
  return out;
}

std::vector<RowStatistics> merged(const std::vector<std::vector<RowStatistics>>& blocks,
                                  const Ids& targets) {
  std::vector<RowStatistics> all, out(targets.size());
  for (const auto& each : blocks) all.insert(all.end(), each.begin(), each.end());
  merge_shards("f", all.data(), static_cast<int64_t>(blocks.size()),
               static_cast<int64_t>(targets.size()), targets.data(), {}, out.data());
  return out;
}

TEST(VocabularyShards, MergeToTheWhole) {
  const std::vector<double> logits = {1, -2, 0.5, 3, 0, 7, 2, -1, 4, 1};
  const Ids targets = {3, 0};
  const auto got =
      merged({block(logits, 5, 3, 5, targets), block(logits, 5, 0, 3, targets)}, targets);
  for (size_t row = 0; row < targets.size(); ++row) {
    double sum = 0, weighted = 0;
    for (size_t v = 0; v < 5; ++v) {
      const double x = logits[5 * row + v];
      sum += std::exp(x);
      weighted += x * std::exp(x);
    }
    const double target = logits[5 * row + static_cast<size_t>(targets[row])];
    EXPECT_NEAR(logp(got[row], {}), target - std::log(sum), 1e-14);
    EXPECT_NEAR(entropy(got[row]), std::log(sum) - weighted / sum, 1e-14);
  }
}

TEST(VocabularyShards, OfOtherOptionsAreRefused) {
  const std::vector<double> logits(10);
  const Ids ids{1, 4};
  const auto check = [&](const auto& field) {
    RowOptions theirs;
    theirs.*field.member = 0.5;
    EXPECT_EQ(message([&] {
                merged({block(logits, 5, 0, 3, ids), block(logits, 5, 3, 5, ids, theirs)}, ids);
              }),
              "f: shards must all have the same " + std::string(field.name) + ", got " +
                  text(RowOptions{}.*field.member) + " of rank 0 and 0.5 of rank 1");
  };
  std::apply([&](const auto&... each) { (check(each), ...); }, RowOptions::fields());
}

TEST(VocabularyShards, OfOtherTargetsAreRefused) {
  const std::vector<double> logits(10);
  const auto refusal = [&](const Ids& ours, const Ids& theirs, int64_t their_ignore_index = -100) {
    return message([&] {
      merged({block(logits, 5, 0, 3, ours),
              block(logits, 5, 3, 5, theirs, {.ignore_index = their_ignore_index})},
             ours);
    });
  };
  const std::string others =
      "f: shards must all have the same targets, ignore_index and support, got those of rank 0 and "
      "others "
      "of rank 1";
  EXPECT_EQ(refusal({3, 0}, {3, 1}), others);
  EXPECT_EQ(refusal({3, 0}, {0, 3}), others);
  EXPECT_EQ(refusal({3, 0}, {3, -100}), others);
  EXPECT_EQ(refusal({3, 0}, {3, 0}, -1), others);
  EXPECT_EQ(refusal({3, 0}, {3, 0}), "no error");
}

}  // namespace
}  // namespace tether
