#include "libtorch/discounted_returns.h"

#include <ATen/ops/empty.h>

#include "libtorch/arrays.h"
#include "libtorch/token_checks.h"

namespace tether {

at::Tensor discounted_returns(const ReturnsBatch& batch, const DiscountedReturns& options) {
  const std::string_view function = "discounted_returns";
  const at::Tensor& rewards = batch.rewards;
  detail::check_rows(function, "rewards", rewards, batch.offsets);
  detail::check_constant(function, "rewards", rewards);
  detail::check_rows_mask(function, batch.response_mask, "rewards", rewards);
  const at::Tensor offsets = detail::checked_offsets(function, batch.offsets, rewards, "rewards");
  const at::Tensor in = rewards.detach().cpu();
  const at::Tensor mask = detail::as_weights(batch.response_mask).cpu();
  const RowLayout layout = detail::layout_of(in, offsets);
  at::Tensor bootstrap;
  if (batch.bootstrap.defined()) {
    detail::check_floating(function, "bootstrap", batch.bootstrap);
    detail::check_device(function, "bootstrap", batch.bootstrap, "rewards", rewards);
    detail::check_constant(function, "bootstrap", batch.bootstrap);
    const bool fits = batch.bootstrap.dim() == 1 && batch.bootstrap.size(0) == layout.rows;
    detail::check_value(fits, detail::named(function, "bootstrap") + " must be [" +
                                  text(layout.rows) + "], got " +
                                  detail::shape_text(batch.bootstrap.sizes()));
    bootstrap = batch.bootstrap.cpu().unsqueeze(1);
  }
  const at::Tensor out = at::empty(in.sizes(), at::dtype(in.scalar_type()));
  return detail::with_value_errors([&] {
    discounted_returns(layout, detail::token_array(in), detail::token_array(mask),
                       bootstrap.defined() ? detail::row_array(bootstrap) : ConstArray{}, options,
                       detail::mutable_token_array(out));
    return out.to(rewards.device());
  });
}

}  // namespace tether
