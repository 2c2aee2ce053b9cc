#pragma once

#include <random>
#include <vector>

#include "rl/kernels/policy_loss.h"

namespace tether {

template <class T>
constexpr DType dtype() {
  return sizeof(T) == 8 ? DType::float64 : DType::float32;
}

// A batch that owns its memory, padded [rows, columns].
template <class T>
struct Batch {
  int64_t rows, columns;
  std::vector<T> logps, old_logps, ref_logps, rollout_logps, advantages, mask, dlogps;
  std::vector<T> token_weights, kl_weights;  // empty: not given
  std::vector<int64_t> turn_ids;             // empty: not given

  Batch(int64_t b, int64_t t) : rows(b), columns(t) {
    for (auto* array :
         {&logps, &old_logps, &ref_logps, &rollout_logps, &advantages, &mask, &dlogps}) {
      array->assign(size_t(b * t), T(0));
    }
  }
  ConstArray view(const std::vector<T>& array) const {
    return {array.data(), dtype<T>(), columns, 1};
  }
  ConstArray given(const std::vector<T>& array) const {
    return array.empty() ? ConstArray{} : view(array);
  }
  PolicyArrays arrays() const {
    return {.layout = {.rows = rows, .columns = columns},
            .logps = view(logps),
            .advantages = view(advantages),
            .response_mask = view(mask),
            .old_logps = view(old_logps),
            .ref_logps = view(ref_logps),
            .rollout_logps = view(rollout_logps),
            .turn_ids = turn_ids.empty() ? ConstArray{}
                                         : ConstArray{turn_ids.data(), DType::int64, columns, 1},
            .token_weights = given(token_weights),
            .kl_weights = given(kl_weights)};
  }
  PolicyTotals run(const PolicyObjective& objective, const Normalizer& normalizer = {},
                   const Executor& executor = {}) {
    return policy_loss(arrays(), objective, normalizer,
                       {.logps = {dlogps.data(), dtype<T>(), columns, 1}}, executor);
  }
};

template <class T>
Batch<T> random_batch(int64_t rows, int64_t columns, unsigned seed = 1) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  Batch<T> batch(rows, columns);
  for (size_t i = 0; i < batch.logps.size(); ++i) {
    batch.logps[i] = T(-1 + 0.5 * normal(random));
    batch.old_logps[i] = batch.logps[i] - T(0.3 * normal(random));
    batch.ref_logps[i] = batch.logps[i] + T(0.3 * normal(random));
    batch.advantages[i] = T(normal(random));
    batch.mask[i] = random() % 4 != 0 ? T(1) : T(0);
  }
  for (size_t i = 0; i < batch.logps.size(); ++i) {
    batch.rollout_logps[i] = batch.old_logps[i] + T(0.3 * normal(random));
  }
  return batch;
}

}  // namespace tether
