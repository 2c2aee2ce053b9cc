#pragma once

#include <typeinfo>

#include "../../core/cluster.h"
#include "../../logits/row_types_cuda.h"
#include "../surrogate.h"
#include "logits_policy_program.h"
#include "policy_launch_cuda.h"
#include "policy_program.h"

// The kernels that are compiled for each formula of a surrogate, for .cu files. One of your own, in
// a .cu file of your own that links tether::cuda:
//
//   #include <rl/kernels/surrogate_cuda.h>
//   TETHER_CUDA_SURROGATE(MySurrogate);
//
// From then on tether::cuda::policy_loss and policy_loss_of_logits take objectives with it, as
// those with a formula of the catalogue, in every file of the program that knows the type. For
// tensors of LibTorch: libtorch/cuda/surrogate.h.

namespace tether::cuda {

template <class Formula>
__global__ __launch_bounds__(kPolicyThreads,
                             3) void rows_kernel(Formula formula,
                                                 const __grid_constant__ PolicyParameters in,
                                                 int64_t first, RowTotals* rows) {
  policy_row_program(DeviceTeam<kPolicyThreads>{}, formula, in, first + blockIdx.x, rows);
}

template <class Formula>
void launch_rows(const DeviceLaunch& launch, const Surrogate& surrogate, const PolicyParameters& in,
                 RowTotals* out) {
  const Formula& formula = *surrogate.target<Formula>();
  launch_tasks(launch.function, launch.count * in.pieces, 1, [&](int64_t first, unsigned blocks) {
    rows_kernel<<<blocks, kPolicyThreads, 0, launch.stream>>>(formula, in, first, out);
  });
}

// Blocks on a multiprocessor: the registers that a thread may use are 65536 over its threads.
template <class Stored, bool kCapped>
constexpr int kHeldBlocks = kCapped || sizeof(Stored) == sizeof(float) ? 2 : 3;

template <class Stored, bool kCapped, class Formula>
__global__ __launch_bounds__(kHeldThreads, kHeldBlocks<Stored, kCapped>) void tokens_kernel(
    const __grid_constant__ Formula formula, const __grid_constant__ PolicyParameters in,
    RowParameters<kCapped> rows, int64_t first, TokensOfLogits found, MutableLogits dlogits) {
  const DeviceCluster<kHeldThreads> team;
  token_of_logits_program<Stored, kCapped, kHeldVectors<Stored, kCapped>>(
      team, formula, in, rows, first + blockIdx.x / team.blocks(), found, dlogits);
  team.leave();
}

template <class Formula>
void launch_tokens_of(const LogitsLaunch& launch, const Formula& formula,
                      const PolicyParameters& in) {
  const ConstLogits& logits = launch.logits;
  with_types(logits.dtype, launch.options, [&]<class Stored, bool kCapped>() {
    const auto kernel = &tokens_kernel<Stored, kCapped, Formula>;
    const int cluster =
        blocks_of_held_row<Stored, kCapped>(logits.vocabulary, has_clusters(kernel));
    const auto rows = row_parameters<kCapped>(logits, launch.targets, launch.options);
    launch_tasks(launch.function, logits.rows, cluster, [&](int64_t first, unsigned blocks) {
      launch_clusters(kernel, blocks, kHeldThreads, cluster, launch.stream, formula, in, rows,
                      first, launch.found, launch.dlogits);
    });
  });
}

template <class Formula>
void launch_tokens(const LogitsLaunch& launch, const Surrogate& surrogate,
                   const PolicyParameters& in) {
  launch_tokens_of(launch, *surrogate.target<Formula>(), in);
}

template <TokenFormula Formula>
SurrogateKernels kernels_for() {
  return {&launch_rows<Formula>, &launch_tokens<Formula>};
}

// What TETHER_CUDA_SURROGATE does when the program is loaded. A linker drops the macro's file from
// a static library of which nothing else is called: call this there. A library whose formulas are
// registered must stay loaded.
template <TokenFormula Formula>
void register_surrogate() {
  add_kernels(typeid(Formula), kernels_for<Formula>());
}

}  // namespace tether::cuda

#define TETHER_CUDA_SURROGATE(...) \
  TETHER_CUDA_LOADED(__COUNTER__, ::tether::cuda::register_surrogate, __VA_ARGS__)
#define TETHER_CUDA_LOADED(line, call, ...) TETHER_CUDA_LOADED_AS(line, call, __VA_ARGS__)
#define TETHER_CUDA_LOADED_AS(line, call, ...) \
  [[maybe_unused]] static const bool tether_cuda_surrogate_##line = (call<__VA_ARGS__>(), true)
