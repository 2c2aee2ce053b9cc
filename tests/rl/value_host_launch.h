#pragma once

#include <cstdint>

#include "rl/catalogue.h"
#include "rl/kernels/value_program.h"
#include "tests/host_team.h"

// The kernels of a value loss on teams of host threads, in the shapes that value_loss.cu
// launches.

namespace tether {

template <class Run>
struct ValueHostLaunch {
  Run run = {};

  void rows(const ValueFormula& formula, const cuda::ValueParameters& in,
            cuda::ValueNumbers* out) const {
    for_each_value_formula([&]<class Formula>(Formula) {
      const Formula* own = formula.target<Formula>();
      if (own == nullptr) return;
      run(in.batch.layout.rows * in.pieces,
          [&](const auto& team, int64_t i) { cuda::value_row_program(team, *own, in, i, out); });
    });
  }
  void count(const ValueArrays& batch, double* out) const {
    run(batch.layout.rows,
        [&](const auto& team, int64_t row) { cuda::count_values_program(team, batch, row, out); });
  }
  void add_counts(const double* rows, int64_t count, double* counts) const {
    run(1, [&](const auto& team, int64_t) {
      cuda::add_value_counts_program(team, rows, count, counts);
    });
  }
  void merge(const cuda::ValueNumbers* pieces, int64_t count, cuda::ValueNumbers* out) const {
    run(1,
        [&](const auto& team, int64_t) { cuda::merge_values_program(team, pieces, count, out); });
  }
};

}  // namespace tether
