#include <string>

#include "core/check.h"
#include "core/cluster.h"
#include "core/cuda_launch.h"
#include "logits/row_types_cuda.h"
#include "logits/support_cuda.h"
#include "logits/support_program.h"

namespace tether::cuda {
namespace {

template <class Stored, bool kCapped>
__global__ __launch_bounds__(kSupportThreads) void support_statistics_kernel(
    RowParameters<kCapped> in, KeptIds kept, int64_t first, RowResults out) {
  support_statistics_program<Stored>(DeviceTeam<kSupportThreads>{}, in, kept, first + blockIdx.x,
                                     out);
}

template <class Stored, bool kCapped>
__global__ __launch_bounds__(kSupportThreads, 2) void support_gradient_kernel(
    RowParameters<kCapped> in, KeptIds kept, int64_t first, int pieces, const RowState* states,
    const float* dlogps, const float* dentropies, float* kept_logits, MutableLogits dlogits) {
  support_gradient_program<Stored>(DeviceTeam<kSupportThreads>{}, in, kept, first + blockIdx.x,
                                   pieces, states, dlogps, dentropies, kept_logits, dlogits);
}

// A cluster of one block.
template <class Stored>
__global__ __launch_bounds__(kSupportThreads, 2) void support_kl_kernel(
    const __grid_constant__ PairParameters in, const __grid_constant__ KeptIds kept, int64_t first,
    PairKlArrays<const float> upstream, PairKlArrays<float> values, float* kept_logits,
    const __grid_constant__ MutableLogits dq, const __grid_constant__ MutableLogits dp) {
  support_kl_program<Stored>(DeviceCluster<kSupportThreads>{}, in, kept, first + blockIdx.x,
                             upstream, values, kept_logits, dq, dp);
}

bool has_ids(const KeptIds& kept) { return kept.layout.packed() || kept.layout.columns > 0; }

void check_kept(const std::string& function, const KeptIds& kept, int64_t rows) {
  require(is_integer(kept.ids.dtype), [&] {
    return function + ": ids must be int32 or int64, got " + std::string(name_of(kept.ids.dtype));
  });
  require(kept.layout.rows == rows, [&] {
    return function + ": ids must be of " + text(rows) + " rows like the logits, got " +
           text(kept.layout.rows);
  });
  if (rows > 0 && has_ids(kept)) require_memory(function, "ids", kept.ids.data);
}

}  // namespace

void support_statistics(const ConstLogits& logits, const int64_t* targets, const KeptIds& kept,
                        const RowOptions& options, const RowResults& results, Stream stream) {
  const std::string function = "support_statistics";
  check_rows(function, logits, options);
  check_kept(function, kept, logits.rows);
  with_types(logits.dtype, options, [&]<class Stored, bool kCapped>() {
    const auto in = row_parameters<kCapped>(logits, targets, options);
    launch_tasks(function, logits.rows, 1, [&](int64_t first, unsigned blocks) {
      support_statistics_kernel<Stored, kCapped>
          <<<blocks, kSupportThreads, 0, static_cast<cudaStream_t>(stream)>>>(in, kept, first,
                                                                              results);
    });
  });
}

void support_gradients(const ConstLogits& logits, const int64_t* targets, const KeptIds& kept,
                       const RowOptions& options, const RowState* states, const float* dlogps,
                       const float* dentropies, float* kept_logits, const MutableLogits& dlogits,
                       Stream stream) {
  const std::string function = "support_gradients";
  check_rows(function, logits, options);
  check_kept(function, kept, logits.rows);
  if (logits.rows > 0) {
    require_memory(function, "states", states);
    if (has_ids(kept)) require_memory(function, "kept_logits", kept_logits);
    require_memory(function, "dlogits", dlogits.data);
  }
  with_types(logits.dtype, options, [&]<class Stored, bool kCapped>() {
    const auto in = row_parameters<kCapped>(logits, targets, options);
    const int pieces = pieces_of_row<Stored, kSupportThreads>(logits.vocabulary);
    launch_tasks(function, logits.rows, 1, [&](int64_t first, unsigned blocks) {
      support_gradient_kernel<Stored, kCapped>
          <<<blocks, kSupportThreads, 0, static_cast<cudaStream_t>(stream)>>>(
              in, kept, first, pieces, states, dlogps, dentropies, kept_logits, dlogits);
    });
  });
}

void support_kl(const ConstLogits& q, const ConstLogits& p, const KeptIds& kept, double temperature,
                const uint8_t* active, const PairKlArrays<const float>& upstream,
                const PairKlArrays<float>& values, float* kept_logits, const MutableLogits& dq,
                const MutableLogits& dp, Stream stream) {
  const std::string function = "support_kl";
  check_device_pair(function, q, p, temperature);
  check_kept(function, kept, q.rows);
  const bool writes = dq.data != nullptr || dp.data != nullptr;
  if (q.rows > 0 && writes && has_ids(kept)) require_memory(function, "kept_logits", kept_logits);
  const auto in = pair_parameters(q, p, temperature, active);
  with_stored(q.dtype, [&]<class Stored>(Stored) {
    launch_tasks(function, q.rows, 1, [&](int64_t first, unsigned blocks) {
      support_kl_kernel<Stored><<<blocks, kSupportThreads, 0, static_cast<cudaStream_t>(stream)>>>(
          in, kept, first, upstream, values, kept_logits, dq, dp);
    });
  });
}

}  // namespace tether::cuda
