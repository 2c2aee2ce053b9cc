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
                      .bitwise = true,
                      .refuses_double_backward = true};
  const bool stops_gradient = objective.surrogate.target<IsReinforce>();
  traits.is_function_of_log_ratio = !stops_gradient && !objective.surrogate.target<Reinforce>();
  traits.gradient_is_derivative = !stops_gradient && objective.level != RatioLevel::sequence_token;
  traits.is_per_token = objective.level == RatioLevel::token;
  const PpoClip* clip = objective.surrogate.target<PpoClip>();
  traits.pulls_back = traits.is_per_token && !(clip && clip->dual_clip < infinity);
  if (clip && traits.is_per_token) {
    traits.clip = {.low = clip->epsilon_low, .high = clip->epsilon_high, .dual = clip->dual_clip};
  }
  traits.reference = testing::reference_of(objective);
  traits.counts = [objective](const PolicyBatch& batch) { return local_counts(batch, objective); };
  return traits;
}

void expect_good(const PolicyObjective& objective, Call call, const PolicyTraits& traits,
                 const testing::CheckOptions& options = {}) {
  const auto report =
      check_policy_loss([&](const PolicyBatch& batch,
                            const Normalizer& step) { return call(batch, objective, step); },
                        traits, options);
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
  expect_good(objective, detail::policy_loss_any_device, traits, {.batches = 3});
}

INSTANTIATE_TEST_SUITE_P(Rows, Catalogue, ::testing::ValuesIn(kCatalogue),
                         [](const auto& row) { return std::string(row.param.name); });

TEST(Aggregations, KeepEveryPromiseWithPenaltyAndUnequalClip) {
  for (const Aggregation& aggregation :
       {token_mean(), sequence_mean_token_mean(), sequence_mean_token_sum(),
        sequence_sum_over_constant(9), token_sum()}) {
    SCOPED_TRACE(kAggregationNames[static_cast<size_t>(aggregation.mode)]);
    const PolicyObjective objective{.surrogate = PpoClip{.epsilon_low = 0.2, .epsilon_high = 0.28},
                                    .kl = {.beta = 0.3},
                                    .aggregation = aggregation};
    expect_good(objective, policy_loss, traits_of(objective));
  }
}

TEST(Penalties, WeighedByTheRatioOfTheLevelKeepEveryPromise) {
  for (const RatioLevel level : {RatioLevel::token, RatioLevel::sequence_mean,
                                 RatioLevel::sequence_token, RatioLevel::sequence_sum}) {
    SCOPED_TRACE(kRatioLevelNames[static_cast<size_t>(level)]);
    const PolicyObjective objective{.level = level,
                                    .surrogate = PpoClip{.epsilon_low = 0.2, .epsilon_high = 0.28},
                                    .kl = {.beta = 0.3, .correction = KlCorrection::level_ratio},
                                    .aggregation = sequence_mean_token_mean()};
    PolicyTraits traits = traits_of(objective);
    // Sums of log-ratios are soon beyond the largest weight of a penalty in float, e^20.
    if (level == RatioLevel::sequence_sum) traits.dtypes = {at::kDouble};
    traits.penalty_pulls = !shares_ratio(level);
    expect_good(objective, policy_loss, traits);
    traits.bitwise = false;
    expect_good(objective, detail::policy_loss_any_device, traits, {.batches = 2});
  }
}

}  // namespace
}  // namespace tether
