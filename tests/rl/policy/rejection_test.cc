#include "rl/policy/rejection.h"

#include <gtest/gtest.h>

#include <cmath>

#include "rl/policy/ppo.h"
#include "tests/rl/policy/token_at.h"

namespace tether {
namespace {

double weight_of(const RatioGate& formula, double ratio) {
  const WeightToken<Constant<double>> token{{-1}, {-1}, {-1}, {-1 - std::log(ratio)}, {1}};
  return formula(token, formula.measure(token)).value;
}

TEST(RatioGate, IsOneWithinItsBounds) {
  EXPECT_EQ(weight_of({}, 0.51), 1);
  EXPECT_EQ(weight_of({}, 1.99), 1);
  EXPECT_EQ(weight_of({}, 0.49), 0);
  EXPECT_EQ(weight_of({}, 2.01), 0);
  EXPECT_EQ(weight_of({.low = 1, .high = 1}, 1), 1);  // the interval is closed
}

// old_logp log 0.5, rollout_logp as given.
template <class Gate>
double measure_of(const Gate& gate, double rollout_p) {
  return gate
      .measure(
          WeightToken<Constant<double>>{{-1}, {std::log(0.5)}, {-1}, {std::log(rollout_p)}, {1}})
      .value;
}

TEST(Gates, MeasureHowFarApartEngineAndTrainerAre) {
  const double q = std::log(2);  // 0.5 against 0.25
  EXPECT_DOUBLE_EQ(measure_of(K2Gate{}, 0.25), q * q / 2);
  EXPECT_DOUBLE_EQ(measure_of(K3Gate{}, 0.25), 2 - 1 - q);
  EXPECT_DOUBLE_EQ(measure_of(TvGate{}, 0.25), 0.25);
  EXPECT_DOUBLE_EQ(measure_of(TvGate{}, 0.75), 0.25);
  EXPECT_NEAR(measure_of(BinaryKlGate{}, 0.25), 0.25 * std::log(0.5) + 0.75 * std::log(0.75 / 0.5),
              1e-8);
  EXPECT_DOUBLE_EQ(measure_of(RatioTvGate{}, 0.25), 1);
  EXPECT_DOUBLE_EQ(measure_of(RatioTvGate{}, 0.125), 1);  // a ratio of 4 counts as 2
  EXPECT_DOUBLE_EQ(measure_of(RatioTvGate{}, 1), 0.5);
}

template <class Gate>
void expect_threshold() {
  const Gate gate{.high = 0.25};
  EXPECT_EQ(gate({}, Constant<double>{0.25}).value, 1);
  EXPECT_EQ(gate({}, Constant<double>{0.26}).value, 0);
}
TEST(Gates, KeepWhatIsAtMostTheirBound) {
  expect_threshold<K2Gate>();
  expect_threshold<K3Gate>();
  expect_threshold<TvGate>();
  expect_threshold<BinaryKlGate>();
  expect_threshold<RatioTvGate>();
}

TEST(Gates, OfWholeAnswersSayIt) {
  EXPECT_EQ(TokenWeight(RatioTvGate{}).level, WeightLevel::sequence_mean);
  EXPECT_EQ(TokenWeight(RatioGate{}).level, WeightLevel::token);
}

// Losses and slopes of the tokens from token_at.h; the second token and the second answer leave, so
// the mean is over two tokens.
TEST(RatioGate, ShrinksTheMean) {
  Batch<double> batch = two_answers();
  batch.rollout_logps = {-1.1, 2, -1.3, -4, 0, 0};
  PolicyObjective objective = presets::ppo();
  objective.weights = {{RatioGate{}}};
  expect_loss_and_slopes(batch, objective, (-2.2 - 1.0) / 2, {-1.1, 0, -0.5, 0, 0, 0});
  EXPECT_EQ(batch.run(objective).metrics.to_map().at("tokens"), 2);
}

// One impossible token vetoes its answer.
TEST(RatioGate, OfTheSmallestIsAVeto) {
  Batch<double> batch = two_answers();
  batch.rollout_logps = {-1, 11, -1, -1, 0, 0};
  PolicyObjective objective = presets::ppo();
  objective.weights = {{RatioGate{.low = 1e-4, .high = 1e4}, WeightLevel::sequence_min}};
  expect_loss_and_slopes(batch, objective, 1.6, {0, 0, 0, 0, 0, 0});
}

}  // namespace
}  // namespace tether
