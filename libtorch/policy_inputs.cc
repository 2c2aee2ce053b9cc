#include "libtorch/policy_inputs.h"

#include "libtorch/arrays.h"
#include "libtorch/cuda/kernels.h"
#include "libtorch/executor.h"
#include "libtorch/policy_loss.h"
#include "rl/kernels/policy_loss.h"

namespace tether {

Normalizer local_counts(const PolicyBatch& given, const PolicyObjective& objective) {
  const auto function = "local_counts";
  return detail::with_public_errors([&]() -> Normalizer {
    if (const auto* kernels = detail::cuda_kernels(given.logps)) {
      const PolicyBatch batch = detail::checked(function, given, detail::Offsets::as_they_are);
      if (const auto found = kernels->local_counts(batch, objective)) {
        const at::Tensor counts = found->cpu();
        const double* each = counts.const_data_ptr<double>();
        return {.policy = each[0], .kl = each[1], .sequences = each[2]};
      }
    }
    const PolicyBatch batch = detail::on_host(detail::checked(function, given));
    return local_counts(face::arrays_of(function, batch), objective, torch_executor());
  });
}

}  // namespace tether
