#include "bench/stream.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "core/macros.h"

namespace tether::bench {
namespace {

template <class Element>
TETHER_CLONES void move_three(const TokenStream<Element>& stream) {
  const Element *a = stream.logps, *b = stream.old_logps, *c = stream.advantages;
  const uint8_t* mask = stream.mask;
  Element* out = stream.dlogps;
  const int64_t tokens = stream.tokens;
#pragma GCC ivdep
  for (int64_t i = 0; i < tokens; ++i) {
    const Element mixed = static_cast<Element>(a[i] ^ b[i] ^ c[i]);
    out[i] = mask[i] != 0 ? mixed : Element(0);
  }
}

template <class Element>
TETHER_CLONES void move_four(const TokenStream<Element>& stream) {
  const Element *a = stream.logps, *b = stream.old_logps, *c = stream.advantages,
                *d = stream.ref_logps;
  const uint8_t* mask = stream.mask;
  Element* out = stream.dlogps;
  const int64_t tokens = stream.tokens;
#pragma GCC ivdep
  for (int64_t i = 0; i < tokens; ++i) {
    const Element mixed = static_cast<Element>(a[i] ^ b[i] ^ c[i] ^ d[i]);
    out[i] = mask[i] != 0 ? mixed : Element(0);
  }
}

template <class Element>
void move_all(const TokenStream<Element>& stream) {
  if (stream.ref_logps != nullptr) {
    move_four(stream);
  } else {
    move_three(stream);
  }
}

}  // namespace

void move(const TokenStream<uint32_t>& stream) { move_all(stream); }
void move(const TokenStream<uint16_t>& stream) { move_all(stream); }

// A page ahead, which a processor does not do by itself; counts are multiples of kPiece.
constexpr int64_t kPiece = 64;
TETHER_INLINE void prefetch_ahead(const uint64_t* words) {
  for (int64_t i = 0; i < kPiece; i += 8) __builtin_prefetch(words + 512 + i);
}

TETHER_CLONES uint64_t read(const uint64_t* words, int64_t count) {
  uint64_t sum = 0;
  for (int64_t begin = 0; begin < count; begin += kPiece) {
    prefetch_ahead(words + begin);
    for (int64_t i = 0; i < kPiece; ++i) sum += words[begin + i];
  }
  return sum;
}

TETHER_CLONES void copy(const uint64_t* from, uint64_t* to, int64_t count) {
  for (int64_t begin = 0; begin < count; begin += kPiece) {
    prefetch_ahead(from + begin);
#pragma GCC ivdep
    for (int64_t i = 0; i < kPiece; ++i) to[begin + i] = from[begin + i] + 1;  // not memcpy
  }
}

#if defined(__x86_64__)
void copy_past_caches(const uint64_t* from, uint64_t* to, int64_t count) {
  for (int64_t begin = 0; begin < count; begin += kPiece) {
    prefetch_ahead(from + begin);
    for (int64_t i = begin; i < begin + kPiece; i += 2) {
      const __m128i word = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), word);
    }
  }
  _mm_sfence();
}
#else
void copy_past_caches(const uint64_t* from, uint64_t* to, int64_t count) { copy(from, to, count); }
#endif

}  // namespace tether::bench
