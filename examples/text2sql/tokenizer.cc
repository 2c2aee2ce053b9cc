#include "examples/text2sql/tokenizer.h"

#include <algorithm>
#include <array>
#include <istream>
#include <ostream>
#include <stdexcept>
#include <utility>

#include "examples/text2sql/pieces.h"

namespace text2sql {
namespace {

constexpr std::array<std::string_view, 4> kSpecials = {"<pad>", "<bos>", "<sql>", "<eos>"};
constexpr int32_t kFirstHalfByte = static_cast<int32_t>(kSpecials.size());
constexpr int32_t kFirstPiece = kFirstHalfByte + 16;
constexpr std::string_view kHeader = "text2sql tokenizer 1";

void push_byte(std::vector<int32_t>& ids, char byte) {
  const auto value = static_cast<unsigned char>(byte);
  ids.push_back(kFirstHalfByte + (value >> 4));
  ids.push_back(kFirstHalfByte + (value & 15));
}

void check_piece(const std::string& piece) {
  if (!piece.empty() && std::all_of(piece.begin(), piece.end(), is_graphic)) return;
  throw std::invalid_argument("Tokenizer: a piece must be printable and without spaces, got \"" +
                              piece + "\"");
}

}  // namespace

Tokenizer::Tokenizer(const std::vector<std::string>& pieces) {
  for (std::string_view special : kSpecials) pieces_.emplace_back(special);
  for (const char digit : std::string_view("0123456789ABCDEF")) {
    pieces_.push_back(std::string("<0x") + digit + ">");
  }
  for (const std::string& piece : pieces) {
    check_piece(piece);
    const bool continues = is_continuation(piece);
    const std::string text = continues ? piece.substr(kContinuationMark.size()) : piece;
    Index& index = continues ? continuations_ : word_starts_;
    if (!index.emplace(text, size()).second) {
      throw std::invalid_argument("Tokenizer: pieces must be different, got \"" + piece +
                                  "\" twice");
    }
    pieces_.push_back(piece);
    longest_ = std::max(longest_, text.size());
  }
}

const std::string& Tokenizer::piece(int32_t id) const {
  if (id < 0 || id >= size()) {
    throw std::out_of_range("Tokenizer: id must be in [0, " + std::to_string(size()) + "), got " +
                            std::to_string(id));
  }
  return pieces_[static_cast<size_t>(id)];
}

// The id and the length of the longest piece that `text` begins with; length 0: none.
std::pair<int32_t, size_t> Tokenizer::longest(const Index& index, std::string_view text) const {
  for (size_t length = std::min(longest_, text.size()); length > 0; --length) {
    const auto found = index.find(text.substr(0, length));
    if (found != index.end()) return {found->second, length};
  }
  return {pad, 0};
}

std::vector<int32_t> Tokenizer::encode(std::string_view text) const {
  std::vector<int32_t> ids;
  bool open = true;  // a word that begins here brings no space
  for (size_t at = 0; at < text.size();) {
    const bool space = !open && text[at] == ' ';
    std::pair<int32_t, size_t> match = {pad, 0};
    if (open || space) match = longest(word_starts_, text.substr(at + (space ? 1 : 0)));
    if (match.second > 0) {
      at += space ? 1 : 0;
    } else {
      match = longest(continuations_, text.substr(at));
    }
    if (match.second == 0) {
      push_byte(ids, text[at]);
      ++at;
      open = false;
      continue;
    }
    ids.push_back(match.first);
    at += match.second;
    open = opens(piece(match.first));
  }
  return ids;
}

std::string Tokenizer::decode(std::span<const int32_t> ids) const {
  std::string text;
  bool open = true;
  int32_t half = -1;
  for (const int32_t id : ids) {
    const std::string& piece = this->piece(id);
    const bool is_half = id >= kFirstHalfByte && id < kFirstPiece;
    if (is_half && half >= 0) text += static_cast<char>(half << 4 | (id - kFirstHalfByte));
    half = is_half && half < 0 ? id - kFirstHalfByte : -1;
    if (id >= kFirstPiece) {
      const bool continues = is_continuation(piece);
      if (!continues && !open) text += ' ';
      text += continues ? piece.substr(kContinuationMark.size()) : piece;
    }
    open = id < kFirstHalfByte || (id >= kFirstPiece && opens(piece));
  }
  return text;
}

std::vector<int32_t> Tokenizer::prompt(std::string_view question) const {
  std::vector<int32_t> ids = encode(question);
  ids.insert(ids.begin(), bos);
  ids.push_back(sql);
  return ids;
}

void Tokenizer::save(std::ostream& out) const {
  out << kHeader << '\n' << size() - kFirstPiece << '\n';
  for (int32_t id = kFirstPiece; id < size(); ++id) out << piece(id) << '\n';
}

Tokenizer Tokenizer::load(std::istream& in) {
  std::string header;
  std::getline(in, header);
  if (header != kHeader) {
    throw std::invalid_argument("Tokenizer: file must begin with \"" + std::string(kHeader) +
                                "\", got \"" + header.substr(0, 40) + "\"");
  }
  int count = 0;
  if (!(in >> count) || count < 0) {
    throw std::invalid_argument("Tokenizer: second line must be the number of pieces");
  }
  std::vector<std::string> pieces;
  std::string piece;
  while (static_cast<int>(pieces.size()) < count && in >> piece) pieces.push_back(piece);
  if (static_cast<int>(pieces.size()) < count) {
    throw std::invalid_argument("Tokenizer: file must hold " + std::to_string(count) +
                                " pieces, got " + std::to_string(pieces.size()));
  }
  return Tokenizer(pieces);
}

int Tokenizer::reserved() { return kFirstPiece; }

}  // namespace text2sql
