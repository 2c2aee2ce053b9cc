#pragma once

#include <cstdint>
#include <vector>

#include "examples/text2sql/model.h"

namespace text2sql {

using Ids = std::vector<int32_t>;

struct SamplerOptions {
  int64_t samples_per_prompt = 1;
  int64_t max_tokens = 72;  // of a completion, <eos> included
  bool greedy = false;      // the likeliest token; otherwise drawn at temperature 1
  uint64_t seed = 0;
};

// Completions of prompts that end in <sql>; a completion ends with <eos> unless it was cut at
// max_tokens. Completion i * samples_per_prompt + j belongs to prompt i. Each completion has its
// own stream of random numbers, so that it does not depend on which others are finished.
std::vector<Ids> sample(Transformer& model, const std::vector<Ids>& prompts,
                        const SamplerOptions& options);

// Rows of ids as [rows, longest]; where a row is shorter, <pad> on the named side.
at::Tensor pad_left(const std::vector<Ids>& rows);
at::Tensor pad_right(const std::vector<Ids>& rows);
at::Tensor lengths_of(const std::vector<Ids>& rows);  // [rows]
at::Tensor attention_mask(
    const std::vector<Ids>& rows);  // [rows, longest]: not padded on the right

}  // namespace text2sql
