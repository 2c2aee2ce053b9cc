#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <span>
#include <string_view>
#include <vector>

#include "case.h"
#include "traits.h"

// A loss under test, of any family: what its batches are made of, and how to call it.

namespace tether::testing {

class Probe;
struct Observed;
struct Property;

// A batch of any family as tensors.
struct Tensors {
  std::vector<at::Tensor> arrays;
  at::Tensor response_mask;
  at::Tensor offsets = {};
};

inline constexpr size_t kNoArray = static_cast<size_t>(-1);

struct Family {
  std::string_view batch;                // its type in the library
  std::vector<std::string_view> arrays;  // names; the first has the gradient
  // The array whose plainest values are 1 and -1, not those of the first: it is the last, or none.
  size_t free_array;
  size_t id_array;  // names, not numbers; or none
  Case (*simplest)();
  Case (*drawn)(Random& random, const LossTraits& traits, int64_t items, int64_t columns);
  // More cases: around the bounds of a clip range, and far beyond any.
  std::vector<Case> (*bounds)(const ClipRange& clip);
  std::vector<Case> (*runaways)();
  // A bound for the magnitude of the terms, in the loss and in each slot of the gradient.
  Observed (*magnitude)(const Probe& probe, const Case& batch, const Normalizer& step);
  std::span<const Property> (*properties)();
};

using Loss = std::function<Result(const Tensors& batch, const Normalizer& step)>;

struct Subject {
  const Family& family;
  const LossTraits& traits;
  Loss loss;
  Loss reference = {};
  std::function<Normalizer(const Tensors&)> counts = {};
};

Report check(const Subject& subject, const CheckOptions& options);

// The indices of the arrays of each family.
namespace policy {
inline constexpr size_t kLogps = 0, kOldLogps = 1, kRefLogps = 2, kRolloutLogps = 3, kTurnIds = 4,
                        kAdvantages = 5;
}
namespace preference {
inline constexpr size_t kLogps = 0, kRefLogps = 1, kBaselines = 2, kWeights = 3, kLabels = 4;
}
namespace value {
inline constexpr size_t kValues = 0, kOldValues = 1, kReturns = 2;
}

}  // namespace tether::testing
