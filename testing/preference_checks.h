#pragma once

#include "../libtorch/preference_loss.h"
#include "traits.h"

// check_policy_loss (policy_checks.h) for losses of pairs.

namespace tether::testing {

// The gradient is taken by torch's autograd, with respect to batch.logps. `needs_ref_logps` is
// false for a loss without a reference.
using PreferenceLoss =
    std::function<Result(const PreferenceBatch& batch, const PairNormalizer& step)>;

Report check_preference_loss(const PreferenceLoss& loss,
                             const LossTraits& traits = {.needs_ref_logps = true},
                             const CheckOptions& options = {});

// What an objective promises, by its product and the traits of its formula (core/formula.h); of
// tether::preference_loss also the promises about bits and layouts.
LossTraits traits_of(const PreferenceObjective& objective);

}  // namespace tether::testing
