#pragma once

#include <ATen/core/Tensor.h>

#include "../estimators/advantage/catalogue.h"

namespace tether {

using AdvantageBatch = AdvantageInputs<at::Tensor>;
using GaeBatch = AdvantageBatch;
using ReturnsBatch = ReturnsInputs<at::Tensor>;
using GroupBatch = GroupInputs<at::Tensor>;

struct AdvantagesAndReturns {
  at::Tensor advantages;  // like rewards, in their dtype and on their device; 0 in masked slots
  at::Tensor returns;     // likewise. What a value head learns: of GAE advantages + values
};

// Advantages by any recursion (estimators/advantage/recursion.h): one of catalogue.h or your own,
// advantage(batch, Gae{.lambda = 0.95}). Tensors are [B, T], or packed [N] with offsets [B + 1],
// int32 or int64.
//
// Constants all. On the CPU, rows in parallel, in float64, or by kernels (docs/cuda.md); without
// them tensors elsewhere come over to the CPU, and the results go back. Throws c10::ValueError or
// TypeError before any work is done.
AdvantagesAndReturns advantage(const AdvantageBatch& batch, const Recursion& recursion);

// Advantages of rewards [B] by any rule of groups (estimators/advantage/group_rule.h), in the dtype
// and on the device of the rewards, elsewhere than on the CPU as above. Ids are [B], int32 or
// int64; lengths [B].
at::Tensor advantage(const GroupBatch& batch, const GroupRule& rule);

// ---- by name: the same --------------------------------------------------------------------------

AdvantagesAndReturns generalized_advantage_estimation(const GaeBatch& batch,
                                                      const Gae& options = {});

// The returns G, like rewards.
at::Tensor discounted_returns(const ReturnsBatch& batch, const DiscountedReturns& options = {});

// Groups of `group_size` consecutive rewards, or by ids.
at::Tensor group_advantage(const at::Tensor& rewards, int64_t group_size,
                           const GroupAdvantage& options = {});
at::Tensor group_advantage(const at::Tensor& rewards, const at::Tensor& group_ids,
                           const GroupAdvantage& options = {});

}  // namespace tether
