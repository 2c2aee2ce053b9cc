#pragma once

#include <string>

#include "core/check.h"

namespace tether {

// What the Error of call() says.
template <class Call>
std::string message(Call call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

}  // namespace tether
