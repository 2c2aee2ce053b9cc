#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "libtorch/tether.h"

namespace text2sql {

// What RL follows: a policy objective with the advantages that belong to it (of groups, or of a
// value head), or a preference objective on the best and the worst sample of each group.
struct Objective {
  tether::PolicyObjective policy = tether::presets::grpo(0);
  tether::GroupAdvantage advantage = {};
  std::optional<tether::PreferenceObjective> preference = {};
  bool critic = false;        // advantages from a value head, which is trained along
  double value_weight = 0.1;  // of its loss
  double lambda = 0.95;       // of generalized advantage estimation

  // Whether the model after SFT is a reference of the loss.
  bool has_reference() const { return preference || policy.kl.beta > 0; }
  // Whether it compares with the policy that sampled.
  bool has_rollout() const;
};

// Every name of the library's catalogue.
std::vector<std::string> objective_names();

// Weights of tokens that need no reference, by their names.
std::vector<std::string> weight_names();

// The objective called `name`. `beta` is the weight of the KL penalty; 0 is none, for a preference
// objective its default. `max_tokens` is Dr. GRPO's constant. A policy objective gets the weight of
// tokens called `weight`, if it is not "none".
Objective objective_of(std::string_view name, std::string_view weight = "none", double beta = 0,
                       int64_t max_tokens = 1);

}  // namespace text2sql
