#include "libtorch/generalized_advantage.h"

#include <ATen/ops/empty.h>

#include "libtorch/arrays.h"
#include "libtorch/executor.h"
#include "libtorch/token_checks.h"

namespace tether {
namespace {

constexpr std::string_view kFunction = "generalized_advantage_estimation";

void check_like_rewards(std::string_view name, const at::Tensor& tensor,
                        const at::Tensor& rewards) {
  if (tensor.sizes() == rewards.sizes()) return;
  detail::check_value(false, detail::named(kFunction, name) + " must be " +
                                 detail::shape_text(rewards.sizes()) + " like rewards, got " +
                                 detail::shape_text(tensor.sizes()));
}

void check_constants(const GaeBatch& batch) {
  const auto check = [](std::string_view name, const at::Tensor& tensor) {
    if (!tensor.defined()) return;
    detail::check_floating(kFunction, name, tensor);
    detail::check_constant(kFunction, name, tensor);
  };
  check("rewards", batch.rewards);
  check("values", batch.values);
  check("bootstrap", batch.bootstrap);
  check("truncation_values", batch.truncation_values);
  check("lambdas", batch.lambdas);
}

// Keeps what its arrays point to.
class Views {
 public:
  explicit Views(const GaeBatch& batch) {
    const at::Tensor& rewards = batch.rewards;
    offsets_ = detail::checked_offsets(kFunction, batch.offsets, rewards, "rewards");
    arrays_.layout = detail::layout_of(rewards, offsets_);
    arrays_.rewards = tokens("rewards", batch.rewards, rewards);
    arrays_.values = tokens("values", batch.values, rewards);
    arrays_.response_mask = tokens("response_mask", batch.response_mask, rewards);
    arrays_.done = tokens("done", batch.done, rewards);
    arrays_.truncated = tokens("truncated", batch.truncated, rewards);
    arrays_.truncation_values = tokens("truncation_values", batch.truncation_values, rewards);
    arrays_.bootstrap = per_row("bootstrap", batch.bootstrap, rewards);
    const bool shared = batch.lambdas.defined() && batch.lambdas.sizes() != rewards.sizes();
    arrays_.lambdas = shared ? per_row("lambdas", batch.lambdas, rewards)
                             : tokens("lambdas", batch.lambdas, rewards);
  }
  const GaeArrays& arrays() const { return arrays_; }

 private:
  const at::Tensor& kept(const at::Tensor& tensor) {
    const bool integers = at::isIntegralType(tensor.scalar_type(), /*includeBool=*/false);
    kept_.push_back(integers ? tensor.to(at::kFloat).cpu() : tensor.detach().cpu());
    return kept_.back();
  }
  ConstArray tokens(std::string_view name, const at::Tensor& tensor, const at::Tensor& rewards) {
    if (!tensor.defined()) return {};
    detail::check_device(kFunction, name, tensor, "rewards", rewards);
    check_like_rewards(name, tensor, rewards);
    return detail::token_array(kept(tensor));
  }
  ConstArray per_row(std::string_view name, const at::Tensor& tensor, const at::Tensor& rewards) {
    if (!tensor.defined()) return {};
    detail::check_device(kFunction, name, tensor, "rewards", rewards);
    const int64_t rows = arrays_.layout.rows;
    if (tensor.dim() != 1 || tensor.size(0) != rows) {
      detail::check_value(false, detail::named(kFunction, name) + " must be [" + text(rows) +
                                     "], got " + detail::shape_text(tensor.sizes()));
    }
    return detail::row_array(kept(tensor).unsqueeze(1));
  }

  std::vector<at::Tensor> kept_;
  at::Tensor offsets_;
  GaeArrays arrays_;
};

}  // namespace

AdvantagesAndReturns generalized_advantage_estimation(const GaeBatch& batch, const Gae& options) {
  detail::check_given(kFunction, "rewards", batch.rewards);
  const int64_t dimensions = batch.offsets.defined() ? 1 : 2;
  if (batch.rewards.dim() != dimensions) {
    detail::check_value(false, detail::named(kFunction, "rewards") +
                                   " must be [B, T], or [N] with offsets, got " +
                                   detail::shape_text(batch.rewards.sizes()));
  }
  check_constants(batch);
  return detail::with_value_errors([&] {
    const Views views(batch);
    const auto like = at::dtype(batch.rewards.scalar_type());
    const at::Tensor advantages = at::empty(batch.rewards.sizes(), like);
    const at::Tensor returns = at::empty(batch.rewards.sizes(), like);
    generalized_advantage_estimation(views.arrays(), options,
                                     detail::mutable_token_array(advantages),
                                     detail::mutable_token_array(returns), torch_executor());
    const auto device = batch.rewards.device();
    return AdvantagesAndReturns{advantages.to(device), returns.to(device)};
  });
}

}  // namespace tether
