#pragma once

#include "rl/policy_objective.h"

namespace tether::bench {

// PPO with a surrogate of the user's own, compiled with the user's own options (-O2).
PolicyObjective user_objective();

}  // namespace tether::bench
