#pragma once

#include <array>
#include <concepts>
#include <optional>
#include <string>
#include <string_view>

#include "../core/formula.h"
#include "../core/number.h"
#include "../core/options.h"
#include "link_catalogue.h"

namespace tether {

// The scores of a pair of answers to one prompt, after the link, and the strength of the reference.
template <class Number>
struct Pair {
  Number chosen;
  Number rejected;
  double beta;

  // The implicit reward of the chosen answer above the rejected one's. A margin or a beta beyond
  // its bound counts as this, with the derivative there: no product with a score is 0 times
  // infinity.
  TETHER_FORMULA Number margin() const {
    constexpr double kLargest = 1e300, kLargestBeta = 1e280;
    const Number margin = (chosen - rejected) * (beta < kLargestBeta ? beta : kLargestBeta);
    return with_gradient_of(clamp(margin, -kLargest, kLargest), margin);
  }
};

// Score of an answer from its tokens, S = sum_t w_t (logp_t - ref_logp_t), w the response mask:
// the log-ratio of the answer, or its mean over the answer's tokens. Without a reference, of logp.
enum class PairScore { sum, mean };
inline constexpr std::array<std::string_view, 2> kPairScoreNames{"sum", "mean"};

template <class Formula>
concept PairFormula =
    SmallFormula<Formula> && requires(const Formula formula, const Pair<Dual<double, 2>> pair) {
      { formula(pair) } -> std::convertible_to<Dual<double, 2>>;
    };

namespace detail {

struct PairCalls {
  Dual<double, 2> (*evaluate)(const void*, const Pair<Dual<double, 2>>&);

  template <class Formula>
  static constexpr PairCalls of() {
    const auto evaluate = [](const void* formula, const Pair<Dual<double, 2>>& pair) {
      return Dual<double, 2>{(*static_cast<const Formula*>(formula))(pair)};
    };
    return PairCalls{evaluate};  // nvcc takes bare braces around one member for the member
  }
};

}  // namespace detail

// Any formula of one pair's loss, as a value: an option struct with
//   template <class Number>
//   TETHER_FORMULA Number operator()(const Pair<Number>&) const
// and, if it has options, fields().
class PairLoss : public AnyFormula<detail::PairCalls> {
 public:
  template <PairFormula Formula>
  PairLoss(const Formula& formula) : AnyFormula(formula) {}

  // Value, and derivatives by the scores of the chosen and the rejected answer.
  Dual<double, 2> operator()(const Pair<Dual<double, 2>>& pair) const {
    return calls().evaluate(formula(), pair);
  }
};

// A preference objective is a product:
//
//   loss = mean over pairs of phi(g(S_chosen), g(S_rejected); beta)
//
// A plain value; presets (rl/preference/dpo.h, ...) are functions that return one, to be changed at
// will.
struct PreferenceObjective {
  PairScore score = PairScore::sum;
  bool reference = true;  // S is relative to the reference, which is then needed
  Link link = ReverseKl{};
  double beta = 0.1;
  PairLoss loss;
};

// visit(name, value, range) for every number of the objective, the formula's first; those of the
// link are called link_NAME.
template <SameBut<PreferenceObjective> Objective, class Visit>
void for_each_option(Objective& objective, Visit visit) {
  objective.loss.for_each_field(visit);
  visit("beta", objective.beta, Range{0, largest_finite, true});
  objective.link.for_each_field([&](std::string_view name, auto& value, const Range& range) {
    visit("link_" + std::string(name), value, range);
  });
}

// visit(name, value, names) for every choice of the objective.
template <SameBut<PreferenceObjective> Objective, class Visit>
void for_each_choice(Objective& objective, Visit visit) {
  visit("score", objective.score, kPairScoreNames);
  visit("reference", objective.reference, kBoolNames);
  visit("link", objective.link, kLinkNames);
}

inline void check_objective(std::string_view function, const PreferenceObjective& objective) {
  for_each_option(objective, [&](std::string_view name, double value, const Range& range) {
    check_range(function, name, value, range);
  });
}

// The denominator of an optimizer step, from the caller: the pairs of all its micro-batches and
// ranks, taken as stated. Absent: this batch. world_size and scale multiply the loss, not the
// metrics.
struct PairNormalizer {
  std::optional<double> pairs = {};
  double world_size = 1;
  double scale = 1;

  double factor() const { return world_size * scale; }
};

}  // namespace tether
