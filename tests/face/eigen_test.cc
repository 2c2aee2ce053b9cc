#include "face/eigen.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>

#include "tests/error_message.h"

namespace tether {
namespace {

using Eigen::ArrayXd;
using Eigen::ArrayXXd;
using RowMajor = Eigen::Array<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using Mask = Eigen::Array<bool, Eigen::Dynamic, Eigen::Dynamic>;

constexpr int kRows = 4, kColumns = 6;

struct Data {
  ArrayXXd logps, old_logps, ref_logps, entropies, advantages, rollout_logps;
  Mask mask;

  Data() : mask(kRows, kColumns) {
    std::srand(3);
    const auto random = [] { return ArrayXXd(ArrayXXd::Random(kRows, kColumns)); };
    logps = random() - 1;
    old_logps = logps + 0.3 * random();
    ref_logps = logps + 0.3 * random();
    entropies = 1 + random();
    advantages = random();
    rollout_logps = logps + 0.3 * random();
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kColumns; ++j) {
        mask(i, j) = (i + 2 * j) % 5 != 0;
        if (!mask(i, j)) logps(i, j) = std::numeric_limits<double>::quiet_NaN();
      }
    }
  }
  eigen::PolicyBatch batch() const {
    return {.logps = logps,
            .advantages = advantages,
            .response_mask = mask,
            .old_logps = old_logps,
            .ref_logps = ref_logps,
            .entropies = entropies,
            .rollout_logps = rollout_logps};
  }
};

// The definition of PPO with k3 and an entropy bonus, as Eigen writes it.
TEST(EigenObjectives, PolicyLossIsItsDefinition) {
  Data data;
  PolicyObjective objective = presets::ppo({.epsilon_low = 0.1, .epsilon_high = 0.2});
  objective.kl.beta = 0.3;
  objective.kl.gradient = K3{};
  objective.kl.allow_biased_gradient = true;
  objective.entropy.coefficient = 0.05;
  const eigen::PolicyResult out = eigen::policy_loss(data.batch(), objective);

  const ArrayXXd w = data.mask.cast<double>();
  const ArrayXXd logps = data.mask.select(data.logps, 0);
  const auto loss = [&](const ArrayXXd& at) {
    const ArrayXXd ratio = (at - data.mask.select(data.old_logps, 0)).exp();
    const ArrayXXd surrogate =
        -(ratio * data.advantages).min(ratio.max(0.9).min(1.2) * data.advantages);
    const ArrayXXd d = data.mask.select(data.ref_logps, 0) - at;
    return ((surrogate + 0.3 * (d.exp() - 1 - d) - 0.05 * data.entropies) * w).sum() / w.sum();
  };
  EXPECT_NEAR(out.loss, loss(logps), 1e-14);
  const double step = 1e-6;
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kColumns; ++j) {
      ArrayXXd up = logps, down = logps;
      up(i, j) += step;
      down(i, j) -= step;
      EXPECT_NEAR(out.dlogps(i, j), (loss(up) - loss(down)) / (2 * step), 1e-8) << i << ", " << j;
    }
  }
  EXPECT_TRUE(out.dentropies.isApprox(-0.05 * w / w.sum(), 1e-14));
  EXPECT_EQ(*eigen::local_counts(data.batch(), objective).policy, w.sum());
}

TEST(EigenObjectives, EveryObjectiveInAnyStorageOrder) {
  const Data data;
  const RowMajor logps = data.logps, old_logps = data.old_logps;
  for (const auto& row : kCatalogue) {
    const PolicyObjective objective = row.preset();
    eigen::PolicyBatch by_rows = data.batch();
    by_rows.logps = logps;
    by_rows.old_logps = old_logps;
    const auto want = eigen::policy_loss(data.batch(), objective);
    const auto got = eigen::policy_loss(by_rows, objective);
    EXPECT_EQ(got.loss, want.loss) << row.name;
    EXPECT_TRUE((got.dlogps == want.dlogps).all()) << row.name;
  }
  for (const auto& row : kPreferenceCatalogue) {
    eigen::PreferenceBatch batch{
        .logps = data.logps, .ref_logps = data.ref_logps, .response_mask = data.mask};
    const ArrayXd labels = ArrayXd::LinSpaced(data.logps.rows(), 0, 1);
    if (row.preset().loss.takes_labels()) batch.labels = labels;
    const auto want = eigen::preference_loss(batch, row.preset());
    batch.logps = logps;
    const auto got = eigen::preference_loss(batch, row.preset());
    EXPECT_EQ(got.loss, want.loss) << row.name;
    EXPECT_TRUE((got.dlogps == want.dlogps).all()) << row.name;
  }
}

TEST(EigenObjectives, DpoIsItsDefinition) {
  const Data data;
  const auto out = eigen::preference_loss(
      {.logps = data.logps, .ref_logps = data.ref_logps, .response_mask = data.mask},
      presets::dpo(/*beta=*/0.2));
  const ArrayXXd gaps = data.mask.select(data.logps - data.ref_logps, 0);
  const ArrayXd scores = gaps.rowwise().sum();
  const ArrayXd margins = 0.2 * (scores.head(2) - scores.tail(2));
  EXPECT_NEAR(out.loss, (1 + (-margins).exp()).log().mean(), 1e-14);
}

TEST(EigenObjectives, WeightsThatNeedTheBatch) {
  const ArrayXXd entropies = (ArrayXXd(2, 2) << 0.5, 2, 1, 9).finished();
  const ArrayXXd mask = (ArrayXXd(2, 2) << 1, 1, 1, 0).finished();
  const ArrayXXd weights =
      eigen::batch_weights({.logps = entropies, .response_mask = mask, .entropies = entropies},
                           TopEntropy{.share = 0.5});
  EXPECT_TRUE((weights == (ArrayXXd(2, 2) << 0, 1, 1, 1).finished()).all());
}

TEST(EigenObjectives, AdvantagesOfRows) {
  const Data data;
  const ArrayXd rows = data.advantages.col(0);
  const ArrayXXd spread = rows.replicate(1, kColumns);
  eigen::PolicyBatch batch = data.batch(), of_rows = data.batch();
  batch.advantages = spread;
  of_rows.advantages = rows;
  const auto want = eigen::policy_loss(batch, presets::grpo());
  const auto got = eigen::policy_loss(of_rows, presets::grpo());
  EXPECT_EQ(got.loss, want.loss);
  EXPECT_TRUE((got.dlogps == want.dlogps).all());
}

TEST(EigenObjectives, ValueLossIsItsDefinition) {
  const Data data;
  const ArrayXXd values = data.old_logps, returns = data.ref_logps;
  const auto out =
      eigen::value_loss({.values = values, .returns = returns, .response_mask = data.mask});
  const ArrayXXd w = data.mask.cast<double>();
  EXPECT_NEAR(out.loss, 0.5 * ((values - returns).square() * w).sum() / w.sum(), 1e-15);
  EXPECT_TRUE(out.dvalues.isApprox((values - returns) * w / w.sum(), 1e-14));
}

TEST(EigenObjectives, ShapesAreChecked) {
  const Data data;
  eigen::PolicyBatch batch = data.batch();
  const ArrayXXd narrow = ArrayXXd::Zero(kRows, 5);
  batch.old_logps = narrow;
  EXPECT_EQ(message([&] { eigen::policy_loss(batch, presets::ppo()); }),
            "policy_loss: old_logps must be [4, 6] like logps, got [4, 5]");
  batch = data.batch();
  const ArrayXd three = ArrayXd::Zero(3);
  batch.advantages = three;
  EXPECT_EQ(message([&] { eigen::policy_loss(batch, presets::ppo()); }),
            "policy_loss: advantages must be [4] or [4, 6], got [3, 1]");
  batch = data.batch();
  batch.ref_logps = {};
  EXPECT_EQ(message([&] { eigen::policy_loss(batch, presets::grpo(0.1)); }),
            "policy_loss: ref_logps must be given when beta is greater than 0, got beta 0.1 and "
            "none. Pass ref_logps or beta = 0");
  EXPECT_EQ(
      message([&] {
        eigen::value_loss({.values = data.logps, .returns = narrow, .response_mask = data.mask});
      }),
      "value_loss: returns must be [4, 6] like values, got [4, 5]");
}

}  // namespace
}  // namespace tether
