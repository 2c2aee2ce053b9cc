#include <string>

#include "core/check.h"
#include "core/cluster.h"
#include "core/cuda_doors.h"
#include "core/cuda_launch.h"
#include "logits/held_pair_program.h"
#include "logits/pair_kl_cuda.h"
#include "logits/pair_kl_program.h"
#include "logits/row_types_cuda.h"

namespace tether::cuda {
namespace {

template <class Stored>
__global__ __launch_bounds__(kPairThreads, 2) void pair_kl_kernel(PairParameters in, int64_t first,
                                                                  PairKlArrays<float> values) {
  pair_kl_program<Stored>(DeviceTeam<kPairThreads>{}, in, first + blockIdx.x, values);
}

template <class Stored>
__global__
__launch_bounds__(kHeldPairThreads<Stored>, 512 / kHeldPairThreads<Stored>) void held_pair_kernel(
    const __grid_constant__ PairParameters in, int64_t first, PairKlArrays<const float> upstream,
    PairKlArrays<float> values, const __grid_constant__ MutableLogits dq,
    const __grid_constant__ MutableLogits dp) {
  const DeviceCluster<kHeldPairThreads<Stored>> team;
  held_pair_program<Stored>(team, in, first + blockIdx.x / team.blocks(), upstream, values, dq, dp);
  team.leave();
}

}  // namespace

void logits_kl(const ConstLogits& q, const ConstLogits& p, double temperature,
               const uint8_t* active, const PairKlArrays<float>& values, Stream stream) {
  const std::string function = "logits_kl";
  check_device_pair(function, q, p, temperature);
  const auto in = pair_parameters(q, p, temperature, active);
  with_stored(q.dtype, [&]<class Stored>(Stored) {
    launch_tasks(function, q.rows, 1, [&](int64_t first, unsigned blocks) {
      pair_kl_kernel<Stored>
          <<<blocks, kPairThreads, 0, static_cast<cudaStream_t>(stream)>>>(in, first, values);
    });
  });
}

void logits_kl_gradients(const ConstLogits& q, const ConstLogits& p, double temperature,
                         const uint8_t* active, const PairKlArrays<const float>& upstream,
                         const PairKlArrays<float>& values, const MutableLogits& dq,
                         const MutableLogits& dp, Stream stream) {
  const std::string function = "logits_kl_gradients";
  check_device_pair(function, q, p, temperature);
  const auto in = pair_parameters(q, p, temperature, active);
  with_stored(q.dtype, [&]<class Stored>(Stored) {
    const auto kernel = &held_pair_kernel<Stored>;
    const int cluster = blocks_of_held_pair<Stored>(q.vocabulary, has_clusters(kernel));
    launch_tasks(function, q.rows, cluster, [&](int64_t first, unsigned blocks) {
      launch_clusters(kernel, blocks, kHeldPairThreads<Stored>, cluster, stream, in, first,
                      upstream, values, dq, dp);
    });
  });
}

}  // namespace tether::cuda
