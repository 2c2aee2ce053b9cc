#include "libtorch/cuda/kernels.h"

#include <ATen/ops/empty.h>

#include <vector>

#include "face/device_arrays.h"
#include "face/loss_on_device.h"
#include "libtorch/arrays.h"
#include "libtorch/cuda/on_device.h"
#include "libtorch/stored_gradient.h"

namespace tether::detail {
namespace {

at::Tensor doubles_beside(const at::Tensor& tensor, int64_t count) {
  return at::empty({count}, at::dtype(at::kDouble).device(tensor.device()));
}

// ---- losses -------------------------------------------------------------------------------------

// The float64 numbers that a loss of `input` leaves, the loss first.
template <class Objective>
at::Tensor totals_of(const face::LossOnDevice<Objective>& loss, const at::Tensor& input,
                     const std::vector<MutableArray>& gradients) {
  const OnDevice device(face::LossKernels<Objective>::kFunction, input);
  const at::Tensor totals = doubles_beside(input, loss.kNumbers);
  const at::Tensor memory = doubles_beside(input, loss.memory());
  loss.run(nullptr, gradients, totals.data_ptr<double>(), memory.data_ptr<double>(), device.stream);
  return totals;
}

at::Tensor loss_in(const at::Tensor& totals) { return totals.select(0, 0).to(at::kFloat); }

std::optional<ComputedLoss> policy_loss_on_cuda(const PolicyBatch& batch,
                                                const PolicyObjective& objective,
                                                const Normalizer& normalizer,
                                                WantedGradients wanted) {
  const PolicyArrays arrays = face::device_arrays(batch);
  if (!face::has_loss_on_device(arrays, objective, normalizer)) return std::nullopt;
  const face::LossOnDevice loss(arrays, objective, normalizer);
  ComputedLoss out;
  std::vector<MutableArray> gradients(2);
  out.dlogps = gradient_memory(wanted.logps, batch.logps, gradients[0]);
  out.dentropies = gradient_memory(wanted.entropies, batch.entropies, gradients[1]);
  const at::Tensor totals = totals_of(loss, batch.logps, gradients);
  constexpr int64_t kSums = 2 * PolicyMetrics::kSums;
  out.loss = loss_in(totals);
  out.metrics.sums = totals.narrow(0, 1, kSums).view({PolicyMetrics::kSums, 2});
  out.metrics.maxima = totals.narrow(0, 1 + kSums, PolicyMetrics::kMaxima);
  return out;
}

std::optional<at::Tensor> local_counts_on_cuda(const PolicyBatch& batch,
                                               const PolicyObjective& objective) {
  const PolicyArrays arrays = face::device_arrays(batch);
  if (!face::has_loss_on_device(arrays, objective, Normalizer{})) return std::nullopt;
  const OnDevice device("local_counts", batch.logps);
  const at::Tensor counts = doubles_beside(batch.logps, 3);
  const int64_t bytes = cuda::policy_workspace_bytes(arrays, objective);
  const at::Tensor memory = doubles_beside(batch.logps, (bytes + 7) / 8);
  cuda::local_counts(arrays, objective, counts.data_ptr<double>(), memory.data_ptr(),
                     device.stream);
  return counts;
}

}  // namespace

const CudaKernels kCudaKernels{
    .policy_loss = policy_loss_on_cuda,
    .local_counts = local_counts_on_cuda,
};

}  // namespace tether::detail
