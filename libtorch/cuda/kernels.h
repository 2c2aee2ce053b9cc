#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../policy_inputs.h"

// The calls on CUDA tensors that have kernels (tether::cuda), where the build has them.

namespace tether::detail {

// Of checked arguments, whose offsets nobody has looked at; nothing waits for the device. None
// where there is no kernel for the call: torch's operations do it.
struct CudaKernels {
  std::optional<ComputedLoss> (*policy_loss)(const PolicyBatch&, const PolicyObjective&,
                                             const Normalizer&, WantedGradients);
  // [3]: tokens under the surrogate, under the penalty, rows with tokens.
  std::optional<at::Tensor> (*local_counts)(const PolicyBatch&, const PolicyObjective&);
};
extern const CudaKernels kCudaKernels;

// Those for this tensor, which may be undefined; null: it is elsewhere, or the build has none.
const CudaKernels* cuda_kernels(const at::Tensor& tensor);

}  // namespace tether::detail
