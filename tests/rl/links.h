#pragma once

#include <cstddef>

#include "rl/preference_objective.h"

namespace tether {

// The link of the catalogue at `index`, with a score that it takes.
inline void choose_link(PreferenceObjective& objective, size_t index) {
  choose(objective.link, index);
  if (!objective.link.traits().of_log_ratio) objective.reference = false;
}

}  // namespace tether
