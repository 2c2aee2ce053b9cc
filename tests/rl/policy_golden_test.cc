// Policy objectives against 60-digit arithmetic: tests/golden/make_policy_golden.py.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "core/sum.h"
#include "rl/catalogue.h"
#include "tests/rl/policy_batch.h"
#include "tests/rl/policy_program.h"

namespace tether {
namespace {

const nlohmann::json& golden() {
  static const auto json =
      nlohmann::json::parse(std::ifstream(TETHER_TESTS_DIR "/golden/policy_golden.json"));
  return json;
}

// Loss and d loss / d logp of one golden token: logp, old_logp, ref_logp, advantage.
template <class T>
Dual<T> evaluated(const Surrogate& surrogate, const nlohmann::json& token, T log_ratio) {
  alignas(64) T columns[6][kLanes] = {}, value[kLanes], dlogp[kLanes];
  columns[0][0] = token[0];
  columns[1][0] = log_ratio;
  columns[2][0] = token[3];
  columns[3][0] = token[1];
  columns[4][0] = token[2];
  columns[5][0] = exp(Constant<T>{log_ratio}).value;
  surrogate(TokenColumns<T>{columns[0], columns[1], columns[5], columns[2], columns[3], columns[4],
                            kLanes},
            value, dlogp);
  return {value[0], dlogp[0]};
}

// What a slope may be wrong by. That of a smooth formula of the log-ratio, a soft gate's e^-x at x
// of hundreds, also by what the last bit of the log-ratio is worth, and it may underflow.
template <class T>
double slope_bound(const Surrogate& surrogate, const nlohmann::json& token, T log_ratio,
                   double slope, double relative) {
  const double bound = relative * std::abs(slope);
  if (surrogate.traits().clips || !surrogate.traits().of_log_ratio) return bound;
  const T next = std::nextafter(log_ratio, T(0));
  const T last_bit = std::abs(evaluated(surrogate, token, log_ratio).grad -
                              evaluated(surrogate, token, next).grad);
  return std::max({bound, double(last_bit), double(std::numeric_limits<T>::min())});
}

// What a value's error is measured by: itself, or the largest of the terms that it is the sum of.
double value_size(const Surrogate& surrogate, const nlohmann::json& token, double value) {
  if (surrogate.traits().homogeneous) return std::abs(value);
  const double logp = token[0], old_logp = token[1], advantage = token[3];
  return std::max({std::abs(value), std::abs(advantage * logp), std::pow(logp - old_logp, 2)});
}

template <class T>
void expect_surrogate_goldens(double relative) {
  for (const CatalogueRow& row : kCatalogue) {
    ASSERT_TRUE(golden()["surrogates"].contains(std::string(row.name)))
        << "no golden values for " << row.name << ": add it to make_policy_golden.py";
    const Surrogate surrogate = row.preset().surrogate;
    for (const auto& each : golden()["surrogates"][std::string(row.name)]) {
      const T log_ratio = T(each[0]) - T(each[1]);
      const Dual<T> got = evaluated(surrogate, each, log_ratio);
      const double expected = each[4], slope = each[5];
      EXPECT_NEAR(got.value, expected, relative * value_size(surrogate, each, expected))
          << row.name << " " << each;
      EXPECT_NEAR(got.grad, slope, slope_bound(surrogate, each, log_ratio, slope, relative))
          << row.name << " " << each;
    }
  }
}

TEST(PolicyGolden, EverySurrogateMatchesItsGoldenValuesInDouble) {
  expect_surrogate_goldens<double>(2e-15);
}
TEST(PolicyGolden, EverySurrogateMatchesItsGoldenValuesInFloat) {
  expect_surrogate_goldens<float>(1e-6);
}

TEST(PolicyGolden, EveryPresetHasAGoldenBatch) {
  std::set<std::string> names;
  for (const auto& each : golden()["batches"]) {
    if (each["preset"]) names.insert(each["objective"]);
  }
  for (const CatalogueRow& row : kCatalogue) {
    EXPECT_TRUE(names.contains(std::string(row.name)))
        << "no golden batch for " << row.name << ": add it to make_policy_golden.py";
  }
}

// expect(batch, objective, golden)
template <class T, class Expect>
void for_each_golden_batch(Expect expect) {
  for (const auto& each : golden()["batches"]) {
    Batch<T> batch(each["rows"], each["columns"]);
    batch.logps = each["logps"].get<std::vector<T>>();
    batch.old_logps = each["old_logps"].get<std::vector<T>>();
    batch.ref_logps = each["ref_logps"].get<std::vector<T>>();
    if (each.contains("rollout_logps")) {
      batch.rollout_logps = each["rollout_logps"].get<std::vector<T>>();
    }
    const auto given = [&](const char* name) {
      return each.contains(name) ? each[name].get<std::vector<T>>() : std::vector<T>();
    };
    batch.token_weights = given("token_weights");
    batch.kl_weights = given("kl_weights");
    if (each.contains("turn_ids")) batch.turn_ids = each["turn_ids"].get<std::vector<int64_t>>();
    batch.advantages = each["advantages"].get<std::vector<T>>();
    batch.mask = each["response_mask"].get<std::vector<T>>();
    PolicyObjective objective = preset("test", each["objective"].get<std::string>());
    if (!each["preset"]) {
      objective.kl.beta = each["beta"];
      objective.aggregation.constant = each["constant"];
      for (const auto& [name, value] : each["choices"].items()) {
        set_choice("test", objective, name, std::string(value));
      }
      for (const auto& [name, value] : each["options"].items()) {
        set_option("test", objective, name, value);
      }
    }
    expect(batch, objective, each);
  }
}

template <class T>
void expect_golden(const PolicyTotals& got, const std::vector<T>& dlogps,
                   const nlohmann::json& golden, double tolerance) {
  const double expected = golden["loss"];
  EXPECT_NEAR(got.loss, expected, tolerance * std::max(1.0, std::abs(expected))) << golden["name"];
  for (size_t i = 0; i < dlogps.size(); ++i) {
    EXPECT_NEAR(dlogps[i], golden["dlogps"][i], tolerance) << golden["name"] << " " << i;
  }
}

template <class T>
void expect_batch_goldens(double tolerance) {
  for_each_golden_batch<T>(
      [&](Batch<T>& batch, const PolicyObjective& objective, const auto& each) {
        const PolicyTotals got = batch.run(objective);
        expect_golden(got, batch.dlogps, each, tolerance);
      });
}

TEST(PolicyGolden, BatchesMatchTheirGoldenValuesInDouble) { expect_batch_goldens<double>(1e-15); }
TEST(PolicyGolden, BatchesMatchTheirGoldenValuesInFloat) { expect_batch_goldens<float>(1e-6); }

// But for a penalty that no kernel has.
TEST(PolicyGolden, BatchesMatchTheirGoldenValuesInTheProgramOfTheDevice) {
  for_each_golden_batch<float>(
      [](Batch<float>& batch, const PolicyObjective& objective, const auto& each) {
        const bool by_level = objective.kl.correction == KlCorrection::level_ratio;
        if (by_level && shares_ratio(objective.level)) return;
        const PolicyTotals got =
            run_program(batch.arrays(), objective,
                        {.logps = {batch.dlogps.data(), DType::float32, batch.columns, 1}});
        expect_golden(got, batch.dlogps, each, 1e-6);
      });
}

}  // namespace
}  // namespace tether
