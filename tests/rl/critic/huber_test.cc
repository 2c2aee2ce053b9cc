#include "rl/critic/huber.h"

#include <gtest/gtest.h>

#include "tests/error_message.h"

namespace tether {
namespace {

Dual<double> error_of(double error, double delta) {
  return Huber{delta}(ValueToken<Dual<double>>{{error + 3, 1}, {7}, {3}});
}

TEST(Huber, IsSquareInsideAndLinearBeyond) {
  struct Row {
    double error, loss, grad;
  };
  for (const Row& row : {Row{0.25, 0.03125, 0.25}, Row{-0.5, 0.125, -0.5}, Row{2, 0.875, 0.5},
                         Row{-2, 0.875, -0.5}, Row{0, 0, 0}}) {
    const Dual<double> loss = error_of(row.error, 0.5);
    EXPECT_EQ(loss.value, row.loss) << row.error;
    EXPECT_EQ(loss.grad, row.grad) << row.error;
  }
}

TEST(Huber, AnInfiniteDeltaIsTheSquaredError) {
  EXPECT_EQ(error_of(4, infinity).value, 8);
  EXPECT_EQ(error_of(4, infinity).grad, 4);
}

TEST(Huber, ItsOptionIsOneOfTheObjective) {
  ValueObjective objective = presets::huber();
  set_option("f", objective, "delta", 0.25);
  EXPECT_EQ(objective.loss.target<Huber>()->delta, 0.25);
  EXPECT_EQ(message([&] { set_option("f", objective, "clip_range", 0.1); }),
            "f: option must be one of delta, constant, got \"clip_range\"");
  EXPECT_EQ(message([&] { check_objective("f", presets::huber(0)); }),
            "f: delta must be greater than 0, got 0");
}

}  // namespace
}  // namespace tether
