#include "core/check.h"
#include "core/cuda_doors.h"
#include "core/cuda_launch.h"
#include "core/type_table.h"
#include "rl/catalogue.h"
#include "rl/kernels/loss_doors_cuda.h"
#include "rl/kernels/policy_calls.h"
#include "rl/kernels/policy_checks.h"
#include "rl/kernels/policy_launch_cuda.h"
#include "rl/kernels/policy_loss_cuda.h"
#include "rl/kernels/surrogate_cuda.h"

namespace tether::cuda {
namespace {

using Team = DeviceTeam<kPolicyThreads>;

template <class Formula>
__global__ __launch_bounds__(kPolicyThreads,
                             6) void weight_kernel(Formula formula,
                                                   const __grid_constant__ WeightParameters in,
                                                   int64_t first) {
  weight_program(Team{}, formula, in, first + blockIdx.x);
}

__global__ __launch_bounds__(kPolicyThreads,
                             4) void add_rows_kernel(const RowTotals* rows, int64_t count,
                                                     const __grid_constant__ PolicyParameters in,
                                                     FlatTotals* out) {
  add_rows_program(Team{}, rows, count, in, out);
}

constexpr int kCountBlocks = kMultiprocessorThreads / kPolicyThreads;

__global__ __launch_bounds__(kPolicyThreads, kCountBlocks) void count_rows_kernel(
    const __grid_constant__ PolicyParameters in, int64_t first, double* rows) {
  count_row_program(Team{}, in, first + blockIdx.x, rows);
}

__global__ __launch_bounds__(kPolicyThreads,
                             kCountBlocks) void add_counts_kernel(const double* rows, int64_t count,
                                                                  double* out) {
  add_counts_program(Team{}, rows, count, out);
}

TypeTable<SurrogateKernels>& table() {
  static TypeTable<SurrogateKernels>* const all = [] {
    auto* out = new TypeTable<SurrogateKernels>;
    for_each_surrogate([&]<class Formula>(Formula) {
      out->add(typeid(Formula), {&launch_rows<Formula>, &launch_catalogued_tokens});
    });
    return out;
  }();
  return *all;
}

void check_gradients(const char* function, const PolicyArrays& batch,
                     const PolicyGradients& gradients) {
  check_device_result(function, "dlogps", gradients.logps, Numbers::narrow, batch.layout);
  check_device_result(function, "dentropies", gradients.entropies, Numbers::narrow, batch.layout);
  require(!gradients.entropies || bool(batch.entropies), [&] {
    return named(function, "dentropies") + " must be none without entropies, got an array";
  });
}

}  // namespace

std::optional<SurrogateKernels> kernels_of(const Surrogate& surrogate) {
  return table().find(surrogate.type());
}

bool has_kernels(std::type_index formula) { return table().find(formula).has_value(); }

void add_kernels(std::type_index formula, const SurrogateKernels& kernels) {
  table().add(formula, kernels);
}

void DeviceLaunch::rows(const Surrogate& surrogate, const PolicyParameters& in,
                        RowTotals* out) const {
  kernels_of(surrogate)->rows(*this, surrogate, in, out);
}

void DeviceLaunch::weight(const TokenWeight& weight, const WeightParameters& in) const {
  for_each_weight([&]<class Formula>(const FormulaRow<Formula>&) {
    const Formula* formula = weight.formula.template target<Formula>();
    if (formula == nullptr) return;
    launch_tasks(function, count, 1, [&](int64_t first, unsigned blocks) {
      weight_kernel<<<blocks, kPolicyThreads, 0, stream>>>(*formula, in, first);
    });
  });
}

void DeviceLaunch::count_rows(const PolicyParameters& in, double* out) const {
  launch_tasks(function, count, 1, [&](int64_t first, unsigned blocks) {
    count_rows_kernel<<<blocks, kPolicyThreads, 0, stream>>>(in, first, out);
  });
}

void DeviceLaunch::add_rows(const RowTotals* rows, const PolicyParameters& in,
                            FlatTotals* out) const {
  add_rows_kernel<<<1, kPolicyThreads, 0, stream>>>(rows, count * in.pieces, in, out);
  require_launched(function);
}

void DeviceLaunch::add_counts(const double* rows, double* out) const {
  add_counts_kernel<<<1, kPolicyThreads, 0, stream>>>(rows, count, out);
  require_launched(function);
}

bool is_supported(const PolicyArrays& batch, const PolicyObjective& objective) {
  return !lacks_kernel(batch, objective);
}

void check_supported(const char* function, const PolicyArrays& batch,
                     const PolicyObjective& objective) {
  check_loss(function, batch, objective);
}

int64_t policy_workspace_bytes(const PolicyArrays& batch, const PolicyObjective& objective) {
  return PolicyWorkspace(nullptr, batch.layout, objective).bytes;
}

void local_counts(const PolicyArrays& batch, const PolicyObjective& objective, double* counts,
                  void* workspace, Stream stream) {
  const char* function = "local_counts";
  check_supported(function, batch, objective);
  check_weight_needs(function, presence_of(batch), weights_that(true, objective.weights));
  require_memory(function, "workspace", workspace);
  require_memory(function, "counts", counts);
  const PolicyWorkspace parts(workspace, batch.layout, objective);
  const DeviceLaunch launch{function, batch.layout.rows, static_cast<cudaStream_t>(stream)};
  run_counts(run_gates(batch, objective, parts, launch), parts, counts, launch);
}

void policy_loss(const PolicyArrays& batch, const PolicyObjective& objective, const double* counts,
                 double factor, const PolicyGradients& gradients, PolicyTotals* totals,
                 void* workspace, Stream stream) {
  static_assert(sizeof(FlatTotals) == sizeof(PolicyTotals));
  const char* function = "policy_loss";
  check_supported(function, batch, objective);
  check_needs(function, presence_of(batch), objective);
  check_gradients(function, batch, gradients);
  require_memory(function, "workspace", workspace);
  require_memory(function, "totals", totals);
  const DeviceLaunch launch{function, batch.layout.rows, static_cast<cudaStream_t>(stream)};
  run_policy_loss(batch, objective, counts, factor, gradients,
                  reinterpret_cast<FlatTotals*>(totals),
                  PolicyWorkspace(workspace, batch.layout, objective), launch);
}

}  // namespace tether::cuda
