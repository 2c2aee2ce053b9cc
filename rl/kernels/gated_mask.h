#pragma once

#include <string_view>
#include <vector>

#include "../../core/parallel.h"
#include "../policy_objective.h"
#include "arrays.h"

namespace tether {

// The mask of a batch without the tokens that weights of the objective take out; where none do, the
// batch's own. Throws where such a weight is NaN under the mask; the message begins with
// `function`.
class GatedMask {
 public:
  GatedMask() = default;
  GatedMask(std::string_view function, const PolicyArrays& batch, const PolicyObjective& objective,
            const Executor& executor);

  // The batch under the mask, which must live as long.
  PolicyArrays applied_to(const PolicyArrays& batch) const;

 private:
  template <class T>
  void fill(std::string_view function, const PolicyArrays& batch,
            const std::vector<TokenWeight>& gates, const Executor& executor, std::vector<T>& mask);

  std::vector<float> floats_;
  std::vector<double> doubles_;
};

}  // namespace tether
