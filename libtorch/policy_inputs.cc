#include "libtorch/policy_inputs.h"

#include "libtorch/arrays.h"
#include "libtorch/executor.h"
#include "libtorch/policy_loss.h"
#include "rl/kernels/policy_loss.h"

namespace tether {

Normalizer local_counts(const PolicyBatch& given, const PolicyObjective& objective) {
  const auto function = "local_counts";
  return detail::with_public_errors([&] {
    const PolicyBatch batch = detail::on_host(detail::checked(function, given));
    return local_counts(face::arrays_of(function, batch), objective, torch_executor());
  });
}

}  // namespace tether
