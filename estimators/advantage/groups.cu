#include <string_view>

#include "core/check.h"
#include "core/cuda_doors.h"
#include "core/cuda_launch.h"
#include "estimators/advantage/catalogue.h"
#include "estimators/advantage/groups.h"
#include "estimators/advantage/groups_cuda.h"
#include "estimators/advantage/groups_program.h"

namespace tether::cuda {
namespace {

template <class Rule>
__global__ __launch_bounds__(kGroupThreads,
                             8) void group_kernel(Rule rule,
                                                  const __grid_constant__ GroupParameters in,
                                                  int64_t first) {
  group_program(DeviceTeam<kGroupThreads>{}, rule, in, first + blockIdx.x);
}

__global__ __launch_bounds__(kGroupThreads,
                             8) void batch_std_kernel(const __grid_constant__ GroupParameters in) {
  batch_std_program(DeviceTeam<kGroupThreads>{}, in);
}

// For rules that read it, where it has memory.
template <class Rule>
void launch_batch_std(std::string_view function, const Rule& rule, const GroupParameters& in,
                      Stream stream) {
  if constexpr (kReadsBatch<Rule>) {
    if (!rule.reads_batch() || in.batch.batch_std == nullptr || in.batch.count == 0) return;
    batch_std_kernel<<<1, kGroupThreads, 0, static_cast<cudaStream_t>(stream)>>>(in);
    require_launched(function);
  }
}

void check(std::string_view function, const GroupBatch& batch, const GroupRule& rule,
           const float* advantages) {
  check_formula(function, rule);
  check_sizes(function, batch.group_ids != nullptr, batch.group_size, batch.count);
  const bool empty = batch.count == 0;  // then no array has memory
  check_reads(function, {.lengths = batch.lengths != nullptr || empty}, rule);
  require_kernel(chosen(rule) < kGroupRuleNames.size(), function,
                 "estimator must be one of the catalogue", "another type");
  if (empty) return;
  require_memory(function, "rewards", batch.rewards);
  require_memory(function, "advantages", advantages);
}

}  // namespace

void advantages_of_groups(std::string_view function, const GroupBatch& batch, const GroupRule& rule,
                          float* advantages, Stream stream) {
  check(function, batch, rule, advantages);
  const auto in = group_parameters(batch, rule, advantages);
  bool found = false;
  for_each_group_rule([&]<class Rule>(const FormulaRow<Rule>&) {
    const Rule* formula = rule.target<Rule>();
    if (found || formula == nullptr) return;
    found = true;  // several rows are of one type
    launch_batch_std(function, *formula, in, stream);
    launch_tasks(function, batch.count, 1, [&](int64_t first, unsigned blocks) {
      group_kernel<<<blocks, kGroupThreads, 0, static_cast<cudaStream_t>(stream)>>>(*formula, in,
                                                                                    first);
    });
  });
}

}  // namespace tether::cuda
