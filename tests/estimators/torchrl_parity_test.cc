#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "estimators/advantage/catalogue.h"
#include "estimators/advantage/row_scan.h"

// Advantages against torchrl's own functions, as recorded by tests/peers/record_torchrl.py. Its
// rows have no mask; an end that is done but not terminated is one that is cut off here.

namespace tether {
namespace {

using Json = nlohmann::json;
using Doubles = std::vector<double>;

Doubles flat(const Json& rows) {
  Doubles out;
  for (const Json& row : rows) {
    for (const Json& each : row) out.push_back(each.is_boolean() ? each.get<bool>() : double(each));
  }
  return out;
}

void expect_near(const Doubles& actual, const Doubles& expected) {
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t i = 0; i < actual.size(); ++i) {
    EXPECT_NEAR(actual[i], expected[i], 1e-12 * std::abs(expected[i]) + 1e-14) << i;
  }
}

// As many cases as are recorded under this name equal the estimator that `make` gives.
template <class Make>
int compared(const std::string& estimator, Make make) {
  const Json all =
      Json::parse(std::ifstream(TETHER_TESTS_DIR "/golden/peers/torchrl_advantages.json"));
  int count = 0;
  for (const Json& each : all["cases"]) {
    if (each["estimator"] != estimator) continue;
    ++count;
    const auto rows = int64_t(each["rewards"].size()), columns = int64_t(each["rewards"][0].size());
    const Doubles rewards = flat(each["rewards"]), values = flat(each["values"]),
                  log_ratios = flat(each["log_ratios"]), done = flat(each["done"]),
                  terminated = flat(each["terminated"]), next_values = flat(each["next_values"]),
                  ones(rewards.size(), 1);
    Doubles truncated = done, advantages = rewards, returns = rewards;
    for (size_t i = 0; i < done.size(); ++i) truncated[i] -= terminated[i];
    const auto array = [&](const Doubles& data) {
      return ConstArray{data.data(), DType::float64, columns, 1};
    };
    scan_rows("advantage",
              {.layout = {.rows = rows, .columns = columns},
               .rewards = array(rewards),
               .values = array(values),
               .response_mask = array(ones),
               .done = array(terminated),
               .truncated = array(truncated),
               .truncation_values = array(next_values),
               .log_ratios = array(log_ratios)},
              make(each), {advantages.data(), DType::float64, columns, 1},
              {returns.data(), DType::float64, columns, 1});
    expect_near(advantages, flat(each["advantages"]));
    expect_near(returns, flat(each["returns"]));
  }
  return count;
}

TEST(TorchrlAdvantages, Gae) {
  const int count = compared("gae", [](const Json& options) {
    return Gae{.gamma = options["gamma"], .lambda = options["lambda"]};
  });
  EXPECT_EQ(count, 2);
}

TEST(TorchrlAdvantages, Vtrace) {
  const int count = compared("vtrace", [](const Json& options) {
    const double rho_bar = options["rho_bar"];  // of the advantage too
    return Vtrace{.gamma = options["gamma"],
                  .rho_bar = rho_bar,
                  .c_bar = options["c_bar"],
                  .pg_rho_bar = rho_bar};
  });
  EXPECT_EQ(count, 3);
}

}  // namespace
}  // namespace tether
