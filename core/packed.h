#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>

#include "bit_cast.h"
#include "check.h"
#include "half.h"
#include "macros.h"

// What a team of threads (core/team.h) does with numbers: the device's own instructions, and what
// they mean on the host.

namespace tether {

// 2^t, relative error 2^-22.5; subnormal results are 0.
TETHER_TEAM float exp2_fast(float t) {
#if defined(__CUDA_ARCH__)
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(t));
  return power;
#else
  const float power = std::exp2(t);
  return power < 0x1p-126f ? 0.0f : power;
#endif
}

// The larger one; NaN if one of them is.
TETHER_TEAM float max_or_nan(float a, float b) {
#if defined(__CUDA_ARCH__)
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
#else
  return a > b || a != a ? a : b;
#endif
}

// Two halves in a word, the first one in its low bits.
template <class Half>
struct HalfPair;

template <>
struct HalfPair<BFloat16> {
  static constexpr uint32_t kMinusInfinity = 0xFF80FF80u;

  static TETHER_TEAM void widen(uint32_t word, float& low, float& high) {
    low = bit_cast<float>(word << 16);
    high = bit_cast<float>(word & 0xFFFF0000u);
  }
  static TETHER_TEAM uint32_t narrow(float low, float high) {
#if defined(__CUDA_ARCH__)
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
#else
    return to_bfloat16(low) | static_cast<uint32_t>(to_bfloat16(high)) << 16;
#endif
  }
#if defined(__CUDA_ARCH__)
  static TETHER_TEAM uint32_t larger(uint32_t a, uint32_t b) {
    uint32_t word;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
    return word;
  }
#endif
};

template <>
struct HalfPair<Float16> {
  static constexpr uint32_t kMinusInfinity = 0xFC00FC00u;

  static TETHER_TEAM void widen(uint32_t word, float& low, float& high) {
#if defined(__CUDA_ARCH__)
    asm("{.reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
        : "=f"(low), "=f"(high)
        : "r"(word));
#else
    low = from_float16(static_cast<uint16_t>(word));
    high = from_float16(static_cast<uint16_t>(word >> 16));
#endif
  }
  static TETHER_TEAM uint32_t narrow(float low, float high) {
#if defined(__CUDA_ARCH__)
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
#else
    return to_float16(low) | static_cast<uint32_t>(to_float16(high)) << 16;
#endif
  }
#if defined(__CUDA_ARCH__)
  static TETHER_TEAM uint32_t larger(uint32_t a, uint32_t b) {
    uint32_t word;
    asm("max.f16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
    return word;
  }
#endif
};

#if !defined(__CUDACC__)
// An access of 16 bytes elsewhere is an error on a device, and here too.
inline void check_aligned(const void* memory) {
  require(reinterpret_cast<uintptr_t>(memory) % 16 == 0,
          [] { return std::string("a vector must be aligned to its 16 bytes"); });
}
#else
TETHER_TEAM void check_aligned(const void*) {}
#endif

// 16 bytes of numbers, as one access to memory that is aligned to them.
template <class Stored>
struct alignas(16) Packed {
  static constexpr int kCount = 16 / static_cast<int>(sizeof(Stored));
  static constexpr int kWords = 4;

  uint32_t word[kWords];

  static TETHER_TEAM Packed at(const Stored* memory) {
#if defined(__CUDA_ARCH__)
    return *reinterpret_cast<const Packed*>(memory);
#else
    check_aligned(memory);
    Packed out;
    std::memcpy(&out, memory, sizeof(out));
    return out;
#endif
  }
  TETHER_TEAM void store(Stored* memory) const {
#if defined(__CUDA_ARCH__)
    *reinterpret_cast<Packed*>(memory) = *this;
#else
    check_aligned(memory);
    std::memcpy(memory, this, sizeof(*this));
#endif
  }

  static TETHER_TEAM Packed minus_infinity() {
    if constexpr (sizeof(Stored) == sizeof(float)) {
      return {{0xFF800000u, 0xFF800000u, 0xFF800000u, 0xFF800000u}};
    } else {
      constexpr uint32_t kTwo = HalfPair<Stored>::kMinusInfinity;
      return {{kTwo, kTwo, kTwo, kTwo}};
    }
  }

  TETHER_TEAM void widen(float* out) const {
    TETHER_UNROLL
    for (int i = 0; i < kWords; ++i) {
      if constexpr (sizeof(Stored) == sizeof(float)) {
        out[i] = bit_cast<float>(word[i]);
      } else {
        HalfPair<Stored>::widen(word[i], out[2 * i], out[2 * i + 1]);
      }
    }
  }
  static TETHER_TEAM Packed narrow(const float* in) {
    Packed out;
    TETHER_UNROLL
    for (int i = 0; i < kWords; ++i) {
      if constexpr (sizeof(Stored) == sizeof(float)) {
        out.word[i] = bit_cast<uint32_t>(in[i]);
      } else {
        out.word[i] = HalfPair<Stored>::narrow(in[2 * i], in[2 * i + 1]);
      }
    }
    return out;
  }

  // The largest number; NaN only where all are, or not at all.
  TETHER_TEAM float largest() const {
    float out[2];
#if defined(__CUDA_ARCH__)
    if constexpr (sizeof(Stored) != sizeof(float)) {
      using Pair = HalfPair<Stored>;
      Pair::widen(Pair::larger(Pair::larger(word[0], word[1]), Pair::larger(word[2], word[3])),
                  out[0], out[1]);
      return fmaxf(out[0], out[1]);
    }
#endif
    float all[kCount];
    widen(all);
    out[0] = all[0];
    TETHER_UNROLL
    for (int i = 1; i < kCount; ++i) out[0] = fmaxf(out[0], all[i]);
    return out[0];
  }
};

}  // namespace tether
