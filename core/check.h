#pragma once

#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

namespace tether {

// What the library throws at a public door: one sentence of the form
//   function: argument must RULE, got VALUE[ at [i, j]][. Hint]
class Error : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

// The same where an argument is of a wrong type; faces map the two to their own.
class TypeError : public Error {
 public:
  using Error::Error;
};

// "function: name"
inline std::string named(std::string_view function, std::string_view name) {
  return std::string(function).append(": ").append(name);
}

// A number as a person would write it: 0.2, 4, 1e+12, nan.
template <class Value>
std::string text(const Value& value) {
  std::ostringstream out;
  out << value;
  return out.str();
}

// "[inside]"
inline std::string in_brackets(std::string inside) { return inside.insert(0, 1, '[') + ']'; }

// Throws Error unless `holds`. The message is built only on failure:
//   require(beta >= 0, [&] { return "policy_loss: beta must be at least 0, got " + text(beta); });
template <class Message>
void require(bool holds, Message&& message) {
  if (!holds) throw Error(message());
}
template <class Message>
void require_type(bool holds, Message&& message) {
  if (!holds) throw TypeError(message());
}

}  // namespace tether
