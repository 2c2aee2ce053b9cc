#pragma once

#include <exception>
#include <string>

// A C face for check.py: plain numbers and pointers, and what went wrong as a text, or null.

namespace tether {

template <class Call>
const char* text_of_error(Call call) {
  thread_local std::string text;
  try {
    call();
    return nullptr;
  } catch (const std::exception& error) {
    text = error.what();
    return text.c_str();
  }
}

// The names, each after a space.
template <class Names>
std::string spaced(const Names& names) {
  std::string out;
  for (const auto& name : names) (out += ' ') += name;
  return out;
}

}  // namespace tether
