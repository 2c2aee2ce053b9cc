#pragma once

#include "macros.h"

namespace tether {

// std::bit_cast that a vector loop can always inline: GCC does not inline the library's own into a
// function whose optimisation options differ from the file's (TETHER_HEADER_CLONES).
template <class To, class From>
TETHER_INLINE constexpr To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  return __builtin_bit_cast(To, from);
}

}  // namespace tether
