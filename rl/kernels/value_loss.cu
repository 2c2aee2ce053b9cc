#include "core/check.h"
#include "core/cuda_doors.h"
#include "core/cuda_launch.h"
#include "rl/catalogue.h"
#include "rl/kernels/loss_doors_cuda.h"
#include "rl/kernels/value_loss_cuda.h"
#include "rl/kernels/value_program.h"

namespace tether::cuda {
namespace {

using Team = DeviceTeam<kValueThreads>;

template <class Formula>
__global__ __launch_bounds__(kValueThreads,
                             2) void value_kernel(Formula formula,
                                                  const __grid_constant__ ValueParameters in,
                                                  int64_t first, ValueNumbers* pieces) {
  value_row_program(Team{}, formula, in, first + blockIdx.x, pieces);
}

__global__ __launch_bounds__(kValueThreads,
                             6) void count_values_kernel(const __grid_constant__ ValueArrays batch,
                                                         int64_t first, double* rows) {
  count_values_program(Team{}, batch, first + blockIdx.x, rows);
}

__global__ __launch_bounds__(kValueThreads, 6) void add_value_counts_kernel(const double* rows,
                                                                            int64_t count,
                                                                            double* counts) {
  add_value_counts_program(Team{}, rows, count, counts);
}

__global__ __launch_bounds__(kValueThreads, 2) void merge_values_kernel(const ValueNumbers* pieces,
                                                                        int64_t count,
                                                                        ValueNumbers* out) {
  merge_values_program(Team{}, pieces, count, out);
}

struct ValueLaunch {
  const char* function;
  cudaStream_t stream;

  void rows(const ValueFormula& formula, const ValueParameters& in, ValueNumbers* out) const {
    for_each_value_formula([&]<class Formula>(Formula) {
      const Formula* own = formula.target<Formula>();
      if (own == nullptr) return;
      launch_tasks(function, in.batch.layout.rows * in.pieces, 1,
                   [&](int64_t first, unsigned blocks) {
                     value_kernel<<<blocks, kValueThreads, 0, stream>>>(*own, in, first, out);
                   });
    });
  }
  void count(const ValueArrays& batch, double* out) const {
    launch_tasks(function, batch.layout.rows, 1, [&](int64_t first, unsigned blocks) {
      count_values_kernel<<<blocks, kValueThreads, 0, stream>>>(batch, first, out);
    });
  }
  void add_counts(const double* rows, int64_t count, double* counts) const {
    add_value_counts_kernel<<<1, kValueThreads, 0, stream>>>(rows, count, counts);
    require_launched(function);
  }
  void merge(const ValueNumbers* pieces, int64_t count, ValueNumbers* out) const {
    merge_values_kernel<<<1, kValueThreads, 0, stream>>>(pieces, count, out);
    require_launched(function);
  }
};

}  // namespace

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

void value_counts(const ValueArrays& batch, double* counts, void* workspace, Stream stream) {
  const char* function = "value_counts";
  check_device_inputs(function, batch, Numbers::narrow);
  require_memory(function, "counts", counts);
  require_memory(function, "workspace", workspace);
  run_value_counts(batch, ValueWorkspace(workspace), counts,
                   ValueLaunch{function, static_cast<cudaStream_t>(stream)});
}

void value_loss(const ValueArrays& batch, const ValueObjective& objective, const double* counts,
                double factor, const MutableArray& dvalues, ValueTotals* totals, void* workspace,
                Stream stream) {
  const char* function = "value_loss";
  check_supported(function, batch, objective);
  check_device_result(function, "dvalues", dvalues, Numbers::narrow, batch.layout);
  require_memory(function, "totals", totals);
  require_memory(function, "workspace", workspace);
  run_value_loss(batch, objective.loss, objective.aggregation, counts, factor, dvalues, totals,
                 ValueWorkspace(workspace),
                 ValueLaunch{function, static_cast<cudaStream_t>(stream)});
}

}  // namespace tether::cuda
