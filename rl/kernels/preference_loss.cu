#include "core/check.h"
#include "core/cuda_doors.h"
#include "core/cuda_launch.h"
#include "rl/kernels/loss_doors_cuda.h"
#include "rl/kernels/preference_loss.h"
#include "rl/kernels/preference_loss_cuda.h"
#include "rl/kernels/preference_program.h"

namespace tether::cuda {
namespace {

using Team = DeviceTeam<kPreferenceThreads>;

__global__ __launch_bounds__(kPreferenceThreads,
                             4) void answers_kernel(const __grid_constant__ PreferenceParameters in,
                                                    int64_t first, AnswerState* answers) {
  answer_program(Team{}, in, first + blockIdx.x, answers);
}

__global__ __launch_bounds__(kPreferenceThreads, 6) void count_examples_kernel(
    const __grid_constant__ PreferenceParameters in, const AnswerState* answers, double* counts) {
  count_examples_program(Team{}, in, answers, counts);
}

__global__ __launch_bounds__(kPreferenceThreads, 1) void examples_kernel(
    const __grid_constant__ CataloguedPreference formula,
    const __grid_constant__ CataloguedLink link, const __grid_constant__ PreferenceParameters in,
    const AnswerState* answers, const double* local_counts, AnswerSlopes* slopes, double* totals) {
  examples_program(Team{}, formula, link, in, answers, local_counts, slopes, totals);
}

__global__ __launch_bounds__(kPreferenceThreads, 6) void answer_gradient_kernel(
    const __grid_constant__ PreferenceParameters in, int64_t first, const AnswerState* answers,
    const AnswerSlopes* slopes) {
  answer_gradient_program(Team{}, in, first + blockIdx.x, answers, slopes);
}

struct PreferenceLaunch {
  const char* function;
  cudaStream_t stream;

  void answers(const PreferenceParameters& in, AnswerState* out) const {
    launch_tasks(function, in.batch.layout.rows, 1, [&](int64_t first, unsigned blocks) {
      answers_kernel<<<blocks, kPreferenceThreads, 0, stream>>>(in, first, out);
    });
  }
  void count(const PreferenceParameters& in, const AnswerState* from, double* counts) const {
    count_examples_kernel<<<1, kPreferenceThreads, 0, stream>>>(in, from, counts);
    require_launched(function);
  }
  void examples(const PreferenceObjective& objective, const PreferenceParameters& in,
                const PreferenceWorkspace& workspace, double* totals) const {
    examples_kernel<<<1, kPreferenceThreads, 0, stream>>>(
        CataloguedPreference(objective.loss), CataloguedLink(objective.link), in, workspace.answers,
        workspace.local_counts, workspace.slopes, totals);
    require_launched(function);
  }
  void gradients(const PreferenceParameters& in, const PreferenceWorkspace& workspace) const {
    launch_tasks(function, in.batch.layout.rows * in.pieces, 1,
                 [&](int64_t first, unsigned blocks) {
                   answer_gradient_kernel<<<blocks, kPreferenceThreads, 0, stream>>>(
                       in, first, workspace.answers, workspace.slopes);
                 });
  }
};

}  // namespace

bool is_supported(const PreferenceArrays& batch, const PreferenceObjective& objective) {
  return !lacks_kernel(batch, objective);
}

void check_supported(const char* function, const PreferenceArrays& batch,
                     const PreferenceObjective& objective) {
  check_loss(function, batch, objective);
}

int64_t preference_workspace_bytes(const PreferenceArrays& batch) {
  return PreferenceWorkspace::bytes(batch.layout);
}

void preference_counts(const PreferenceArrays& batch, double* counts, void* workspace,
                       Stream stream) {
  const char* function = "preference_counts";
  check_answers(function, batch);
  require_memory(function, "counts", counts);
  require_memory(function, "workspace", workspace);
  run_preference_counts(batch, PreferenceWorkspace(workspace, batch.layout), counts,
                        PreferenceLaunch{function, static_cast<cudaStream_t>(stream)});
}

void preference_loss(const PreferenceArrays& batch, const PreferenceObjective& objective,
                     const double* counts, double factor, const MutableArray& dlogps,
                     PreferenceTotals* totals, void* workspace, Stream stream) {
  const char* function = "preference_loss";
  check_supported(function, batch, objective);
  check_device_result(function, "dlogps", dlogps, Numbers::narrow, batch.layout);
  check_needs(function, presence_of(batch), batch.layout.rows, objective);
  require_memory(function, "totals", totals);
  require_memory(function, "workspace", workspace);
  run_preference_loss(batch, objective, counts, factor, dlogps, totals,
                      PreferenceWorkspace(workspace, batch.layout),
                      PreferenceLaunch{function, static_cast<cudaStream_t>(stream)});
}

}  // namespace tether::cuda
