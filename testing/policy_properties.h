#pragma once

#include <span>

#include "policy_probe.h"

namespace tether::testing {

// The batches that a property is tried on.
enum class Batches { small, shaped, bounds, runaways, large };

struct Property {
  std::string_view id;
  std::string_view statement;
  Batches batches;
  // Why the traits exclude it; empty if they do not.
  std::string_view (*excluded)(const PolicyTraits&);
  // Holds for any batch, so that a failing one can be made smaller.
  Failure (*check)(const Probe&, const PolicyCase&);
};

inline std::string_view never(const PolicyTraits&) { return {}; }

// Where and how the numbers lie in memory must not matter.
std::span<const Property> memory_properties();
// Denominators: micro-batches, ranks, empty masks, weights.
std::span<const Property> aggregation_properties();
// The formula of one token and its gradient.
std::span<const Property> formula_properties();

// The smallest batch found, by greedy steps, for which `fails` is still true.
PolicyCase shrunk(PolicyCase batch, const std::function<bool(const PolicyCase&)>& fails);

}  // namespace tether::testing
