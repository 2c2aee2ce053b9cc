#pragma once

#include "../libtorch/value_loss.h"
#include "traits.h"

// check_policy_loss (policy_checks.h) for losses of value heads.

namespace tether::testing {

// The gradient is taken by torch's autograd, with respect to batch.values.
using ValueLoss = std::function<Result(const ValueBatch& batch, const Normalizer& step)>;

Report check_value_loss(const ValueLoss& loss, const LossTraits& traits = {},
                        const CheckOptions& options = {});

// What an objective promises; of tether::value_loss also the promises about bits and layouts.
LossTraits traits_of(const ValueObjective& objective);

}  // namespace tether::testing
