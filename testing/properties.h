#pragma once

#include <functional>
#include <span>
#include <string_view>

#include "probe.h"

namespace tether::testing {

// The batches that a property is tried on.
enum class Batches { small, shaped, bounds, runaways, large };

struct Property {
  std::string_view id;
  std::string_view statement;
  Batches batches;
  // Why the traits exclude it; empty if they do not.
  std::string_view (*excluded)(const Subject&);
  // Holds for any batch, so that a failing one can be made smaller.
  Failure (*check)(const Probe&, const Case&);
};

inline std::string_view never(const Subject&) { return {}; }

inline std::string_view needs_pull(const Subject& subject) {
  if (!subject.traits.pulls_back) return "the loss does not promise it for each token";
  return subject.traits.survives_runaways ? ""
                                          : "the loss promises nothing for a token that ran away";
}
inline std::string_view needs_clip(const Subject& subject) {
  return subject.traits.clip ? "" : "the loss does not clip";
}

// Of losses of every family. Where and how the numbers lie in memory must not matter.
std::span<const Property> memory_properties();
// Denominators: micro-batches, ranks, empty masks, weights.
std::span<const Property> aggregation_properties();
// The gradient as a derivative, and the range of numbers.
std::span<const Property> gradient_properties();

// The formula of a family.
std::span<const Property> policy_properties();
std::span<const Property> preference_properties();
std::span<const Property> value_properties();

// The smallest batch found, by greedy steps, for which `fails` is still true.
Case shrunk(const Family& family, Case batch, const std::function<bool(const Case&)>& fails);

}  // namespace tether::testing
