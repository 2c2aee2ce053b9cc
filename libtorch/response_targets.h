#pragma once

#include <ATen/core/Tensor.h>

namespace tether {

struct ResponseTargets {
  at::Tensor targets;        // [B, L - 1], int64: the token that comes next
  at::Tensor response_mask;  // [B, L - 1], bool: it belongs to the response
};

// The shift by one between what a model reads and what it predicts: logits at position t are for
// token t + 1. With a prompt of 2 and a response of 3 tokens, right-padded to L = 6:
//
//   input_ids        p0    p1    r0    r1    r2    pad
//   logits of        0     1     2     3     4     (5: of nothing)
//   targets          p1    r0    r1    r2    pad
//   response_mask    0     1     1     1     0
//
// so the response starts at position prompt_length - 1. The same left-padded, where prompt lengths
// count from the first attended token:
//
//   input_ids        pad   p0    p1    r0    r1    r2
//   attention_mask   0     1     1     1     1     1
//   response_mask    0     0     1     1     1
//
// input_ids [B, L]: int32 or int64. prompt_lengths [B]: int32 or int64, in [1, L]: a model predicts
// nothing without a token before it. attention_mask [B, L]: bool or integer, not 0 where a token
// is; absent: everywhere, then padding on the right counts as response. Use it as
//
//   auto [targets, response_mask] = response_targets(input_ids, prompt_lengths, attention_mask);
//   auto logps = token_logps(logits.slice(1, 0, -1), targets).logps;
//
// targets.masked_fill(~response_mask, -100) spares the reading of logits outside of the response.
ResponseTargets response_targets(const at::Tensor& input_ids, const at::Tensor& prompt_lengths,
                                 const at::Tensor& attention_mask = {});

}  // namespace tether
