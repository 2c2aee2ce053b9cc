#pragma once

#include <array>
#include <charconv>
#include <span>
#include <string>
#include <string_view>

#include "catalogue.h"

namespace tether {

// A trainer's policy loss under the trainer's own name, with its defaults: a row of the catalogue
// and what differs from it, options and choices by name. What a trainer clamps for safety alone, a
// log-ratio at +-20, is not clamped (docs/peers.md says where the numbers then differ).
struct Setting {
  std::string_view name;   // of an option or choice; none: the end
  std::string_view value;  // a number, or one of the choice's names
};
struct Dialect {
  std::string_view name;
  std::string_view objective;
  std::array<Setting, 6> settings = {};
};

// The least ratio of verl, whose log-ratio is at least -20 where it is a weight.
inline constexpr std::string_view kVerlRatioLow = "2.061153622438558e-09";

// Of verl, whose penalty, where there is one, is low_var_kl.
constexpr Dialect of_verl(std::string_view name, std::string_view objective,
                          const std::array<Setting, 4>& own = {}) {
  Dialect out{name, objective};
  size_t count = 0;
  for (; count < own.size() && !own[count].name.empty(); ++count) out.settings[count] = own[count];
  out.settings[count++] = {"kl_estimator", "low_var_kl"};
  out.settings[count] = {"kl_gradient", "low_var_kl"};
  return out;
}

// One line each. Read from TRL 1.16.0, verl 0.9.1, OpenRLHF 0.11.2, torchrl 0.14.1 and the sources
// of slime, prime-rl, NeMo-RL, SkyRL and ROLL. Denominators are the caller's (Normalizer).
inline constexpr std::array kDialects{
    Dialect{"trl.grpo", "grpo"},
    Dialect{"trl.bnpo", "bnpo"},
    Dialect{"trl.dr_grpo", "dr_grpo"},
    Dialect{"trl.dapo", "dapo", {{{"epsilon_high", "0.2"}}}},
    Dialect{"trl.cispo", "cispo"},
    Dialect{"trl.sapo", "sapo"},
    Dialect{"trl.vespo", "vespo"},
    Dialect{"trl.luspo", "grpo", {{{"aggregation", "sequence_mean_token_sum"}}}},
    Dialect{"trl.rloo", "rloo"},
    Dialect{"trl.gmpo", "gmpo"},
    Dialect{"trl.a2po", "a2po"},
    of_verl("verl.vanilla", "ppo_dual_clip"),
    of_verl("verl.gspo", "gspo_token",
            {{{"epsilon_low", "0.2"}, {"epsilon_high", "0.2"}, {"aggregation", "token_mean"}}}),
    of_verl("verl.sapo", "sapo"),
    of_verl("verl.gpg", "gpg"),
    of_verl("verl.geo_mean", "gmpo", {{{"log_ratio_low", "0.2"}, {"log_ratio_high", "0.2"}}}),
    of_verl("verl.dro", "dro"),
    of_verl("verl.cispo", "cispo", {{{"ratio_low", "0.8"}, {"ratio_high", "1.2"}}}),
    of_verl("verl.dppo_tv", "dppo_tv", {{{"ratio_low", kVerlRatioLow}, {"ratio_high", "3"}}}),
    of_verl("verl.dppo_kl", "dppo_kl",
            {{{"ratio_low", kVerlRatioLow},
              {"ratio_high", "3"},
              {"kl_mask.low", "0.2"},
              {"kl_mask.high", "0.2"}}}),
    of_verl("verl.clip_cov", "ppo"),
    Dialect{"verl.kl_cov", "kl_cov", {{{"beta", "0.1"}}}},
    of_verl("verl.bypass_mode", "ppo_dual_clip"),
    Dialect{"openrlhf.ppo", "ppo"},
    Dialect{"openrlhf.gspo", "gspo", {{{"epsilon_low", "0.2"}, {"epsilon_high", "0.2"}}}},
    Dialect{"slime.grpo", "grpo"},
    Dialect{"slime.ppo", "grpo"},
    Dialect{"slime.reinforce_plus_plus", "grpo"},
    Dialect{"slime.reinforce_plus_plus_baseline", "grpo"},
    Dialect{"slime.gspo", "gspo", {{{"epsilon_low", "0.2"}, {"epsilon_high", "0.2"}}}},
    Dialect{"slime.cispo",
            "cispo",
            {{{"ratio_low", "0.8"},
              {"ratio_high", "1.2"},
              {"aggregation", "sequence_mean_token_mean"}}}},
    Dialect{"prime_rl.default",
            "linear",
            {{{"tv_mask", "token"},
              {"beta", "0.002"},
              {"kl_estimator", "k2"},
              {"kl_gradient", "k2"},
              {"kl_reference", "old"}}}},
    Dialect{"prime_rl.ipo",
            "linear",
            {{{"tv_band", "token"},
              {"beta", "0.002"},
              {"kl_estimator", "k2"},
              {"kl_gradient", "k2"},
              {"kl_reference", "old"}}}},
    Dialect{"nemo_rl.grpo", "ppo", {{{"beta", "0.01"}, {"kl_correction", "on_policy"}}}},
    Dialect{"nemo_rl.gspo", "gspo", {{{"epsilon_low", "0.2"}, {"epsilon_high", "0.2"}}}},
    Dialect{"nemo_rl.cispo", "cispo", {{{"ratio_low", "0.8"}, {"ratio_high", "1.2"}}}},
    Dialect{"nemo_rl.reinforce", "reinforce"},
    Dialect{"torchrl.clip_ppo", "ppo"},
    Dialect{"torchrl.ppo", "linear"},
    Dialect{"torchrl.a2c", "reinforce"},
    Dialect{"torchrl.reinforce", "reinforce"},
    Dialect{"torchrl.grpo", "ppo"},
    Dialect{"torchrl.cispo", "band"},
    Dialect{"skyrl.rollout_is",
            "rollout_is",
            {{{"masked_ratio.low", "0.8"}, {"masked_ratio.high", "1.2"}}}},
    Dialect{"roll.topr", "topr", {{{"level", "token"}, {"aggregation", "token_mean"}}}},
    Dialect{"roll.tis", "cispo", {{{"ratio_high", "1"}}}},
};

// Those of a dialect that are there.
constexpr std::span<const Setting> settings_of(const Dialect& dialect) {
  size_t count = 0;
  while (count < dialect.settings.size() && !dialect.settings[count].name.empty()) ++count;
  return {dialect.settings.data(), count};
}

// The objective of the dialect called `name`; an unknown name lists the known ones.
inline PolicyObjective dialect(std::string_view function, std::string_view name) {
  std::string known;
  for (const Dialect& each : kDialects) {
    detail::append(known, each.name);
    if (each.name != name) continue;
    PolicyObjective out = preset(function, each.objective);
    for (const Setting& setting : settings_of(each)) {
      double number = 0;
      const char* end = setting.value.data() + setting.value.size();
      const bool is_number = std::from_chars(setting.value.data(), end, number).ptr == end;
      is_number ? set_option(function, out, setting.name, number)
                : set_choice(function, out, setting.name, setting.value);
    }
    return out;
  }
  detail::throw_unknown(function, "dialect", known, name);
}

}  // namespace tether
