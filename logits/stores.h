#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tether::rows {

#if defined(__x86_64__)

[[gnu::target("avx512f")]] inline void store_lines_wide(const char* from, char* to, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
  }
}

inline void store_lines(const char* from, char* to, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 16) {
    const auto* word = reinterpret_cast<const __m128i*>(from + i);
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(word));
  }
}

// Copies without reading what it overwrites into the caches; whole lines of 64 bytes.
inline void store_past_caches(const void* from, void* to, int64_t bytes) {
  static const bool wide = __builtin_cpu_supports("avx512f");
  const char* source = static_cast<const char*>(from);
  char* target = static_cast<char*>(to);
  const auto misaligned = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) & 63);
  const int64_t head = std::min(misaligned, bytes);
  const int64_t lines = (bytes - head) & ~int64_t{63};
  std::memcpy(target, source, static_cast<size_t>(head));
  (wide ? store_lines_wide : store_lines)(source + head, target + head, lines);
  std::memcpy(target + head + lines, source + head + lines,
              static_cast<size_t>(bytes - head - lines));
}

// Before anybody else reads what was stored.
inline void finish_stores() { _mm_sfence(); }

#else

inline void store_past_caches(const void* from, void* to, int64_t bytes) {
  std::memcpy(to, from, static_cast<size_t>(bytes));
}
inline void finish_stores() {}

#endif

}  // namespace tether::rows
