#pragma once

#include "tests/rl/host_launch.h"

// The kernels of a surrogate that host_kernels.cc runs, in the place of those that nvcc compiles
// (rl/kernels/policy_launch_cuda.h).

namespace tether::cuda {

struct SurrogateKernels {
  void (*rows)(int64_t count, const Surrogate&, const PolicyParameters&, RowTotals*);
};

template <class Formula>
SurrogateKernels kernels_on_host() {
  return {
      [](int64_t count, const Surrogate& surrogate, const PolicyParameters& in, RowTotals* out) {
        const Formula& formula = *surrogate.target<Formula>();
        OneThread{}(count * in.pieces, [&](const auto& team, int64_t piece) {
          policy_row_program(team, formula, in, piece, out);
        });
      }};
}

}  // namespace tether::cuda
