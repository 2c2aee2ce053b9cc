#include "examples/text2sql/objectives.h"

#include <algorithm>

namespace text2sql {
namespace {

bool is_preference(std::string_view name) {
  return std::any_of(tether::kPreferenceCatalogue.begin(), tether::kPreferenceCatalogue.end(),
                     [&](const auto& row) { return row.name == name; });
}

tether::GroupAdvantage advantage_of(std::string_view name) {
  using Baseline = tether::AdvantageBaseline;
  using Scale = tether::AdvantageScale;
  if (name == "rloo") return {.baseline = Baseline::leave_one_out, .scale = Scale::none};
  if (name == "dr_grpo") return {.scale = Scale::none};
  return {};
}

}  // namespace

std::vector<std::string> objective_names() {
  std::vector<std::string> out;
  for (const auto& row : tether::kCatalogue) out.emplace_back(row.name);
  for (const auto& row : tether::kPreferenceCatalogue) out.emplace_back(row.name);
  return out;
}

Objective objective_of(std::string_view name, double beta, int64_t max_tokens) {
  if (is_preference(name)) {
    Objective out{.preference = tether::preference_preset("text2sql", name)};
    if (beta > 0) out.preference->beta = beta;
    return out;
  }
  Objective out{.policy = tether::preset("text2sql", name),
                .advantage = advantage_of(name),
                .critic = name == "ppo" || name == "ppo_dual_clip"};
  out.policy.kl.beta = beta;
  out.policy.aggregation.constant = static_cast<double>(max_tokens);
  return out;
}

}  // namespace text2sql
