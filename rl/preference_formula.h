#pragma once

#include <array>
#include <concepts>
#include <string_view>

#include "../core/formula.h"
#include "../core/number.h"

namespace tether {

// An answer as the formula of a preference loss sees it.
template <class Number>
struct Answer {
  Number score;                 // g(S): after the link
  Number unlinked;              // S
  ConstantOf<Number> baseline;  // what the score is compared with; 0 where the batch has none
  ConstantOf<Number> length;    // its tokens, by weight
};

namespace detail {

// beta x. One beyond its bound counts as this, with the derivative there.
template <class Number>
TETHER_INLINE Number scaled_reward(const Number& x, double beta) {
  constexpr double kLargest = 1e300;
  const Number reward = x * beta;
  return with_gradient_of(clamp(reward, -kLargest, kLargest), reward);
}

}  // namespace detail

// Two answers to one prompt, and the strength of the reference.
template <class Number>
struct Pair {
  Answer<Number> chosen;
  Answer<Number> rejected;
  double beta;

  // The score of the chosen answer above the rejected one's, each above its baseline.
  TETHER_FORMULA Number gap() const {
    return (chosen.score - chosen.baseline) - (rejected.score - rejected.baseline);
  }
  // The implicit reward of the chosen answer above the rejected one's: beta gap.
  TETHER_FORMULA Number margin() const { return detail::scaled_reward(gap(), beta); }
  // That of one of them alone, above its baseline.
  TETHER_FORMULA Number reward_of(const Answer<Number>& answer) const {
    return detail::scaled_reward(answer.score - answer.baseline, beta);
  }
};

// One answer alone, and whether it is a good one.
template <class Number>
struct LabelledAnswer : Answer<Number> {
  ConstantOf<Number> label;  // 1: desirable, 0: undesirable
  double beta;

  // Its implicit reward above the baseline.
  TETHER_FORMULA Number reward() const {
    return detail::scaled_reward(this->score - this->baseline, beta);
  }
};

// What a preference loss is computed from: a pair, or its chosen answer alone with a label.
template <class Number>
struct Example {
  Pair<Number> pair;
  ConstantOf<Number> label;
};

template <class Formula>
concept PairFormula =
    SmallFormula<Formula> && requires(const Formula formula, const Pair<Dual<double, 2>> pair) {
      { formula(pair) } -> std::convertible_to<Dual<double, 2>>;
    };

template <class Formula>
concept LabelledFormula =
    SmallFormula<Formula> &&
    requires(const Formula formula, const LabelledAnswer<Dual<double, 2>> answer) {
      { formula(answer) } -> std::convertible_to<Dual<double, 2>>;
    };

template <class Formula>
concept ExampleFormula = PairFormula<Formula> || LabelledFormula<Formula>;

namespace detail {

template <class Formula, class Number>
TETHER_INLINE Number loss_of(const Formula& formula, const Example<Number>& example) {
  if constexpr (LabelledFormula<Formula>) {
    return formula(LabelledAnswer<Number>{{example.pair.chosen}, example.label, example.pair.beta});
  } else {
    return formula(example.pair);
  }
}

struct PreferenceCalls {
  bool takes_labels;
  Dual<double, 2> (*evaluate)(const void*, const Example<Dual<double, 2>>&);

  template <class Formula>
  static constexpr PreferenceCalls of() {
    const auto evaluate = [](const void* formula, const Example<Dual<double, 2>>& example) {
      return Dual<double, 2>{loss_of(*static_cast<const Formula*>(formula), example)};
    };
    return {LabelledFormula<Formula>, evaluate};
  }
};

}  // namespace detail

// Any formula of a preference loss, as a value: an option struct with one of
//   template <class Number>
//   TETHER_FORMULA Number operator()(const Pair<Number>&) const
//   TETHER_FORMULA Number operator()(const LabelledAnswer<Number>&) const
// and, if it has options, fields().
class PreferenceFormula : public AnyFormula<detail::PreferenceCalls> {
 public:
  template <ExampleFormula Formula>
  PreferenceFormula(const Formula& formula) : AnyFormula(formula) {}

  // Whether it is of single answers with labels.
  bool takes_labels() const { return calls().takes_labels; }

  // Value, and derivatives by the scores of the chosen and the rejected answer.
  Dual<double, 2> operator()(const Example<Dual<double, 2>>& example) const {
    return calls().evaluate(formula(), example);
  }
  Dual<double, 2> operator()(const Pair<Dual<double, 2>>& pair) const {
    return (*this)(Example<Dual<double, 2>>{pair, {0}});
  }
};

}  // namespace tether
