#pragma once

#include "traits.h"

// Is this policy loss right? One call tries a loss, the library's or your own, on random ragged
// batches against the properties of testing/*_properties.cc, and prints the smallest batch that
// breaks one:
//
//   TEST(MyLoss, KeepsItsPromises) {
//     const auto report = tether::testing::check_policy_loss(
//         [](const tether::PolicyBatch& batch, const tether::Normalizer& step) {
//           return my_loss(batch.logps, batch.old_logps, batch.advantages, batch.response_mask,
//                          /*tokens_of_the_step=*/step.policy, /*factor=*/step.factor());
//         },
//         {.clip = tether::testing::ClipRange{.low = 0.2, .high = 0.2}});
//     EXPECT_TRUE(report.ok()) << report;
//   }
//
// It takes less than five seconds for one loss, on one core. The numbers are drawn from the seed in
// the report: the same seed gives the same batches everywhere.

namespace tether::testing {

using PolicyTraits = LossTraits;
using PolicyReport = Report;

// Tries every property that the traits allow. Restores torch's number of threads.
PolicyReport check_policy_loss(const PolicyLoss& loss, const PolicyTraits& traits = {},
                               const CheckOptions& options = {});

// What an objective promises, by its product and the traits of its surrogate (core/formula.h), with
// its reference and counts; of tether::policy_loss also the promises about bits and layouts.
PolicyTraits traits_of(const PolicyObjective& objective);

// A loss by the plainest means, in double: one token after the other, then the sums of
// rl/aggregation.h. It tells a wrong level, penalty, aggregation or metric, not a wrong surrogate,
// whose value and slope it takes from the objective: those are for golden values, cases by hand and
// finite differences. Slow; for the library's surrogates and yours.
PolicyLoss reference_of(const PolicyObjective& objective);

}  // namespace tether::testing
