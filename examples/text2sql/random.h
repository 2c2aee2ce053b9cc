#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace text2sql {

// SplitMix64 with its own mapping to ranges: the standard distributions differ between libraries,
// and a seed must give the same task on every platform.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t next() { return mix(state_ += 0x9E3779B97F4A7C15ULL); }

  // Uniform over 0 .. n - 1 (n > 0); the bias of n / 2^32 is far below what a task can show.
  size_t below(size_t n) { return static_cast<size_t>(((next() >> 32) * n) >> 32); }

  // True with probability p, p in [0, 1].
  bool chance(double p) { return static_cast<double>(next() >> 11) * 0x1.0p-53 < p; }

  template <class T>
  void shuffle(std::vector<T>& items) {
    for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[below(i)]);
  }

  static uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ULL;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBULL;
    return x ^ (x >> 31);
  }

 private:
  uint64_t state_;
};

}  // namespace text2sql
