#pragma once

#include <array>
#include <string>
#include <string_view>
#include <tuple>
#include <variant>

#include "../estimators/advantage/gae.h"
#include "../estimators/advantage/group.h"
#include "critic/huber.h"
#include "policy/band.h"
#include "policy/bnpo.h"
#include "policy/cfpo.h"
#include "policy/cispo.h"
#include "policy/dapo.h"
#include "policy/decoupled_ppo.h"
#include "policy/dppo.h"
#include "policy/dr_grpo.h"
#include "policy/dro.h"
#include "policy/gmpo.h"
#include "policy/gpg.h"
#include "policy/grpo.h"
#include "policy/gspo.h"
#include "policy/kl_cov.h"
#include "policy/linear.h"
#include "policy/luspo.h"
#include "policy/ppo.h"
#include "policy/rec.h"
#include "policy/reinforce.h"
#include "policy/rloo.h"
#include "policy/rollout_is.h"
#include "policy/sapo.h"
#include "policy/sppo.h"
#include "policy/topr.h"
#include "policy/vespo.h"
#include "policy_objective.h"
#include "preference/apo.h"
#include "preference/bco.h"
#include "preference/discopop.h"
#include "preference/dpo.h"
#include "preference/exo.h"
#include "preference/hinge.h"
#include "preference/ipo.h"
#include "preference/kto.h"
#include "preference/nca.h"
#include "preference/orpo.h"
#include "preference/robust.h"
#include "preference/sppo_pair.h"
#include "preference_objective.h"

namespace tether {

// One objective of the library: what the README table, the Python names, the benchmark and the
// property tests are made from.
template <class Objective>
struct ObjectiveRow {
  std::string_view name;
  std::string_view formula;
  std::string_view paper;
  std::string_view header;
  // Who computes the same, value and gradient, in the tests: mpmath
  // (tests/golden/*_golden.json) and the recordings of peers' own functions
  // (tests/golden/peers), to 1e-12; those of float32 to 1e-6.
  std::string_view agreement;
  Objective (*preset)();
};

// The advantages that belong to a policy objective: its paper's or, where that leaves them open,
// the field's.
using Advantages = std::variant<GroupAdvantage, Gae>;

struct CatalogueRow : ObjectiveRow<PolicyObjective> {
  Advantages advantages;
};
using PreferenceRow = ObjectiveRow<PreferenceObjective>;
using ValueRow = ObjectiveRow<ValueObjective>;

// The only lists of objectives in the project: one line each.
inline const std::array kCatalogue{
    CatalogueRow{"ppo",
                 "token mean of -min(ratio A, clip(ratio, 1 - epsilon_low, 1 + epsilon_high) A)",
                 "arXiv:1707.06347, eq. 7", "rl/policy/ppo.h",
                 "mpmath; TRL bnpo; OpenRLHF ppo; AReaL ppo; torchrl grpo",
                 [] { return presets::ppo(); }, Gae{}},
    CatalogueRow{"ppo_dual_clip", "ppo; where A < 0 at most -dual_clip A, dual_clip 3",
                 "arXiv:1912.09729, eq. 5", "rl/policy/ppo.h",
                 "mpmath; TRL bnpo; verl vanilla; OpenRLHF ppo; Trinity ppo",
                 [] { return presets::ppo_dual_clip(); }, Gae{}},
    CatalogueRow{"grpo", "sequence mean, then batch mean of the clipped surrogate + beta k3",
                 "arXiv:2402.03300, eq. 3", "rl/policy/grpo.h",
                 "mpmath; TRL grpo; Liger grpo; ms-swift grpo; slime grpo",
                 [] { return presets::grpo(); }, GroupAdvantage{}},
    CatalogueRow{"dapo", "token mean of the clipped surrogate, epsilon_high 0.28",
                 "arXiv:2503.14476, eq. 10", "rl/policy/dapo.h",
                 "mpmath; TRL dapo; Liger dapo; open-instruct dapo", [] { return presets::dapo(); },
                 GroupAdvantage{}},
    CatalogueRow{"bnpo", "mean of the clipped surrogate over the tokens of the batch",
                 "TRL, loss_type bnpo", "rl/policy/bnpo.h",
                 "mpmath; TRL bnpo; Liger bnpo; ms-swift bnpo", [] { return presets::bnpo(); },
                 GroupAdvantage{}},
    CatalogueRow{"dr_grpo", "mean over answers of the clipped surrogate's sum over a constant",
                 "arXiv:2503.20783, section 3.2", "rl/policy/dr_grpo.h",
                 "mpmath; TRL dr_grpo; Liger dr_grpo; ms-swift dr_grpo",
                 [] { return presets::dr_grpo(); }, GroupAdvantage{.scale = AdvantageScale::none}},
    CatalogueRow{"gspo", "mean over answers of the clipped surrogate of exp(mean log-ratio)",
                 "arXiv:2507.18071, eq. 5", "rl/policy/gspo.h",
                 "mpmath; TRL grpo, sequence; OpenRLHF gspo; slime gspo; NeMo-RL gspo",
                 [] { return presets::gspo(); }, GroupAdvantage{}},
    CatalogueRow{"gspo_token", "gspo, with the gradient through each token's own log-ratio",
                 "arXiv:2507.18071, eq. 13", "rl/policy/gspo.h",
                 "mpmath; verl gspo; Trinity gspo; SkyRL gspo",
                 [] { return presets::gspo_token(); }, GroupAdvantage{}},
    CatalogueRow{"gmpo", "mean over answers of -exp(mean of clipped log-ratios) A",
                 "arXiv:2507.20673, eq. 4", "rl/policy/gmpo.h", "mpmath; verl geo_mean; TRL gmpo",
                 [] { return presets::gmpo(); }, GroupAdvantage{}},
    CatalogueRow{"cispo", "token mean of -sg(clip(ratio, ratio_low, ratio_high)) A logp",
                 "arXiv:2506.13585, eq. 4", "rl/policy/cispo.h",
                 "mpmath; TRL cispo; verl cispo; slime cispo; NeMo-RL cispo",
                 [] { return presets::cispo(); }, GroupAdvantage{}},
    CatalogueRow{"rloo", "mean over answers of the clipped surrogate of exp(sum of log-ratios)",
                 "arXiv:2402.14740, eq. 6", "rl/policy/rloo.h", "mpmath; TRL rloo",
                 [] { return presets::rloo(); },
                 GroupAdvantage{.baseline = AdvantageBaseline::leave_one_out,
                                .scale = AdvantageScale::none}},
    CatalogueRow{"reinforce", "token mean of -A logp", "Williams 1992, eq. 4",
                 "rl/policy/reinforce.h", "mpmath; verl reinforce; NeMo-RL reinforce; ROLL vanilla",
                 [] { return presets::reinforce(); }, GroupAdvantage{}},
    CatalogueRow{"sapo",
                 "sequence mean of -(4 / tau) sigmoid(tau (ratio - 1)) A, tau by the sign of A",
                 "arXiv:2511.20347, eq. 5", "rl/policy/sapo.h",
                 "mpmath; TRL sapo; verl sapo; Liger sapo; SkyRL sapo",
                 [] { return presets::sapo(); }, GroupAdvantage{}},
    CatalogueRow{"cfpo", "sequence mean of -ratio A + |A| (ratio - 1)^2 / (2 epsilon)",
                 "arXiv:2601.22801, eq. 7", "rl/policy/cfpo.h", "mpmath; UniRL spo",
                 [] { return presets::cfpo(); }, GroupAdvantage{}},
    CatalogueRow{"drpo", "token mean of -ratio A + |A| e^old_logp (ratio - 1)^2 / (2 epsilon)",
                 "arXiv:2606.09821, eq. 8", "rl/policy/cfpo.h", "mpmath; UniRL drpo",
                 [] { return presets::drpo(); }, GroupAdvantage{.scale = AdvantageScale::none}},
    CatalogueRow{"luspo", "mean over answers of their length times the loss of gspo",
                 "arXiv:2602.05261, eq. 7", "rl/policy/luspo.h",
                 "mpmath; TRL luspo, sequence; Liger luspo", [] { return presets::luspo(); },
                 GroupAdvantage{}},
    CatalogueRow{"gpg", "token mean of -A logp", "arXiv:2504.02546", "rl/policy/gpg.h",
                 "mpmath; verl gpg", [] { return presets::gpg(); },
                 GroupAdvantage{.scale = AdvantageScale::none}},
    CatalogueRow{"linear", "token mean of -ratio A", "arXiv:1707.06347, eq. 6",
                 "rl/policy/linear.h", "mpmath; SkyRL importance_sampling; prime-rl default",
                 [] { return presets::linear(); }, Gae{}},
    CatalogueRow{"band", "token mean of -clip(ratio, 1 - epsilon_low, 1 + epsilon_high) A",
                 "torchrl, CISPOLoss", "rl/policy/band.h", "mpmath; torchrl cispo",
                 [] { return presets::band(); }, GroupAdvantage{}},
    CatalogueRow{"dro", "token mean of -(A logp - tau/2 u^2), u = logp - old_logp",
                 "arXiv:2405.19107, eq. 8", "rl/policy/dro.h", "mpmath; verl dro; ROLL kimi15",
                 [] { return presets::dro(); }, GroupAdvantage{}},
    CatalogueRow{"kimi", "mean over answers of -(A L - tau/2 U^2), L and U sums of logp and u",
                 "arXiv:2501.12599, eq. 3", "rl/policy/dro.h", "mpmath",
                 [] { return presets::kimi(); }, GroupAdvantage{.scale = AdvantageScale::none}},
    CatalogueRow{"sppo", "mean over answers of (U - eta A)^2, U the sum of logp - old_logp",
                 "arXiv:2405.00675, eq. 4.6", "rl/policy/sppo.h",
                 "mpmath; verl-recipe sppo; Liger sppo_hard", [] { return presets::sppo(); },
                 GroupAdvantage{.scale = AdvantageScale::none}},
    CatalogueRow{"a2po", "mean over answers of (scale U - A)^2, old_logps the reference's",
                 "arXiv:2505.20686", "rl/policy/sppo.h", "mpmath; TRL a2po",
                 [] { return presets::a2po(); }, GroupAdvantage{.scale = AdvantageScale::none}},
    CatalogueRow{"topr", "mean over answers of -A L, for A < 0 of -sg(min(ratio, ratio_high)) A L",
                 "arXiv:2503.14286", "rl/policy/topr.h",
                 "mpmath; ROLL topr, token; Trinity topr, token", [] { return presets::topr(); },
                 GroupAdvantage{}},
    CatalogueRow{"dppo_tv", "token mean of -M sg(min(ratio, ratio_high)) A logp, M of tv_mask",
                 "arXiv:2602.04879, eq. 12", "rl/policy/dppo.h", "mpmath; verl dppo_tv",
                 [] { return presets::dppo_tv(); }, GroupAdvantage{}},
    CatalogueRow{"dppo_kl", "token mean of -M sg(min(ratio, ratio_high)) A logp, M of kl_mask",
                 "arXiv:2602.04879, eq. 12", "rl/policy/dppo.h", "mpmath; verl dppo_kl",
                 [] { return presets::dppo_kl(); }, GroupAdvantage{}},
    CatalogueRow{"vespo", "token mean of -W A logp, W = rho^k e^(lambda (1 - rho)) of the answer",
                 "arXiv:2602.10693, eq. 20", "rl/policy/vespo.h", "mpmath; TRL vespo; Liger vespo",
                 [] { return presets::vespo(); }, GroupAdvantage{}},
    CatalogueRow{"decoupled_ppo", "ppo to a proximal policy, weighed by proximal / behaviour",
                 "arXiv:2110.00641", "rl/policy/decoupled_ppo.h",
                 "mpmath; AReaL decoupled, float32", [] { return presets::decoupled_ppo(); },
                 Gae{}},
    CatalogueRow{"rollout_is", "token mean of -W A logp, W of masked_ratio", "SkyRL, rollout_is",
                 "rl/policy/rollout_is.h", "mpmath; SkyRL rollout_is, float32",
                 [] { return presets::rollout_is(); }, GroupAdvantage{}},
    CatalogueRow{"kl_cov", "token mean of -ratio A + beta v |log ratio|, v of kl_weights",
                 "arXiv:2505.22617, eq. 14", "rl/policy/kl_cov.h", "mpmath; verl kl_cov",
                 [] { return presets::kl_cov(); }, GroupAdvantage{}},
    CatalogueRow{"rec_one_side", "token mean of -M A logp, M of clip_mask", "arXiv:2509.24203",
                 "rl/policy/rec.h", "mpmath; Trinity rec one-side",
                 [] { return presets::rec_one_side(); }, GroupAdvantage{}},
    CatalogueRow{"rec_two_side", "token mean of -A logp where the ratio is near 1",
                 "arXiv:2509.24203", "rl/policy/rec.h", "mpmath; Trinity rec two-side",
                 [] { return presets::rec_two_side(); }, GroupAdvantage{}},
    CatalogueRow{"rec_ring", "token mean of -M A logp, M of ring_mask", "arXiv:2509.24203",
                 "rl/policy/rec.h", "mpmath; Trinity rec ring", [] { return presets::rec_ring(); },
                 GroupAdvantage{}},
};

inline const std::array kPreferenceCatalogue{
    PreferenceRow{"dpo", "-log sigmoid(x), x = beta (log-ratio of chosen - of rejected)",
                  "arXiv:2305.18290, eq. 7", "rl/preference/dpo.h",
                  "mpmath; TRL sigmoid; OpenRLHF DPOLoss; Liger sigmoid",
                  [] { return presets::dpo(); }},
    PreferenceRow{"cdpo", "-log sigmoid(x) + label_smoothing x", "ericmitchell.ai/cdpo.pdf",
                  "rl/preference/dpo.h", "mpmath; TRL aot; OpenRLHF DPOLoss; TRL CPO sigmoid",
                  [] { return presets::cdpo(); }},
    PreferenceRow{"ipo", "(h - 1 / (2 beta))^2, h the gap of the mean log-ratios",
                  "arXiv:2310.12036, eq. 17", "rl/preference/ipo.h",
                  "mpmath; TRL ipo; OpenRLHF DPOLoss", [] { return presets::ipo(); }},
    PreferenceRow{"hinge", "max(0, 1 - x)", "arXiv:2309.06657, eq. 9", "rl/preference/hinge.h",
                  "mpmath; TRL hinge; Liger hinge", [] { return presets::hinge(); }},
    PreferenceRow{"robust", "-log sigmoid(x) - e / (1 - 2 e) x, e = label_smoothing",
                  "arXiv:2403.00409", "rl/preference/robust.h", "mpmath; TRL robust",
                  [] { return presets::robust(); }},
    PreferenceRow{"exo_pair", "KL(Bernoulli(sigmoid(x)) || Bernoulli(1 - label_smoothing))",
                  "arXiv:2402.00856, eq. 16", "rl/preference/exo.h",
                  "mpmath; TRL exo_pair, float32", [] { return presets::exo_pair(); }},
    PreferenceRow{"nca_pair",
                  "-log sigmoid(u_c) - 1/2 log sigmoid(-u_c) - 1/2 log sigmoid(-u_r), u = beta S",
                  "arXiv:2402.05369", "rl/preference/nca.h", "mpmath; TRL nca_pair",
                  [] { return presets::nca_pair(); }},
    PreferenceRow{"bco_pair", "-log sigmoid(u_c) - log sigmoid(-u_r)", "arXiv:2404.04656",
                  "rl/preference/bco.h", "mpmath; TRL bco_pair",
                  [] { return presets::bco_pair(); }},
    PreferenceRow{"sppo_hard", "(h_c - 1 / (2 beta))^2 + (h_r + 1 / (2 beta))^2",
                  "arXiv:2405.00675, eq. 4.7", "rl/preference/sppo_pair.h", "mpmath; TRL sppo_hard",
                  [] { return presets::sppo_hard(); }},
    PreferenceRow{"apo_zero", "1 - sigmoid(u_c) + sigmoid(u_r)", "arXiv:2408.06266, eq. 7",
                  "rl/preference/apo.h", "mpmath; TRL apo_zero",
                  [] { return presets::apo_zero(); }},
    PreferenceRow{"apo_down", "sigmoid(u_c) + 1 - sigmoid(x)", "arXiv:2408.06266, eq. 8",
                  "rl/preference/apo.h", "mpmath; TRL apo_down",
                  [] { return presets::apo_down(); }},
    PreferenceRow{"discopop", "(1 - m) -log sigmoid(x) + m e^-x, m = sigmoid(x / tau)",
                  "arXiv:2406.08414, eq. 5", "rl/preference/discopop.h", "mpmath; TRL discopop",
                  [] { return presets::discopop(); }},
    PreferenceRow{"orpo", "NLL of the chosen - loss_weight log sigmoid(x), x the gap of log-odds",
                  "arXiv:2403.07691, eq. 6", "rl/preference/orpo.h",
                  "mpmath; TRL orpo, float32; Liger orpo, float32", [] { return presets::orpo(); }},
    PreferenceRow{"kto", "1 - sigmoid(u), u = +-beta (S - baseline) by the label of the answer",
                  "arXiv:2402.01306, eq. 8", "rl/preference/kto.h", "mpmath; Liger kto",
                  [] { return presets::kto(); }},
};

inline const std::array kValueCatalogue{
    ValueRow{"clipped_squared", "1/2 max((V - R)^2, (clip(V, V_old -+ clip_range) - R)^2)",
             "OpenAI baselines, ppo2", "rl/critic/clipped_squared.h",
             "by cases; verl value_loss; OpenRLHF ValueLoss", [] { return ValueObjective{}; }},
    ValueRow{"huber", "1/2 e^2, beyond delta linear, e = V - R", "Huber 1964", "rl/critic/huber.h",
             "by hand", [] { return presets::huber(); }},
};

// The formula of every row, once: for faces that instantiate formulas themselves.
inline constexpr std::tuple kSurrogates{
    PpoClip{},  Reinforce{},     IsReinforce{},       SoftGate{},         LinearRatio{},
    BandClip{}, QuadraticPull{}, SquaredRegression{}, TaperedReinforce{}, QuadraticBound{}};

// visit(Formula{}) for each of them.
template <class Visit>
void for_each_surrogate(Visit visit) {
  std::apply([&](const auto&... each) { (visit(each), ...); }, kSurrogates);
}

inline constexpr std::tuple kPreferenceFormulas{
    LogisticPair{}, SquarePair{},    HingePair{}, RobustPair{}, ExoPair{},   NcaPair{},
    BcoPair{},      SquareAnswers{}, ApoZero{},   ApoDown{},    DiscoPair{}, KahnemanTversky{}};

// visit(Formula{}) for the formula of every preference row, once.
template <class Visit>
void for_each_preference_formula(Visit visit) {
  std::apply([&](const auto&... each) { (visit(each), ...); }, kPreferenceFormulas);
}

// visit(Formula{}) for the formula of every value row, once.
template <class Visit>
void for_each_value_formula(Visit visit) {
  visit(ClippedSquaredError{});
  visit(Huber{});
}

namespace detail {

template <class Rows>
auto preset_of(const Rows& rows, std::string_view function, std::string_view name) {
  std::string known;
  for (const auto& row : rows) {
    if (row.name == name) return row.preset();
    append(known, row.name);
  }
  throw_unknown(function, "objective", known, name);
}

}  // namespace detail

// The preset called `name`; an unknown name lists the known ones.
inline PolicyObjective preset(std::string_view function, std::string_view name) {
  return detail::preset_of(kCatalogue, function, name);
}
inline PreferenceObjective preference_preset(std::string_view function, std::string_view name) {
  return detail::preset_of(kPreferenceCatalogue, function, name);
}
inline ValueObjective value_preset(std::string_view function, std::string_view name) {
  return detail::preset_of(kValueCatalogue, function, name);
}

}  // namespace tether
