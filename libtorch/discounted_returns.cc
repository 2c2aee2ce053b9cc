#include "libtorch/discounted_returns.h"

#include <ATen/ops/empty.h>

#include "libtorch/arrays.h"

namespace tether {

at::Tensor discounted_returns(const ReturnsBatch& given, const DiscountedReturns& options) {
  const auto function = "discounted_returns";
  return detail::with_public_errors([&] {
    const ReturnsBatch batch = detail::on_host(detail::checked(function, given));
    const at::Tensor out = at::empty(batch.rewards.sizes(), at::dtype(batch.rewards.scalar_type()));
    discounted_returns(face::arrays_of(function, batch), options, face::mutable_token_array(out));
    return out.to(given.rewards.device());
  });
}

}  // namespace tether
