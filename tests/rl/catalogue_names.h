#pragma once

#include <string>

namespace tether {

// "ppo, ppo_dual_clip, ...": the names of a catalogue, as messages list them.
template <class Rows>
std::string names_of(const Rows& rows) {
  std::string out;
  for (const auto& row : rows) out += (out.empty() ? "" : ", ") + std::string(row.name);
  return out;
}

}  // namespace tether
