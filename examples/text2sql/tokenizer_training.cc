#include <algorithm>
#include <map>
#include <set>
#include <stdexcept>
#include <utility>

#include "examples/text2sql/pieces.h"
#include "examples/text2sql/tokenizer.h"

namespace text2sql {
namespace {

using Symbols = std::vector<std::string>;  // pieces, with their marks
using Pair = std::pair<std::string, std::string>;
using Chunks = std::map<Symbols, int64_t>;  // how often each occurs

// Pieces do not reach over the end of a chunk: a word with the point before it and the parenthesis
// behind it (.city, COUNT), or one other character, so that digits stay single.
size_t chunk_length(std::string_view text) {
  size_t length = text.size() > 1 && text[0] == '.' && is_letter(text[1]) ? 1 : 0;
  while (length < text.size() && is_letter(text[length])) ++length;
  if (length == 0) return 1;
  return length < text.size() && text[length] == '(' ? length + 1 : length;
}

Symbols characters(std::string_view chunk, bool begins_word) {
  Symbols symbols;
  for (const char c : chunk) {
    const bool continues = !begins_word || !symbols.empty();
    symbols.push_back((continues ? std::string(kContinuationMark) : "") + c);
  }
  return symbols;
}

void add_chunks(std::string_view text, Chunks& chunks) {
  bool open = true;
  for (size_t at = 0; at < text.size();) {
    const bool space = !open && text[at] == ' ';
    if (space && at + 1 < text.size() && is_graphic(text[at + 1])) ++at;
    const bool begins_word = open || (space && text[at] != ' ');
    const std::string_view chunk = text.substr(at, chunk_length(text.substr(at)));
    at += chunk.size();
    open = false;
    if (!std::all_of(chunk.begin(), chunk.end(), is_graphic)) continue;
    ++chunks[characters(chunk, begins_word)];
    open = chunk.back() == '(' || (begins_word && chunk == "'");
  }
}

std::set<std::string> symbols_in_use(const Chunks& chunks) {
  std::set<std::string> symbols;
  for (const auto& [chunk, count] : chunks) symbols.insert(chunk.begin(), chunk.end());
  return symbols;
}

// The most frequent pair that occurs twice; of equals the first in byte order.
const Pair* most_frequent(const std::map<Pair, int64_t>& pairs) {
  const auto best = std::max_element(
      pairs.begin(), pairs.end(), [](const auto& a, const auto& b) { return a.second < b.second; });
  return best == pairs.end() || best->second < 2 ? nullptr : &best->first;
}

std::map<Pair, int64_t> count_pairs(const Chunks& chunks) {
  std::map<Pair, int64_t> pairs;
  for (const auto& [chunk, count] : chunks) {
    for (size_t i = 0; i + 1 < chunk.size(); ++i) pairs[{chunk[i], chunk[i + 1]}] += count;
  }
  return pairs;
}

std::string joined(const Pair& pair) {
  return pair.first + pair.second.substr(kContinuationMark.size());
}

Symbols merged(const Symbols& chunk, const Pair& pair) {
  Symbols result;
  for (size_t i = 0; i < chunk.size(); ++i) {
    const bool here = i + 1 < chunk.size() && chunk[i] == pair.first && chunk[i + 1] == pair.second;
    result.push_back(here ? joined(pair) : chunk[i]);
    i += here ? 1 : 0;
  }
  return result;
}

Chunks merged(const Chunks& chunks, const Pair& pair) {
  Chunks result;
  for (const auto& [chunk, count] : chunks) result[merged(chunk, pair)] += count;
  return result;
}

}  // namespace

Tokenizer Tokenizer::train(const std::vector<std::string>& corpus, int vocabulary) {
  Chunks chunks;
  for (const std::string& text : corpus) add_chunks(text, chunks);
  // Single characters stay even when no word of the corpus needs them: a new word can use them.
  const std::set<std::string> alphabet = symbols_in_use(chunks);
  const int fewest = reserved() + static_cast<int>(alphabet.size());
  if (vocabulary < fewest) {
    throw std::invalid_argument("Tokenizer::train: vocabulary must be at least " +
                                std::to_string(fewest) + " for this corpus, got " +
                                std::to_string(vocabulary));
  }
  std::set<std::string> pieces = alphabet;
  for (;;) {
    const auto pairs = count_pairs(chunks);
    const Pair* pair = most_frequent(pairs);
    if (pair == nullptr) break;
    const Chunks next = merged(chunks, *pair);
    std::set<std::string> used = symbols_in_use(next);
    used.insert(alphabet.begin(), alphabet.end());
    if (reserved() + static_cast<int>(used.size()) > vocabulary) break;
    chunks = next;
    pieces = std::move(used);
  }
  return Tokenizer({pieces.begin(), pieces.end()});
}

}  // namespace text2sql
