#include "core/cuda_launch.h"
#include "rl/kernels/policy_launch_cuda.h"
#include "rl/kernels/turn_program.h"

namespace tether::cuda {
namespace {

constexpr int kTurnBlocks = 4;
using Team = DeviceTeam<kPolicyThreads>;

__global__ __launch_bounds__(kPolicyThreads, kTurnBlocks) void find_turns_kernel(
    const __grid_constant__ TurnParameters in, int64_t first) {
  find_turns_program(Team{}, in, first + blockIdx.x);
}

__global__ __launch_bounds__(kPolicyThreads, kTurnBlocks) void turn_statistic_kernel(
    const __grid_constant__ WeightParameters in, int64_t first) {
  turn_statistic_program(Team{}, in, first + blockIdx.x);
}

__global__ __launch_bounds__(kPolicyThreads, kTurnBlocks) void turn_ratio_kernel(
    const __grid_constant__ PolicyParameters in, int64_t first) {
  turn_ratio_program(Team{}, in, first + blockIdx.x);
}

__global__ __launch_bounds__(kPolicyThreads, kTurnBlocks) void turn_slope_kernel(
    const __grid_constant__ PolicyParameters in, int64_t first) {
  turn_slope_program(Team{}, in, first + blockIdx.x);
}

__global__ __launch_bounds__(kPolicyThreads, kTurnBlocks) void turn_gradient_kernel(
    const __grid_constant__ PolicyParameters in, int64_t first) {
  turn_gradient_program(Team{}, in, first + blockIdx.x);
}

// `tasks` of a kernel, a block each.
template <class Parameters>
void launch_each(const DeviceLaunch& launch, void (*kernel)(Parameters, int64_t), int64_t tasks,
                 const Parameters& in) {
  launch_tasks(launch.function, tasks, 1, [&](int64_t first, unsigned blocks) {
    kernel<<<blocks, kPolicyThreads, 0, launch.stream>>>(in, first);
  });
}

}  // namespace

void DeviceLaunch::turns(const TurnParameters& in) const {
  launch_each(*this, find_turns_kernel, count, in);
}

void DeviceLaunch::turn_statistics(const WeightParameters& in) const {
  launch_each(*this, turn_statistic_kernel, count, in);
}

void DeviceLaunch::turn_ratios(const PolicyParameters& in) const {
  launch_each(*this, turn_ratio_kernel, count, in);
}

void DeviceLaunch::turn_gradients(const PolicyParameters& in) const {
  launch_each(*this, turn_slope_kernel, count, in);
  launch_each(*this, turn_gradient_kernel, count * in.pieces, in);
}

}  // namespace tether::cuda
