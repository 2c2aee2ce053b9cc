#pragma once

#include <cstdint>

#include "rl/catalogue.h"
#include "rl/kernels/preference_program.h"
#include "tests/host_team.h"

// The kernels of a preference loss on teams of host threads, in the shapes that preference_loss.cu
// launches.

namespace tether {

template <class Run>
struct PreferenceHostLaunch {
  Run run = {};

  void answers(const cuda::PreferenceParameters& in, cuda::AnswerState* out) const {
    run(in.batch.layout.rows,
        [&](const auto& team, int64_t row) { cuda::answer_program(team, in, row, out); });
  }
  void count(const cuda::PreferenceParameters& in, const cuda::AnswerState* from,
             double* counts) const {
    run(1,
        [&](const auto& team, int64_t) { cuda::count_examples_program(team, in, from, counts); });
  }
  void examples(const PreferenceObjective& objective, const cuda::PreferenceParameters& in,
                const cuda::PreferenceWorkspace& workspace, double* totals) const {
    const cuda::CataloguedPreference formula(objective.loss);
    const cuda::CataloguedLink link(objective.link);
    run(1, [&](const auto& team, int64_t) {
      cuda::examples_program(team, formula, link, in, workspace.answers, workspace.local_counts,
                             workspace.slopes, totals);
    });
  }
  void gradients(const cuda::PreferenceParameters& in,
                 const cuda::PreferenceWorkspace& workspace) const {
    run(in.batch.layout.rows * in.pieces, [&](const auto& team, int64_t i) {
      cuda::answer_gradient_program(team, in, i, workspace.answers, workspace.slopes);
    });
  }
};

}  // namespace tether
