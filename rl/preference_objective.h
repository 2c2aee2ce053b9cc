#pragma once

#include <array>
#include <optional>
#include <string>
#include <string_view>

#include "../core/options.h"
#include "link_catalogue.h"
#include "preference_formula.h"

namespace tether {

// Score of an answer from its tokens, S = sum_t w_t (logp_t - ref_logp_t), w the response mask:
// the log-ratio of the answer, or its mean over the answer's tokens. Without a reference, of logp.
// With ld_alpha below 1 the tokens of a pair's longer answer weigh ld_alpha w from where the
// shorter one ends: LD-DPO, arXiv:2409.06411. A mean is over all of them in any case.
enum class PairScore { sum, mean };
inline constexpr std::array<std::string_view, 2> kPairScoreNames{"sum", "mean"};

// The mean of -logp over the chosen answers, beside the loss of the examples: over their tokens, or
// over the pairs (answers with labels), of each chosen answer's mean or sum.
enum class NllMean { token, sequence_mean, sequence_sum };
inline constexpr std::array<std::string_view, 3> kNllMeanNames{"token", "sequence_mean",
                                                               "sequence_sum"};

struct Nll {
  double coefficient = 0;  // 0: none
  NllMean mean = NllMean::token;
};

// A preference objective is a product:
//
//   loss = loss_weight mean_i v_i phi(g(S_chosen), g(S_rejected); beta) + nll_coef NLL
//
// over the pairs i, or phi(g(S); label, beta) over answers with labels. v are the weights of the
// answers, a pair's the product of its two.
//
// A plain value; presets (rl/preference/dpo.h, ...) are functions that return one, to be changed at
// will.
struct PreferenceObjective {
  PairScore score = PairScore::sum;
  bool reference = true;  // S is relative to the reference, which is then needed
  double ld_alpha = 1;
  Link link = ReverseKl{};
  double beta = 0.1;
  PreferenceFormula loss;
  double loss_weight = 1;
  Nll nll = {};
};

// visit(name, value, range) for every number of the objective, the formula's first; those of the
// link are called link_NAME.
template <SameBut<PreferenceObjective> Objective, class Visit>
void for_each_option(Objective& objective, Visit visit) {
  objective.loss.for_each_field(visit);
  visit("beta", objective.beta, Range{0, largest_option, true});
  visit("loss_weight", objective.loss_weight, Range{0, largest_option});
  visit("nll_coef", objective.nll.coefficient, Range{0, largest_option});
  visit("ld_alpha", objective.ld_alpha, Range{0, 1});
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
  visit("nll_mean", objective.nll.mean, kNllMeanNames);
}

inline void check_objective(std::string_view function, const PreferenceObjective& objective) {
  for_each_option(objective, [&](std::string_view name, double value, const Range& range) {
    check_range(function, name, value, range);
  });
}

// The denominators of an optimizer step, from the caller: of all its micro-batches and ranks, taken
// as stated. Absent: of this batch. world_size and scale multiply the loss, not the metrics.
struct PairNormalizer {
  std::optional<double> pairs = {};   // or answers with labels
  std::optional<double> tokens = {};  // of the NLL, by weight
  double world_size = 1;
  double scale = 1;

  double factor() const { return world_size * scale; }
};

}  // namespace tether
