#pragma once

#include <array>
#include <cstddef>
#include <string_view>
#include <tuple>
#include <vector>

#include "../core/catalogue.h"
#include "policy/chord.h"
#include "policy/clip_mask.h"
#include "policy/importance.h"
#include "policy/masked_ratio.h"
#include "policy/opsm.h"
#include "policy/rejection.h"
#include "policy/rlsd.h"
#include "policy/soft_sequence.h"
#include "policy/trust_region.h"
#include "token_weight.h"

namespace tether {

// The only list of weights in the project: one line each. A weight's name is among the choices of
// an objective, where it stands for the level, and before its options
// (`truncated_importance.high`).
inline constexpr std::tuple kWeightCatalogue{
    FormulaRow{"truncated_importance", TruncatedImportance{},
               "clamp(e^x, low, high), x = old_logp - rollout_logp",
               "doi:10.1198/106186008X320456, eq. 4", "rl/policy/importance.h",
               "mpmath; verl rollout_is; OpenRLHF tis; slime tis; NeMo-RL tis"},
    FormulaRow{"masked_importance", MaskedImportance{}, "e^x where low <= e^x <= high, else 0",
               "arXiv:2510.18855, eq. 2", "rl/policy/importance.h",
               "mpmath; verl rollout_is; OpenRLHF icepop; NeMo-RL icepop"},
    FormulaRow{"ratio_gate", RatioGate{}, "1 where low <= e^x <= high, else out of the mask",
               "verl, rollout_rs k1", "rl/policy/rejection.h",
               "mpmath; verl rollout_rs; ROLL ratio; SkyRL mask, float32"},
    FormulaRow{"tv_mask", TvMask{}, "1 where e^logp - e^old_logp <= high (A > 0), >= -low (A <= 0)",
               "arXiv:2602.04879, eq. 13", "rl/policy/trust_region.h",
               "mpmath; verl dppo_tv; prime-rl default"},
    FormulaRow{
        "kl_mask", KlMask{},
        "1 where KL(Bernoulli(e^old_logp) || Bernoulli(e^logp)) <= low or high by sign of A, "
        "or moving back",
        "arXiv:2602.04879, eq. 14", "rl/policy/trust_region.h",
        "mpmath; verl dppo_kl; SkyRL dppo, float32"},
    FormulaRow{"tv_band", TvBand{}, "1 where |e^logp - e^old_logp| <= high", "prime-rl, ipo",
               "rl/policy/trust_region.h", "mpmath; prime-rl ipo"},
    FormulaRow{"clip_mask", ClipMask{}, "1 where PPO's clip leaves a gradient", "arXiv:2509.24203",
               "rl/policy/clip_mask.h", "mpmath; Trinity rec one-side; ROLL cispo"},
    FormulaRow{"ring_mask", RingMask{}, "1 where the ratio is near 1, or far on the wrong side",
               "arXiv:2509.24203", "rl/policy/clip_mask.h", "mpmath; Trinity rec ring"},
    FormulaRow{"masked_ratio", MaskedRatio{}, "ratio where low <= ratio <= high, else 0",
               "SkyRL, rollout_is", "rl/policy/masked_ratio.h",
               "mpmath; SkyRL rollout_is, float32"},
    FormulaRow{"vespo", SoftSequenceWeight{}, "rho^k e^(lambda (1 - rho)), rho the answer's ratio",
               "arXiv:2602.10693, eq. 20", "rl/policy/soft_sequence.h",
               "mpmath; TRL vespo; Liger vespo"},
    FormulaRow{"opsm", OffPolicyMask{}, "0 where A < 0 and mean(old_logp - logp) > high, else 1",
               "arXiv:2512.02556", "rl/policy/opsm.h",
               "mpmath; slime opsm; ms-swift off-policy mask; Trinity ppo"},
    FormulaRow{"uncertainty", Uncertainty{}, "p (1 - p), p = e^logp", "arXiv:2508.11408",
               "rl/policy/chord.h", "mpmath; Trinity phi"},
    FormulaRow{"self_distillation", SelfDistillation{},
               "1 - mix + mix clip(e^(sign(A) x), 1 -+ epsilon), x = ref_logp - logp",
               "arXiv:2604.03128", "rl/policy/rlsd.h", "mpmath; ms-swift RLSD"},
    FormulaRow{"k2_gate", K2Gate{}, "1 where x^2 / 2 <= high, else out of the mask",
               "verl, rollout_rs k2", "rl/policy/rejection.h",
               "mpmath; verl rollout_rs; AReaL kl_k2, float32"},
    FormulaRow{"k3_gate", K3Gate{}, "1 where e^x - 1 - x <= high, else out of the mask",
               "verl, rollout_rs k3", "rl/policy/rejection.h", "mpmath; verl rollout_rs"},
    FormulaRow{"tv_gate", TvGate{},
               "1 where |e^old_logp - e^rollout_logp| <= high, else out of the mask",
               "ROLL, OpenRLHF", "rl/policy/rejection.h", "mpmath; OpenRLHF tv; ROLL diff"},
    FormulaRow{
        "binary_kl_gate", BinaryKlGate{},
        "1 where KL(Bernoulli(e^rollout_logp) || Bernoulli(e^old_logp)) <= high, else out of "
        "the mask",
        "OpenRLHF", "rl/policy/rejection.h", "mpmath; OpenRLHF binary_kl"},
    FormulaRow{"ratio_tv_gate", RatioTvGate{},
               "1 where mean |min(e^x, 2) - 1| <= high, else out of the mask",
               "after open-instruct", "rl/policy/rejection.h", "mpmath"},
};

// visit(row) for every weight.
template <class Visit>
constexpr void for_each_weight(Visit visit) {
  for_each_row(kWeightCatalogue, visit);
}

// That of the row called `name`, with its defaults. The loops of the library's weights are compiled
// with it.
WeightFormula weight_formula(std::string_view name);

// The choice of a weight: none, or the others in the order of WeightLevel.
inline constexpr auto kWeightChoiceNames = [] {
  std::array<std::string_view, kWeightLevelRules.size() + 1> out{"none"};
  for (size_t i = 0; i < kWeightLevelRules.size(); ++i) out[i + 1] = kWeightLevelRules[i].name;
  return out;
}();

// One row of the catalogue among the weights of an objective, as a choice (core/options.h).
template <class Weights, class Formula>
struct WeightChoice {
  Weights& weights;
  const FormulaRow<Formula>& row;

  auto find() const {
    auto each = weights.begin();
    while (each != weights.end() && each->formula.type() != typeid(Formula)) ++each;
    return each;
  }
};
template <class Formula>
void choose(const WeightChoice<std::vector<TokenWeight>, Formula>& choice, size_t index) {
  const auto found = choice.find();
  if (index == 0) {
    if (found != choice.weights.end()) choice.weights.erase(found);
    return;
  }
  const auto level = static_cast<WeightLevel>(index - 1);
  if (found != choice.weights.end()) {
    found->level = level;
  } else {
    choice.weights.push_back({weight_formula(choice.row.name), level});
  }
}
template <class Weights, class Formula>
size_t chosen(const WeightChoice<Weights, Formula>& choice) {
  const auto found = choice.find();
  return found == choice.weights.end() ? 0 : static_cast<size_t>(found->level) + 1;
}

// Of one weight; a user's own is called "weight".
inline std::string_view name_of(const TokenWeight& weight) {
  std::string_view out = "weight";
  for_each_weight([&]<class Formula>(const FormulaRow<Formula>& row) {
    if (weight.formula.type() == typeid(Formula)) out = row.name;
  });
  return out;
}

}  // namespace tether
