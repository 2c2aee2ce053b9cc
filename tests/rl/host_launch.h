#pragma once

#include <cstdint>

#include "rl/catalogue.h"
#include "rl/kernels/policy_calls.h"
#include "tests/host_team.h"

// The kernels of a policy loss on teams of host threads, in the shapes that policy_loss.cu
// launches.

namespace tether {

using OneThread = HostRun<cuda::kPolicyThreads>;

// `Formulas`: a user's, beside those of the catalogue.
template <class Run, class... Formulas>
struct HostLaunch {
  int64_t count;
  Run run = {};

  void rows(const Surrogate& surrogate, const cuda::PolicyParameters& in,
            cuda::RowTotals* out) const {
    const auto run_if = [&]<class Formula>(Formula) {
      const Formula* formula = surrogate.target<Formula>();
      if (formula == nullptr) return;
      run(count * in.pieces, [&](const auto& team, int64_t piece) {
        cuda::policy_row_program(team, *formula, in, piece, out);
      });
    };
    for_each_surrogate(run_if);
    (run_if(Formulas{}), ...);
  }
  void weight(const TokenWeight& weight, const cuda::WeightParameters& in) const {
    for_each_weight([&]<class Formula>(const FormulaRow<Formula>&) {
      const Formula* formula = weight.formula.template target<Formula>();
      if (formula == nullptr) return;
      run(count,
          [&](const auto& team, int64_t row) { cuda::weight_program(team, *formula, in, row); });
    });
  }
  void turns(const cuda::TurnParameters& in) const {
    run(count, [&](const auto& team, int64_t row) { cuda::find_turns_program(team, in, row); });
  }
  void turn_statistics(const cuda::WeightParameters& in) const {
    run(count, [&](const auto& team, int64_t row) { cuda::turn_statistic_program(team, in, row); });
  }
  void turn_ratios(const cuda::PolicyParameters& in) const {
    run(count, [&](const auto& team, int64_t row) { cuda::turn_ratio_program(team, in, row); });
  }
  void turn_gradients(const cuda::PolicyParameters& in) const {
    run(count, [&](const auto& team, int64_t row) { cuda::turn_slope_program(team, in, row); });
    run(count * in.pieces,
        [&](const auto& team, int64_t piece) { cuda::turn_gradient_program(team, in, piece); });
  }
  void count_rows(const cuda::PolicyParameters& in, double* out) const {
    run(count, [&](const auto& team, int64_t row) { cuda::count_row_program(team, in, row, out); });
  }
  void add_rows(const cuda::RowTotals* rows, const cuda::PolicyParameters& in,
                cuda::FlatTotals* out) const {
    run(1, [&](const auto& team, int64_t) {
      cuda::add_rows_program(team, rows, count * in.pieces, in, out);
    });
  }
  void add_counts(const double* rows, double* out) const {
    run(1, [&](const auto& team, int64_t) { cuda::add_counts_program(team, rows, count, out); });
  }
};

}  // namespace tether
