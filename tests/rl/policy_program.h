#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "rl/kernels/policy_calls.h"
#include "rl/kernels/policy_loss.h"
#include "tests/rl/host_launch.h"
#include "tests/rl/own_surrogate.h"
#include "tests/rl/policy_batch.h"
#include "tests/thread_team.h"

// The programs of the CUDA kernels on a team of host threads, beside the CPU kernel.

namespace tether {

template <class Run = OneThread>
PolicyTotals run_program(const PolicyArrays& batch, const PolicyObjective& objective,
                         const PolicyGradients& gradients, const double* counts = nullptr,
                         double factor = 1, const Run& run = {}) {
  static_assert(sizeof(PolicyTotals) == sizeof(cuda::FlatTotals));
  const int64_t bytes = cuda::PolicyWorkspace(nullptr, batch.layout, objective).bytes;
  std::vector<double> memory(static_cast<size_t>(bytes + 7) / 8, NAN);  // as it may be found
  PolicyTotals out;
  const HostLaunch<Run, OwnSurrogate> launch{batch.layout.rows, run};
  cuda::run_policy_loss(batch, objective, counts, factor, gradients,
                        reinterpret_cast<cuda::FlatTotals*>(&out),
                        cuda::PolicyWorkspace(memory.data(), batch.layout, objective), launch);
  return out;
}

// A batch in float with rows of every kind: one empty, one of a single token, some that ran away.
inline Batch<float> mixed_batch() {
  Batch<float> batch = random_batch<float>(6, 700);
  for (size_t i = 0; i < 700; ++i) {
    batch.mask[i] = 0;
    batch.mask[700 + i] = i == 41 ? 1 : 0;
    batch.mask[1400 + i] *= 0.5f;
    // Half as far as elsewhere: sums over a row are to stay within a float.
    for (size_t row = 0; row < 6; ++row) {
      const size_t at = row * 700 + i;
      batch.old_logps[at] = batch.logps[at] + 0.05f * (batch.old_logps[at] - batch.logps[at]);
    }
  }
  for (size_t i = 2100; i < 2110; ++i) batch.old_logps[i] -= 1.5f;
  for (size_t i = 2110; i < 2120; ++i) batch.old_logps[i] += 1.5f;
  return batch;
}

inline void spoil_masked(Batch<float>& batch) {
  for (size_t i = 0; i < batch.mask.size(); ++i) {
    if (batch.mask[i] != 0) continue;
    for (auto* array : {&batch.logps, &batch.old_logps, &batch.ref_logps, &batch.rollout_logps,
                        &batch.advantages}) {
      (*array)[i] = NAN;
    }
  }
}

inline void expect_same(const PolicyTotals& got, const PolicyTotals& want,
                        const std::vector<float>& gradients, const std::vector<float>& wanted,
                        const std::string& what) {
  EXPECT_NEAR(got.loss, want.loss, 2e-6 * (1 + std::abs(want.loss))) << what;
  const auto metrics = got.metrics.to_map(), expected = want.metrics.to_map();
  for (const auto& [name, value] : expected) {
    EXPECT_NEAR(metrics.at(name), value, 3e-5 * (1e-3 + std::abs(value))) << what << ": " << name;
  }
  for (size_t i = 1; i < want.metrics.sums.size(); i += 2) {
    EXPECT_EQ(got.metrics.sums[i], want.metrics.sums[i]) << what << ": count " << i / 2;
  }
  float largest = 0;
  for (float gradient : wanted) largest = std::max(largest, std::abs(gradient));
  for (size_t i = 0; i < wanted.size(); ++i) {
    ASSERT_NEAR(gradients[i], wanted[i], 3e-6 * (largest + 4 * std::abs(wanted[i])))
        << what << " at " << i;
  }
}

inline void expect_cpu_kernel(Batch<float>& batch, const PolicyObjective& objective,
                              const std::string& what) {
  const PolicyTotals want = batch.run(objective);
  std::vector<float> gradients(batch.dlogps.size(), 7);
  const MutableArray dlogps{gradients.data(), DType::float32, batch.columns, 1};
  const PolicyTotals got = run_program(batch.arrays(), objective, {.logps = dlogps});
  expect_same(got, want, gradients, batch.dlogps, what);
  const std::vector<float> first = gradients;
  const PolicyTotals again = run_program(batch.arrays(), objective, {.logps = dlogps}, nullptr, 1,
                                         OneThread{{.backwards = true}});
  EXPECT_EQ(again.loss, got.loss) << what;
  EXPECT_EQ(again.metrics.sums, got.metrics.sums) << what;
  EXPECT_EQ(gradients, first) << what;
}

// Real threads, those of all rows at once, in teams of 64. ThreadSanitizer looks for races, and the
// bits are those of such teams on one thread.
template <bool kThreads>
struct Teams64 {
  template <class Program>
  void operator()(int64_t teams, Program program) const {
    if constexpr (kThreads) {
      ThreadTeam<64>::run(static_cast<int>(teams), program);
    } else {
      for (int64_t i = 0; i < teams; ++i) program(HostTeam<64>{}, i);
    }
  }
};

// Real threads of a team give what one thread gives that takes their turns.
inline void expect_no_race(Batch<float>& batch, const PolicyObjective& objective) {
  const size_t slots = batch.mask.size();
  std::vector<float> gradients(slots), expected(slots);
  const auto into = [&](std::vector<float>& memory) {
    return PolicyGradients{.logps = {memory.data(), DType::float32, batch.columns, 1}};
  };
  const PolicyTotals got =
      run_program(batch.arrays(), objective, into(gradients), nullptr, 1, Teams64<true>{});
  const PolicyTotals want =
      run_program(batch.arrays(), objective, into(expected), nullptr, 1, Teams64<false>{});
  EXPECT_EQ(got.loss, want.loss);
  EXPECT_EQ(got.metrics.sums, want.metrics.sums);
  EXPECT_EQ(gradients, expected);
}

}  // namespace tether
