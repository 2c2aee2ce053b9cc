#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "rl/kernels/value_loss.h"
#include "rl/kl_penalty.h"

// KL penalties and the value loss against verl's own functions, as recorded by
// tests/peers/record_verl.py.

namespace tether {
namespace {

using Json = nlohmann::json;
using Doubles = std::vector<double>;

std::vector<Json> recorded(const std::string& file) {
  return Json::parse(std::ifstream(TETHER_TESTS_DIR "/golden/peers/" + file))["cases"];
}

// ---- KL penalties ------------------------------------------------------------------------------

struct Kind {
  const char* name;
  const char *estimator, *gradient;
};
// verl's names; with a plus the gradient is k2's, straight through.
constexpr auto k1 = "k1", k2 = "k2", k3 = "k3", kLowVar = "low_var_kl", kAbs = "abs";
constexpr Kind kKinds[] = {{"kl", k1, k1},
                           {"k1", k1, k1},
                           {"kl+", k1, k2},
                           {"k1+", k1, k2},
                           {"mse", k2, k2},
                           {"k2", k2, k2},
                           {"mse+", k2, k2},
                           {"k2+", k2, k2},
                           {"low_var_kl", kLowVar, kLowVar},
                           {"low_var_kl+", kLowVar, k2},
                           {"k3", kLowVar, kLowVar},
                           {"k3+", kLowVar, k2},
                           {"abs", kAbs, kAbs},
                           {"abs+", kAbs, k2}};

Dual<double> penalty(const Kind& kind, double logp, double ref_logp) {
  const Dual<double> number{logp, 1};
  Dual<double> out;
  for_each_kl_form([&](const auto& estimator) {
    for_each_kl_form([&](const auto& gradient) {
      if (estimator.name != kind.estimator || gradient.name != kind.gradient) return;
      out = kl_term(estimator.defaults, gradient.defaults, KlCorrection::none, number, number,
                    Constant<double>{ref_logp}, weight_bounds(kWeightSaturation<double>, infinity));
    });
  });
  return out;
}

// On both sides of verl's clamps.
TEST(VerlKlPenalty, EveryKindInValueAndGradient) {
  int beyond = 0;
  for (const Json& each : recorded("verl_kl.json")) {
    ASSERT_EQ(each["kinds"].size(), std::size(kKinds));
    const Doubles logp = each["logprob"], ref_logp = each["ref_logprob"];
    const Doubles upstream = each["upstream"];
    for (const Kind& kind : kKinds) {
      const Doubles values = each["kinds"][kind.name]["value"];
      const Doubles gradients = each["kinds"][kind.name]["dlogprob"];
      ASSERT_EQ(values.size(), logp.size());
      for (size_t i = 0; i < logp.size(); ++i) {
        const Dual<double> out = penalty(kind, logp[i], ref_logp[i]);
        // verl's e^d - d - 1 cancels.
        EXPECT_NEAR(out.value, values[i], 1e-12 * std::abs(values[i]) + 4e-16) << kind.name;
        EXPECT_NEAR(upstream[i] * out.grad, gradients[i], 1e-12 * std::abs(gradients[i]) + 1e-15)
            << kind.name;
        beyond += kind.estimator == kLowVar && values[i] == 10 ? 1 : 0;
      }
    }
  }
  EXPECT_GT(beyond, 0);
}

// Where k3 goes on, and pulls back.
TEST(VerlKlPenalty, BeyondItsClampsOnlyK3GoesOn) {
  const Json each = recorded("verl_kl.json")[1];
  const Doubles logp = each["logprob"], ref_logp = each["ref_logprob"];
  for (size_t i = 0; i < logp.size(); ++i) {
    const double d = ref_logp[i] - logp[i], k3_of_d = std::expm1(d) - d;
    const Dual<double> out = penalty({"k3", k3, k3}, logp[i], ref_logp[i]);
    EXPECT_NEAR(out.value, k3_of_d, 1e-12 * k3_of_d) << d;
    EXPECT_NEAR(out.grad, -std::expm1(d), 1e-12 * std::abs(std::expm1(d))) << d;
  }
}

// ---- the loss of a value head
// --------------------------------------------------------------------

Doubles flat(const Json& rows) {
  Doubles out;
  for (const Json& row : rows) {
    for (double each : row) out.push_back(each);
  }
  return out;
}

Aggregation aggregation(const Json& settings, int64_t columns) {
  const std::string mode = settings["loss_agg_mode"];
  if (mode == "token-mean") return token_mean();
  if (mode == "seq-mean-token-sum") return sequence_mean_token_sum();
  EXPECT_EQ(mode, "seq-mean-token-sum-norm");
  return sequence_sum_over_constant(settings["step"].value("loss_scale_factor", double(columns)));
}

Normalizer normalizer(const Json& step) {
  if (step.empty()) return {};
  return {.policy = step["batch_num_tokens"].get<double>(),
          .sequences = step["global_batch_size"].get<double>(),
          .world_size = step["dp_size"].get<double>()};
}

TEST(VerlValueLoss, ValueAndGradient) {
  const std::vector<Json> cases = recorded("verl_value.json");
  ASSERT_EQ(cases.size(), 4u);
  for (const Json& each : cases) {
    const int64_t rows = int64_t(each["vpreds"].size());
    const int64_t columns = int64_t(each["vpreds"][0].size());
    const Doubles values = flat(each["vpreds"]), old_values = flat(each["values"]);
    const Doubles returns = flat(each["returns"]), mask = flat(each["response_mask"]);
    const Doubles gradients = flat(each["dvpreds"]);
    Doubles dvalues(values.size(), NAN);
    const auto view = [&](const Doubles& array) {
      return ConstArray{array.data(), DType::float64, columns, 1};
    };
    const Json& settings = each["settings"];
    const ValueTotals out = value_loss(
        {.layout = {.rows = rows, .columns = columns},
         .values = view(values),
         .returns = view(returns),
         .response_mask = view(mask),
         .old_values = view(old_values)},
        {.loss = ClippedSquaredError{.clip_range = settings["cliprange_value"].get<double>()},
         .aggregation = aggregation(settings, columns)},
        normalizer(settings["step"]), {dvalues.data(), DType::float64, columns, 1});
    const double loss = each["loss"];
    EXPECT_NEAR(out.loss, loss, 1e-12 * std::abs(loss)) << each["name"];
    // verl counts in float32.
    EXPECT_NEAR(out.metrics.to_map().at("value_clip_fraction"), each["clipfrac"].get<double>(),
                1e-7);
    for (size_t i = 0; i < values.size(); ++i) {
      EXPECT_NEAR(dvalues[i], gradients[i], 1e-12 * std::abs(gradients[i]) + 1e-16) << i;
    }
  }
}

}  // namespace
}  // namespace tether
