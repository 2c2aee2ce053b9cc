#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

#include "../logits/statistics.h"

namespace tether {

// The last layer of a language model: logits = hidden weight^T + bias.
struct LinearHead {
  at::Tensor weight;     // [V, H]
  at::Tensor bias = {};  // [V]; undefined: none
};

struct LinearOptions {
  RowOptions row = {};  // these three as in TokenLogpsOptions
  bool entropies = false;
  bool statistics = false;
  // Of logits at a time, unless said 256 MiB, on CUDA 1 GiB; below 256 rows of them is slower.
  std::optional<int64_t> chunk_bytes = {};
  // 0: chunks of about equal size, as few as chunk_bytes allow. Else every matrix product has this
  // many rows, padded where fewer are left: the bits of a token's results then do not depend on the
  // tokens beside it, so that old and new log-probabilities from batches of different sizes give a
  // ratio of exactly 1. For one torch, number of threads and width.
  int64_t rows_per_chunk = 0;
};

}  // namespace tether
