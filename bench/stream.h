#pragma once

#include <cstdint>

namespace tether::bench {

// Moves the bytes of a token loss and does next to nothing with them: reads logps, old_logps,
// advantages, ref_logps (may be null) and the mask, writes dlogps. Element = uint32_t for float32,
// uint16_t for bfloat16.
template <class Element>
struct TokenStream {
  const Element *logps, *old_logps, *advantages, *ref_logps;
  const uint8_t* mask;
  Element* dlogps;
  int64_t tokens;
};

void move(const TokenStream<uint32_t>& stream);
void move(const TokenStream<uint16_t>& stream);

// The machine's own bandwidth: a checksum of `words`, and a copy.
uint64_t read(const uint64_t* words, int64_t count);
void copy(const uint64_t* from, uint64_t* to, int64_t count);
// With stores that bypass the caches, where the machine has them.
void copy_past_caches(const uint64_t* from, uint64_t* to, int64_t count);

}  // namespace tether::bench
