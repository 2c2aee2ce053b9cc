// Rows of logits at their kept ids of tether::cuda on teams of host threads (see host_kernels.cc).

#include "logits/support_cuda.h"
#include "logits/support_program.h"
#include "tests/device_types.h"
#include "tests/host_team.h"

namespace tether::cuda {
namespace {

constexpr HostRun<kSupportThreads> kRun;

}  // namespace

void support_statistics(const ConstLogits& logits, const int64_t* targets, const KeptIds& kept,
                        const RowOptions& options, const RowResults& results, Stream) {
  const auto in = row_parameters<false>(logits, targets, options);
  with_device_type(logits.dtype, [&]<class Stored>(Stored) {
    kRun(logits.rows, [&](const auto& team, int64_t row) {
      support_statistics_program<Stored>(team, in, kept, row, results);
    });
  });
}

void support_gradients(const ConstLogits& logits, const int64_t* targets, const KeptIds& kept,
                       const RowOptions& options, const RowState* states, const float* dlogps,
                       const float* dentropies, float* memory, const MutableLogits& dlogits,
                       Stream) {
  const auto in = row_parameters<false>(logits, targets, options);
  with_device_type(logits.dtype, [&]<class Stored>(Stored) {
    kRun(logits.rows, [&](const auto& team, int64_t row) {
      support_gradient_program<Stored>(team, in, kept, row, 1, states, dlogps, dentropies, memory,
                                       dlogits);
    });
  });
}

void support_kl(const ConstLogits& q, const ConstLogits& p, const KeptIds& kept, double temperature,
                const uint8_t* active, const PairKlArrays<const float>& upstream,
                const PairKlArrays<float>& values, float* memory, const MutableLogits& dq,
                const MutableLogits& dp, Stream) {
  const auto in = pair_parameters(q, p, temperature, active);
  with_device_type(q.dtype, [&]<class Stored>(Stored) {
    for (int64_t row = 0; row < q.rows; ++row) {
      support_kl_program<Stored>(HostCluster<kSupportThreads>{}, in, kept, row, upstream, values,
                                 memory, dq, dp);
    }
  });
}

}  // namespace tether::cuda
