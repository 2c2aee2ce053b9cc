#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <iosfwd>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace text2sql {

// Word pieces by greedy longest match. A piece either begins a word (it brings the space before it,
// except at the beginning of the text, after an opening quote and after a parenthesis) or carries
// the mark ## and continues one. What no piece covers is written byte by byte, each byte as two
// half-byte tokens: nothing is unknown, and decode(encode(x)) == x for every byte string.
class Tokenizer {
 public:
  static constexpr int32_t pad = 0;
  static constexpr int32_t bos = 1;
  static constexpr int32_t sql = 2;
  static constexpr int32_t eos = 3;

  // Merges the most frequent pair of neighbouring pieces inside a word, again and again, while the
  // pieces that the corpus then needs fit into `vocabulary` ids. Digits stay single, so that
  // numbers can be copied.
  static Tokenizer train(const std::vector<std::string>& corpus, int vocabulary = 384);

  std::vector<int32_t> encode(std::string_view text) const;      // without special ids
  std::string decode(std::span<const int32_t> ids) const;        // special ids are left out
  std::vector<int32_t> prompt(std::string_view question) const;  // <bos> question <sql>

  int size() const { return static_cast<int>(pieces_.size()); }
  const std::string& piece(int32_t id) const;  // "student", "##.city", "<bos>", "<0x4>"

  // Plain text, first line "text2sql tokenizer 1".
  void save(std::ostream& out) const;
  static Tokenizer load(std::istream& in);

  friend bool operator==(const Tokenizer& a, const Tokenizer& b) { return a.pieces_ == b.pieces_; }

 private:
  struct Hash {
    using is_transparent = void;
    size_t operator()(std::string_view text) const { return std::hash<std::string_view>{}(text); }
  };
  using Index = std::unordered_map<std::string, int32_t, Hash, std::equal_to<>>;

  explicit Tokenizer(const std::vector<std::string>& pieces);
  static int reserved();  // ids of the specials and the half bytes
  std::pair<int32_t, size_t> longest(const Index& index, std::string_view text) const;

  std::vector<std::string> pieces_;  // specials, half bytes, pieces
  Index word_starts_;
  Index continuations_;
  size_t longest_ = 0;
};

}  // namespace text2sql
