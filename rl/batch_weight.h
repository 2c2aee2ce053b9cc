#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <numeric>
#include <span>
#include <vector>

#include "../core/arguments.h"
#include "../core/formula.h"
#include "../core/number.h"

namespace tether {

// Weights of tokens that need the whole batch: picks by rank, by quantile, by covariance, or what
// the rest of an answer says. They are made before the loss and given to it: as token_weights,
// kl_weights, entropy_weights, or, where what they take out shall not be counted, times the mask.

// Rows of tokens, [B, T] or packed [N]. A rule looks at what it reads.
template <class Array>
struct BatchWeightInputs {
  LayoutOf<Array> layout = {};
  Array logps = {};
  Array response_mask = {};  // weights in [0, 1]; slots of weight 0 may hold anything
  Array old_logps = {};
  Array rollout_logps = {};
  Array advantages = {};  // per token, or per row
  Array entropies = {};
  Array turn_ids = {};  // do not decrease along a row; absent: each run of the mask is a turn
  OffsetsOf<Array> offsets = {};

  static constexpr auto arguments() {
    using In = BatchWeightInputs;
    using A = Argument<In, Array>;
    constexpr auto optional = Use::optional;
    constexpr auto live = Flow::differentiable;  // in a step; no gradient follows from here
    return std::array{
        A{"logps", &In::logps, Shape::rows, Kind::floating, Use::required, live},
        A{"response_mask", &In::response_mask, Shape::tokens, Kind::mask},
        A{"old_logps", &In::old_logps, Shape::tokens, Kind::floating, optional},
        A{"rollout_logps", &In::rollout_logps, Shape::tokens, Kind::floating, optional},
        A{"advantages", &In::advantages, Shape::either, Kind::floating, optional},
        A{"entropies", &In::entropies, Shape::tokens, Kind::floating, optional, live},
        A{"turn_ids", &In::turn_ids, Shape::tokens, Kind::ids, optional}};
  }
};
using BatchWeightArrays = BatchWeightInputs<ConstArray>;

// The active tokens of a batch, one row after the other. What a rule does not need is empty.
struct BatchTokens {
  std::vector<double> weight = {}, logp = {}, old_logp = {}, rollout_logp = {}, advantage = {},
                      entropy = {};
  std::vector<size_t> row_ends = {};   // of each row with tokens, among them
  std::vector<size_t> turn_ends = {};  // of each turn

  size_t size() const { return weight.size(); }
};

// The mean of a column, each token counted by its weight; 0 without tokens. Of equal numbers
// exactly that number.
inline double mean_of(const BatchTokens& tokens, std::span<const double> column) {
  double sum = 0, count = 0;
  for (size_t i = 0; i < tokens.size(); ++i) {
    sum += tokens.weight[i] * (column[i] - column[0]);
    count += tokens.weight[i];
  }
  return count > 0 ? column[0] + sum / count : 0;
}

// The places of a column in the order of its numbers, the largest first; of equal ones the first.
inline std::vector<size_t> descending(std::span<const double> column) {
  std::vector<size_t> order(column.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return column[a] > column[b]; });
  return order;
}

// e^x, which saturates as in float32 (core/number.h): a weight has to fit there.
inline double exp_within(double x) {
  constexpr double kBound = double(kSaturation<float>);
  return std::exp(std::clamp(x, -kBound, kBound));
}

// What a rule needs beside the mask.
struct BatchNeeds {
  bool logps = false;
  bool old_logps = false;
  bool rollout_logps = false;
  bool advantages = false;
  bool entropies = false;
  bool turns = false;
};

template <class Formula>
concept BatchWeightFormula =
    SmallFormula<Formula> &&
    requires(const Formula rule, const BatchTokens tokens, std::span<double> out) {
      rule(tokens, out);
    } &&
    (requires { Formula::needs.turns; } || requires(const Formula rule) { rule.needs().turns; });

namespace detail {

struct BatchWeightCalls {
  BatchNeeds (*needs)(const void*);
  void (*fill)(const void*, const BatchTokens&, std::span<double>);

  template <class Formula>
  static constexpr BatchWeightCalls of() {
    return {&needs_of<Formula>,
            [](const void* formula, const BatchTokens& in, std::span<double> out) {
              (*static_cast<const Formula*>(formula))(in, out);
            }};
  }
  template <class Formula>
  static BatchNeeds needs_of(const void* formula) {
    if constexpr (requires(const Formula rule) { rule.needs(); }) {
      return static_cast<const Formula*>(formula)->needs();
    } else {
      return Formula::needs;
    }
  }
};

}  // namespace detail

// Any rule, the library's own (batch_weight_catalogue.h) or a user's, as a value: an option struct
// with `static constexpr BatchNeeds needs`, or `BatchNeeds needs() const` where its options decide,
// and
//   void operator()(const BatchTokens&, std::span<double> out) const
// which changes the weights of the tokens, that are 1 before.
class BatchWeight : public AnyFormula<detail::BatchWeightCalls> {
 public:
  template <BatchWeightFormula Formula>
  BatchWeight(const Formula& rule) : AnyFormula(rule) {}

  BatchNeeds needs() const { return calls().needs(formula()); }
  void fill(const BatchTokens& tokens, std::span<double> out) const {
    calls().fill(formula(), tokens, out);
  }
};

}  // namespace tether
