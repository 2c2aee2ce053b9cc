#include "libtorch/batch_weights.h"

#include <ATen/ops/empty.h>

#include "libtorch/arrays.h"
#include "rl/kernels/batch_weights.h"

namespace tether {

at::Tensor batch_weights(const BatchWeightBatch& given, const BatchWeight& rule) {
  constexpr std::string_view kFunction = "batch_weights";
  return detail::with_public_errors([&] {
    const BatchWeightBatch batch = detail::on_host(detail::checked(kFunction, given));
    const at::Tensor out = at::empty(batch.logps.sizes(), at::dtype(batch.logps.scalar_type()));
    batch_weights(kFunction, face::arrays_of(kFunction, batch), rule,
                  face::mutable_token_array(out));
    return out.to(given.logps.device());
  });
}

}  // namespace tether
