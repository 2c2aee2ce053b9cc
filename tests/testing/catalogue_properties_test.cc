#include <gtest/gtest.h>

#include <array>
#include <string>

#include "testing/policy_checks.h"

// Every objective of the library against every property that its traits allow.

namespace tether {
namespace {

using testing::check_policy_loss;
using testing::PolicyTraits;

using Call = LossOutput (*)(const PolicyBatch&, const PolicyObjective&, const Normalizer&);

PolicyTraits traits_of(const PolicyObjective& objective) {
  PolicyTraits traits{.takes_offsets = true,
                      .takes_row_advantages = true,
                      .takes_no_old_logps = true,
                      .needs_ref_logps = objective.kl.beta > 0,
                      .is_function_of_log_ratio = !objective.surrogate.target<Reinforce>(),
                      .bitwise = true,
                      .refuses_double_backward = true};
  if (const PpoClip* clip = objective.surrogate.target<PpoClip>()) {
    traits.clip = {.low = clip->epsilon_low, .high = clip->epsilon_high};
  }
  traits.reference = testing::reference_of(objective);
  traits.counts = [objective](const PolicyBatch& batch) { return local_counts(batch, objective); };
  return traits;
}

void expect_good(const PolicyObjective& objective, Call call, const PolicyTraits& traits) {
  const auto report =
      check_policy_loss([&](const PolicyBatch& batch,
                            const Normalizer& step) { return call(batch, objective, step); },
                        traits);
  EXPECT_TRUE(report.ok()) << report;
}

class Catalogue : public ::testing::TestWithParam<CatalogueRow> {};

TEST_P(Catalogue, KernelKeepsEveryPromise) {
  const PolicyObjective objective = GetParam().preset();
  expect_good(objective, policy_loss, traits_of(objective));
}

TEST_P(Catalogue, AnyDevicePathKeepsTheSamePromisesUpToRounding) {
  const PolicyObjective objective = GetParam().preset();
  PolicyTraits traits = traits_of(objective);
  traits.bitwise = false;
  expect_good(objective, detail::policy_loss_any_device, traits);
}

INSTANTIATE_TEST_SUITE_P(Rows, Catalogue, ::testing::ValuesIn(kCatalogue),
                         [](const auto& row) { return std::string(row.param.name); });

TEST(Aggregations, KeepEveryPromiseWithPenaltyAndUnequalClip) {
  for (const Aggregation& aggregation :
       {token_mean(), sequence_mean_token_mean(), sequence_mean_token_sum(),
        sequence_sum_over_constant(9)}) {
    SCOPED_TRACE(kAggregationNames[static_cast<size_t>(aggregation.mode)]);
    const PolicyObjective objective{.surrogate = PpoClip{.epsilon_low = 0.2, .epsilon_high = 0.28},
                                    .kl = {.beta = 0.3},
                                    .aggregation = aggregation};
    expect_good(objective, policy_loss, traits_of(objective));
  }
}

}  // namespace
}  // namespace tether
