// The preference and value losses of tether::cuda on teams of host threads (see host_kernels.cc).

#include "rl/kernels/loss_doors_cuda.h"
#include "rl/kernels/preference_loss_cuda.h"
#include "rl/kernels/value_loss_cuda.h"
#include "tests/rl/preference_host_launch.h"
#include "tests/rl/value_host_launch.h"

namespace tether::cuda {

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

void preference_counts(const PreferenceArrays& batch, double* counts, void* workspace, Stream) {
  check_answers("preference_counts", batch);
  run_preference_counts(batch, PreferenceWorkspace(workspace, batch.layout), counts,
                        PreferenceHostLaunch<HostRun<kPreferenceThreads>>{});
}

void preference_loss(const PreferenceArrays& batch, const PreferenceObjective& objective,
                     const double* counts, double factor, const MutableArray& dlogps,
                     PreferenceTotals* totals, void* workspace, Stream) {
  run_preference_loss(batch, objective, counts, factor, dlogps, totals,
                      PreferenceWorkspace(workspace, batch.layout),
                      PreferenceHostLaunch<HostRun<kPreferenceThreads>>{});
}

bool is_supported(const ValueArrays& batch, const ValueObjective& objective) {
  return !lacks_kernel(batch, objective);
}

void check_supported(const char* function, const ValueArrays& batch,
                     const ValueObjective& objective) {
  check_loss(function, batch, objective);
}

int64_t value_workspace_bytes(const ValueArrays& batch) {
  return ValueWorkspace::bytes(batch.layout);
}

void value_loss(const ValueArrays& batch, const ValueObjective& objective, const double* counts,
                double factor, const MutableArray& dvalues, ValueTotals* totals, void* workspace,
                Stream) {
  run_value_loss(batch, objective.loss, objective.aggregation, counts, factor, dvalues, totals,
                 ValueWorkspace(workspace), ValueHostLaunch<HostRun<kValueThreads>>{});
}

}  // namespace tether::cuda
