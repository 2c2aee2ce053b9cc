#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <vector>

#include "../../logits/statistics.h"
#include "../advantage.h"
#include "../fused_loss.h"
#include "../logits_rows.h"
#include "../policy_inputs.h"
#include "../preference_loss.h"
#include "../value_loss.h"

// The calls on CUDA tensors that have kernels (tether::cuda), where the build has them.

namespace tether::detail {

// The gradient of a loss by a result, undefined where that was not used.
using Upstream = std::optional<at::Tensor>;

// Some rows of logits of a batch.
struct LogitsOfTokens {
  at::Tensor logits;            // [C, V], contiguous, of the tokens `first`, `first` + 1 ...
  at::Tensor targets;           // int64 [N], contiguous, of all tokens, as these in float32:
  at::Tensor logps, entropies;  // the latter undefined if they are not asked for
  int64_t first;
  RowOptions row;
};

// Of checked arguments, whose offsets and ids nobody has looked at; nothing waits for the device.
// None where there is no kernel for the call: torch's operations do it.
struct CudaKernels {
  std::optional<ComputedLoss> (*policy_loss)(const PolicyBatch&, const PolicyObjective&,
                                             const Normalizer&, WantedGradients);
  bool (*has_policy_loss)(const PolicyBatch&, const PolicyObjective&, const Normalizer&);
  // The logits become the gradient of the loss there, and what they give is written beside. The
  // batch has no logps, whatever stands there. For losses that has_policy_loss, of tokens by
  // themselves and constants.
  void (*policy_gradient_of_logits)(const PolicyBatch&, const PolicyObjective&, const Normalizer&,
                                    const LogitsOfTokens&);
  // [3]: tokens under the surrogate, under the penalty, rows with tokens.
  std::optional<at::Tensor> (*local_counts)(const PolicyBatch&, const PolicyObjective&);

  // [2]: pairs, or answers with labels, and tokens of the NLL.
  std::optional<at::Tensor> (*pair_counts)(const PreferenceBatch&);
  std::optional<FusedResult> (*preference_loss)(const PreferenceBatch&, const PreferenceObjective&,
                                                const PairNormalizer&, bool with_gradient);
  bool (*has_preference_loss)(const PreferenceBatch&, const PreferenceObjective&,
                              const PairNormalizer&);
  std::optional<FusedResult> (*value_loss)(const ValueBatch&, const ValueObjective&,
                                           const Normalizer&, bool with_gradient);

  // Of logits [..., V] as rows.h takes them, not float64, over kept ids [..., K] in int64, side by
  // side, or, undefined, over all.
  void (*row_statistics)(const at::Tensor& logits, const at::Tensor& targets,
                         const at::Tensor& support, const RowOptions&, const RowsOnDevice& out);
  void (*row_gradients)(const at::Tensor& logits, const at::Tensor& targets,
                        const at::Tensor& support, const RowOptions&, const at::Tensor& states,
                        const RowUpstreams&, const at::Tensor& dlogits);

  // Of two such tensors, the three of CategoricalKl. The mask is undefined or contiguous; so are
  // the gradients that are wanted.
  std::vector<at::Tensor> (*categorical_kl)(const at::Tensor& q, const at::Tensor& p,
                                            const at::Tensor& support, double temperature,
                                            const at::Tensor& mask);
  void (*categorical_kl_gradients)(const at::Tensor& q, const at::Tensor& p,
                                   const at::Tensor& support, double temperature,
                                   const std::vector<Upstream>& upstreams, const at::Tensor& dq,
                                   const at::Tensor& dp);

  std::optional<AdvantagesAndReturns> (*advantage)(std::string_view function, const AdvantageBatch&,
                                                   const Recursion&);
  std::optional<at::Tensor> (*group_advantage)(std::string_view function, const GroupBatch&,
                                               const GroupRule&);
  at::Tensor (*whiten)(const WhiteningInputs<at::Tensor>&, const Whitening&);
};
extern const CudaKernels kCudaKernels;

// Those for this tensor, which may be undefined; null: it is elsewhere, or the build has none.
const CudaKernels* cuda_kernels(const at::Tensor& tensor);

}  // namespace tether::detail
