#pragma once

#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <type_traits>
#include <vector>

#include "../core/formula.h"
#include "../core/number.h"
#include "level.h"
#include "surrogate.h"

namespace tether {

// What a weight sees of one token [nats]: constants all, the policy's own log-probability too.
template <class Number>
struct WeightToken {
  Number logp;          // log pi_theta(token | prefix)
  Number old_logp;      // under the policy at the start of the optimizer step
  Number ref_logp;      // under the reference policy
  Number rollout_logp;  // under the engine that sampled the token, by its own arithmetic
  Number advantage;     // A
};

// Where a weight takes its statistic: at the token alone, or over the active tokens of its row or
// of its turn (rl/level.h).
enum class WeightLevel {
  token,
  sequence_mean,
  sequence_sum,
  sequence_min,
  sequence_max,
  turn_mean,
  turn_sum,
  turn_min,
  turn_max
};

enum class Reduction : uint8_t { sum, mean, min, max };

struct WeightLevelRule {
  std::string_view name;
  Segment segment;
  Reduction reduction;
};

inline constexpr std::array kWeightLevelRules{
    WeightLevelRule{"token", Segment::token, Reduction::sum},
    WeightLevelRule{"sequence_mean", Segment::row, Reduction::mean},
    WeightLevelRule{"sequence_sum", Segment::row, Reduction::sum},
    WeightLevelRule{"sequence_min", Segment::row, Reduction::min},
    WeightLevelRule{"sequence_max", Segment::row, Reduction::max},
    WeightLevelRule{"turn_mean", Segment::turn, Reduction::mean},
    WeightLevelRule{"turn_sum", Segment::turn, Reduction::sum},
    WeightLevelRule{"turn_min", Segment::turn, Reduction::min},
    WeightLevelRule{"turn_max", Segment::turn, Reduction::max},
};

constexpr const WeightLevelRule& rule_of(WeightLevel level) {
  return kWeightLevelRules[static_cast<size_t>(level)];
}

// The same quantity of many tokens side by side; `size` is a multiple of 16.
template <class T>
struct WeightColumns {
  const T* logp;
  const T* old_logp;
  const T* ref_logp;
  const T* rollout_logp;
  const T* advantage;
  int size;

  TETHER_INLINE WeightToken<Constant<T>> at(int i) const {
    return {{logp[i]}, {old_logp[i]}, {ref_logp[i]}, {rollout_logp[i]}, {advantage[i]}};
  }
};

template <class Formula>
concept TokenWeightFormula =
    SmallFormula<Formula> &&
    requires(const Formula formula, const WeightToken<Constant<double>> token) {
      { formula.measure(token) } -> std::convertible_to<Constant<double>>;
      { formula(token, formula.measure(token)) } -> std::convertible_to<Constant<double>>;
    };

// The measure of a token with a NaN or infinity is NaN, although its formula may hide it.
template <class Formula, class T>
TETHER_HEADER_CLONES void fill_measures(const Formula& formula_in, const WeightColumns<T>& in_place,
                                        T* measure) {
  const Formula formula = formula_in;
  const WeightColumns<T> in = in_place;
  const int size = in.size / 16 * 16;
#pragma GCC ivdep
  for (int i = 0; i < size; ++i) {  // VECTOR
    constexpr Traits kReads = detail::traits_of<Formula>();
    T seen = in.old_logp[i] + in.advantage[i];
    if constexpr (kReads.reads_policy) seen += in.logp[i];
    if constexpr (kReads.needs_ref_logps) seen += in.ref_logp[i];
    if constexpr (kReads.needs_rollout_logps) seen += in.rollout_logp[i];
    measure[i] = formula.measure(in.at(i)).value + seen * T(0);
  }
}

// Likewise the weight of such a statistic.
template <class Formula, class T>
TETHER_HEADER_CLONES void multiply_by_weights(const Formula& formula_in,
                                              const WeightColumns<T>& in_place, const T* statistic,
                                              T* weight) {
  const Formula formula = formula_in;
  const WeightColumns<T> in = in_place;
  const int size = in.size / 16 * 16;
#pragma GCC ivdep
  for (int i = 0; i < size; ++i) {  // VECTOR
    const T own = formula(in.at(i), Constant<T>{statistic[i]}).value;
    weight[i] *= own + statistic[i] * T(0);
  }
}

namespace detail {

template <class T>
struct WeightLoops {
  void (*measure)(const void*, const WeightColumns<T>&, T*);
  void (*multiply)(const void*, const WeightColumns<T>&, const T*, T*);

  template <class Formula>
  static constexpr WeightLoops of() {
    return {&measure_erased<Formula>, &multiply_erased<Formula>};
  }
  template <class Formula>
  static void measure_erased(const void* formula, const WeightColumns<T>& in, T* measure) {
    fill_measures(*static_cast<const Formula*>(formula), in, measure);
  }
  template <class Formula>
  static void multiply_erased(const void* formula, const WeightColumns<T>& in, const T* statistic,
                              T* weight) {
    multiply_by_weights(*static_cast<const Formula*>(formula), in, statistic, weight);
  }
};

template <class Formula>
constexpr WeightLevel level_of() {
  if constexpr (requires { Formula::level; }) {
    return Formula::level;
  } else {
    return WeightLevel::token;
  }
}

struct WeightCalls {
  WeightLoops<float> in_float;
  WeightLoops<double> in_double;
  RatioInterval (*truncation)(const void*);
  WeightLevel level;

  template <class Formula>
  static constexpr WeightCalls of() {
    return {WeightLoops<float>::of<Formula>(), WeightLoops<double>::of<Formula>(),
            &truncation_of<Formula>, level_of<Formula>()};
  }
};

}  // namespace detail

// Any formula of one token's weight, as a value: an option struct with
//   template <class Number>
//   TETHER_FORMULA Number measure(const WeightToken<Number>&) const
//   template <class Number>
//   TETHER_FORMULA Number operator()(const WeightToken<Number>&, const Number& statistic) const
// and, if it has options, fields(); if it is meant for another level than the token's,
//   static constexpr WeightLevel level
// The measures of a level are reduced to the statistic. Beside
// old_logp and advantage a formula sees what it says in its traits: reads_policy (logp),
// needs_ref_logps, needs_rollout_logps. Else the loss is NaN. With by_sign in its traits a weight
// of rows is found once for each sign of A and not for each token.
class WeightFormula : public AnyFormula<detail::WeightCalls> {
 public:
  template <TokenWeightFormula Formula>
  WeightFormula(const Formula& formula) : AnyFormula(formula) {
    constexpr Traits kTraits = detail::traits_of<Formula>();
    static_assert(!kTraits.leaves || !kTraits.reads_policy,
                  "the tokens of a step must be known before its policy is");
  }

  // Where it truncates a ratio, as Surrogate has it.
  RatioInterval truncation() const { return calls().truncation(formula()); }
  // The level that it is meant for.
  WeightLevel level() const { return calls().level; }

  template <class T>
  void measure(const WeightColumns<T>& in, T* out) const {
    loops<T>().measure(formula(), in, out);
  }
  template <class T>
  void multiply(const WeightColumns<T>& in, const T* statistic, T* weight) const {
    loops<T>().multiply(formula(), in, statistic, weight);
  }

 private:
  template <class T>
  const detail::WeightLoops<T>& loops() const {
    if constexpr (std::is_same_v<T, float>) {
      return calls().in_float;
    } else {
      return calls().in_double;
    }
  }
};

// A weight W of the tokens under the surrogate, never differentiated: W S in place of S, in value
// and gradient. Penalty, entropies, clip fractions and denominators do not see it.
//
// One that leaves (by the traits of its formula) changes the mask instead, before everything: what
// it takes out is seen by nothing and counted by nothing.
struct TokenWeight {
  WeightFormula formula;
  WeightLevel level;

  TokenWeight(const WeightFormula& of) : formula(of), level(of.level()) {}
  TokenWeight(const WeightFormula& of, WeightLevel at) : formula(of), level(at) {}
};

// Those of one objective; their product counts.
inline constexpr size_t kMaxWeights = 8;

inline bool any_of_turns(const std::vector<TokenWeight>& weights) {
  bool out = false;
  for (const TokenWeight& weight : weights) {
    out |= rule_of(weight.level).segment == Segment::turn;
  }
  return out;
}

// Those that leave, or the others.
inline std::vector<TokenWeight> weights_that(bool leave, const std::vector<TokenWeight>& weights) {
  std::vector<TokenWeight> out;
  for (const TokenWeight& weight : weights) {
    if (weight.formula.traits().leaves == leave) out.push_back(weight);
  }
  return out;
}

}  // namespace tether
