#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>

#include "libtorch/advantage.h"
#include "libtorch/kl_report.h"

namespace tether {
namespace {

const double kNan = std::numeric_limits<double>::quiet_NaN();

at::Tensor doubles(std::vector<double> values) { return at::tensor(values, at::kDouble); }

TEST(DiscountedReturns, AreTheRecursion) {
  const at::Tensor rewards = at::stack({doubles({1, kNan, 2}), doubles({3, 4, 5})});
  const at::Tensor mask = at::tensor({1, 0, 1, 1, 1, 1}).view({2, 3});
  const ReturnsBatch batch{.rewards = rewards, .response_mask = mask, .bootstrap = doubles({8, 0})};
  const at::Tensor carried = discounted_returns(batch, {.gamma = 0.5});
  EXPECT_TRUE(at::equal(carried, at::stack({doubles({4, 0, 6}), doubles({6.25, 6.5, 5})})));
  const at::Tensor decayed = discounted_returns(batch, {.gamma = 0.5, .gap = MaskGap::decay});
  EXPECT_TRUE(at::equal(decayed[0], doubles({2.5, 0, 6})));
  // The same rows packed, without the masked slot.
  const at::Tensor active = mask != 0;
  const at::Tensor packed = discounted_returns({.rewards = rewards.masked_select(active),
                                                .response_mask = at::ones({5}, at::kBool),
                                                .bootstrap = doubles({8, 0}),
                                                .offsets = at::tensor({0, 2, 5}, at::kInt)},
                                               {.gamma = 0.5});
  EXPECT_TRUE(at::equal(packed, carried.masked_select(active)));
}

TEST(EstimateKl, IsTheMeanOfTheEstimator) {
  at::manual_seed(1);
  const at::Tensor log_ratios = 0.3 * at::randn({4, 9}, at::kDouble);
  at::Tensor mask = at::rand({4, 9}) > 0.3;
  const at::Tensor k3 = log_ratios.exp() - 1 - log_ratios;
  const at::Tensor poisoned = log_ratios.masked_fill(mask.logical_not(), kNan);
  const KlReport report = kl_report(poisoned, mask);
  EXPECT_NEAR(report.mean, k3.masked_select(mask).mean().item<double>(), 1e-14);
  EXPECT_EQ(report.tokens, mask.sum().item<double>());
  EXPECT_EQ(report.sequences, 4);
  const at::Tensor ends = at::cat({at::zeros({1}, at::kLong), mask.sum(1).cumsum(0)});
  const KlReport packed =
      kl_report(log_ratios.masked_select(mask), at::ones(mask.sum().item<int64_t>()), {}, ends);
  EXPECT_NEAR(packed.mean, report.mean, 1e-15);
  EXPECT_NEAR(packed.standard_error, report.standard_error, 1e-15);
}

template <class Exception, class Body>
std::string message(Body body) {
  try {
    body();
  } catch (const Exception& error) {
    return error.what_without_backtrace();
  }
  return "no error";
}

TEST(DiscountedReturns, BadInputIsRefused) {
  const at::Tensor rewards = at::zeros({2, 3}), mask = at::ones({2, 3}, at::kBool);
  const auto refusal = [](const ReturnsBatch& batch, const DiscountedReturns& options = {}) {
    return message<c10::ValueError>([&] { discounted_returns(batch, options); });
  };
  EXPECT_EQ(refusal({.response_mask = mask}),
            "discounted_returns: rewards must be given, got none");
  EXPECT_EQ(refusal({.rewards = rewards[0], .response_mask = mask[0]}),
            "discounted_returns: rewards must be [B, T], or [N] with offsets, got [3]");
  EXPECT_EQ(refusal({.rewards = rewards, .response_mask = mask[0]}),
            "discounted_returns: response_mask must be [2, 3] like rewards, got [3]");
  EXPECT_EQ(refusal({.rewards = rewards, .response_mask = mask, .bootstrap = at::zeros({3})}),
            "discounted_returns: bootstrap must be [2], got [3]");
  EXPECT_EQ(refusal({.rewards = rewards, .response_mask = mask}, {.gamma = 2}),
            "discounted_returns: gamma must be in [0, 1], got 2");
  EXPECT_EQ(message<c10::TypeError>([&] {
              discounted_returns({.rewards = rewards.to(at::kLong), .response_mask = mask});
            }),
            "discounted_returns: rewards must be float32, float64, bfloat16 or float16, got int64");
  EXPECT_EQ(message<c10::ValueError>([&] { kl_report(rewards, mask[0]); }),
            "kl_report: response_mask must be [2, 3] like log_ratios, got [3]");
}

}  // namespace
}  // namespace tether
