#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace tether {

// What the library throws at a public door: one sentence of the form
//   function: argument must RULE, got VALUE[ at [i, j]][. Hint]
class Error : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

// A number as a person would write it: 0.2, 4, 1e+12, nan.
template <class Value>
std::string text(const Value& value) {
  std::ostringstream out;
  out << value;
  return out.str();
}

// Throws Error unless `holds`. The message is built only on failure:
//   require(beta >= 0, [&] { return "policy_loss: beta must be at least 0, got " + text(beta); });
template <class Message>
void require(bool holds, Message&& message) {
  if (!holds) throw Error(message());
}

}  // namespace tether
