#pragma once

#include <string>
#include <string_view>

#include "../core/check.h"

namespace tether::face {

// body(); what a kernel says, of its `ids` among others, in the words of the public function.
template <class Body>
auto in_words_of(std::string_view function, std::string_view ids, Body body) {
  try {
    return body();
  } catch (const Error& error) {
    std::string rule = error.what();
    rule.erase(0, rule.find(": ") + 2);
    if (rule.starts_with("ids ")) rule.replace(0, 3, ids);
    throw Error(std::string(function) + ": " + rule);
  }
}

}  // namespace tether::face
