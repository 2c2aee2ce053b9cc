#pragma once

#include <ATen/core/Tensor.h>

#include "../estimators/advantage/group.h"

namespace tether {

// Group-relative advantages of rewards [B], in the dtype of the rewards (estimators/advantage/gae.h
// says what they are). On the CPU; rewards elsewhere come over and their advantages go back.
//
// Groups of `group_size` consecutive rewards, or by ids [B] (int32 or int64, any order and sizes).
at::Tensor group_advantage(const at::Tensor& rewards, int64_t group_size,
                           const GroupAdvantage& options = {});
at::Tensor group_advantage(const at::Tensor& rewards, const at::Tensor& group_ids,
                           const GroupAdvantage& options = {});

}  // namespace tether
