#pragma once

#include <c10/util/Exception.h>

#include <string>

#include "core/check.h"

namespace tether {

// What an error of call() says, the core's or torch's.
template <class Call>
std::string message(Call call) {
  try {
    call();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

}  // namespace tether
