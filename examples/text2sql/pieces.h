#pragma once

#include <string_view>

namespace text2sql {

// What Tokenizer and its training agree on.
inline constexpr std::string_view kContinuationMark = "##";

inline bool is_continuation(std::string_view piece) {
  return piece.size() > kContinuationMark.size() && piece.starts_with(kContinuationMark);
}

// After such a piece a word begins without a space: COUNT(DISTINCT, 'Physics.
inline bool opens(std::string_view piece) { return piece == "'" || piece.back() == '('; }

inline bool is_letter(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_';
}

// Only these are in pieces; a space never is.
inline bool is_graphic(char c) { return c > ' ' && c <= '~'; }

}  // namespace text2sql
