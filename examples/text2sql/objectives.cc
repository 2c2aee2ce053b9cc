#include "examples/text2sql/objectives.h"

#include <algorithm>
#include <variant>

namespace text2sql {
namespace {

bool is_preference(std::string_view name) {
  return std::any_of(tether::kPreferenceCatalogue.begin(), tether::kPreferenceCatalogue.end(),
                     [&](const auto& row) { return row.name == name; });
}

const tether::CatalogueRow& policy_row(std::string_view name) {
  return *std::find_if(tether::kCatalogue.begin(), tether::kCatalogue.end(),
                       [&](const auto& row) { return row.name == name; });
}

}  // namespace

std::vector<std::string> objective_names() {
  std::vector<std::string> out;
  for (const auto& row : tether::kCatalogue) out.emplace_back(row.name);
  for (const auto& row : tether::kPreferenceCatalogue) {  // of pairs: labels are not made here
    if (!row.preset().loss.takes_labels()) out.emplace_back(row.name);
  }
  return out;
}

std::vector<std::string> weight_names() {
  std::vector<std::string> out{"none"};
  tether::for_each_weight([&](const auto& row) {
    const bool alone = !tether::weight_formula(row.name).traits().needs_ref_logps;
    if (alone) out.emplace_back(row.name);
  });
  return out;
}

bool Objective::has_rollout() const {
  return std::any_of(policy.weights.begin(), policy.weights.end(), [](const auto& weight) {
    return weight.formula.traits().needs_rollout_logps;
  });
}

Objective objective_of(std::string_view name, std::string_view weight, double beta,
                       int64_t max_tokens) {
  if (is_preference(name)) {
    Objective out{.preference = tether::preference_preset("text2sql", name)};
    if (beta > 0) out.preference->beta = beta;
    return out;
  }
  Objective out{.policy = tether::preset("text2sql", name)};
  if (weight != "none") {
    out.policy = tether::weighed(out.policy, tether::weight_formula(weight));
  }
  const tether::Advantages& advantages = policy_row(name).advantages;
  out.critic = std::holds_alternative<tether::Gae>(advantages);
  if (!out.critic) out.advantage = std::get<tether::GroupAdvantage>(advantages);
  out.policy.kl.beta = beta;
  out.policy.aggregation.constant = static_cast<double>(max_tokens);
  return out;
}

}  // namespace text2sql
