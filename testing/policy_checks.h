#pragma once

#include <cstdint>
#include <functional>
#include <iosfwd>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "../libtorch/policy_loss.h"

// Is this policy loss right? One call tries a loss, the library's or your own, on random ragged
// batches against the properties below, and prints the smallest batch that breaks one:
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

// What a loss gives: a scalar, and whatever it logs. From a plain tensor, or a LossOutput.
struct Result {
  at::Tensor loss;
  std::map<std::string, double> metrics = {};

  Result(at::Tensor loss, std::map<std::string, double> metrics = {});
  Result(const LossOutput& output);
};

// The gradient is taken by torch's autograd, with respect to batch.logps.
using PolicyLoss = std::function<Result(const PolicyBatch& batch, const Normalizer& step)>;

// The ratio's interval [1 - low, 1 + high]: beyond it, on the side that the advantage asks for,
// there is no gradient. Nor is there beyond `dual`, for a bad token.
struct ClipRange {
  double low = 0.2;
  double high = 0.2;
  double dual = infinity;
};

// What the loss promises. The defaults are what a good loss in plain torch can keep.
struct PolicyTraits {
  bool takes_normalizer = true;       // divides by the counts of the step, not by its own, if given
  bool takes_offsets = false;         // packed rows
  bool takes_row_advantages = false;  // [B]; else advantages are like logps
  bool takes_no_old_logps = false;    // absent: logps, as constants
  bool takes_fractional_mask = true;  // weights between 0 and 1
  bool takes_half_precision = true;   // widens bfloat16 and float16
  bool needs_ref_logps = false;       // has a KL penalty, whose gradient pulls to the reference
  bool is_function_of_log_ratio = true;  // of logps - old_logps, and ref_logps - logps
  bool scales_with_advantages = true;    // where the penalty is 0
  bool is_per_token = true;              // false: the tokens of a row share a ratio (rl/level.h)
  bool gradient_is_derivative = true;    // false where a gradient is stopped or straight through
  bool survives_runaways = true;         // finite for any log-ratio
  bool penalty_pulls = true;  // a token's penalty pulls it; not if its row's others do so as well
  bool pulls_back = true;     // a bad token that became too likely has a gradient that lowers it
  bool bitwise = false;       // any number of threads, padding, strides: not one bit changes
  bool refuses_double_backward = false;
  std::optional<ClipRange> clip = {};
  PolicyLoss reference = {};  // the same loss by other means, called with float64; see reference_of
  std::function<Normalizer(const PolicyBatch&)> counts = {};  // absent: tokens and rows of the mask
  double tolerance = 64;  // rounding allowed, in epsilons of the sum of the terms' magnitudes
  std::vector<at::ScalarType> dtypes = {at::kFloat, at::kDouble};
};

struct CheckOptions {
  uint64_t seed = 1;
  int batches = 12;  // random small ones; a few of fixed, larger shape are added
};

enum class Outcome { holds, fails, not_applicable };

struct PropertyReport {
  std::string id;         // "poison"
  std::string statement;  // what should hold, in one sentence
  Outcome outcome = Outcome::holds;
  std::string detail = {};  // fails: what differed; not applicable: why
  std::string batch = {};   // fails: the smallest failing input found, as C++
  int64_t rows = 0;         // of it
  int64_t columns = 0;
};

struct PolicyReport {
  CheckOptions options;
  std::vector<PropertyReport> properties;

  bool ok() const;  // nothing fails
  std::vector<std::string> failed() const;
  const PropertyReport& operator[](std::string_view id) const;
  std::string text() const;
};
std::ostream& operator<<(std::ostream& out, const PolicyReport& report);

// Tries every property that the traits allow. Restores torch's number of threads.
PolicyReport check_policy_loss(const PolicyLoss& loss, const PolicyTraits& traits = {},
                               const CheckOptions& options = {});

// What an objective promises, by its product and the traits of its surrogate (core/formula.h), with
// its reference and counts; of tether::policy_loss also the promises about bits and layouts.
PolicyTraits traits_of(const PolicyObjective& objective);

// A loss by the plainest means, in double: one token after the other, then the sums of
// rl/aggregation.h. Slow; for the library's surrogates and yours.
PolicyLoss reference_of(const PolicyObjective& objective);

}  // namespace tether::testing
