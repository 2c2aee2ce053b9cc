#pragma once

#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>

#include <array>
#include <cstring>

#include "arrays.h"
#include "stored_gradient.h"

// Losses of one differentiable input, whose gradient is found with the loss: backward is a scaling.

namespace tether::detail {

struct FusedResult {
  at::Tensor loss, gradient, sums;  // the gradient undefined where none is wanted
};

// By a kernel: run(gradient) gives its totals, and fills the gradient of `input` where there is
// one.
template <class Run>
FusedResult fused_on_cpu(const at::Tensor& input, bool with_gradient, Run run) {
  FusedResult out;
  MutableArray gradient;
  out.gradient = gradient_memory(with_gradient, input, gradient);
  const auto totals = run(gradient);
  const auto& sums = totals.metrics.sums;
  out.loss = result_scalar(totals.loss, input);
  out.sums = at::empty({static_cast<int64_t>(sums.size())}, at::dtype(at::kDouble));
  std::memcpy(out.sums.data_ptr(), sums.data(), sizeof(sums));
  return out;
}

// One call of a loss, whose name `Names` has for errors.
template <class Names, class Batch, class Objective, class Denominators>
class FusedLoss
    : public torch::autograd::Function<FusedLoss<Names, Batch, Objective, Denominators>> {
 public:
  using Compute = FusedResult (*)(const Batch&, const Objective&, const Denominators&,
                                  bool with_gradient);

  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& input,
                            Compute compute, const Batch* batch, const Objective* objective,
                            const Denominators* normalizer, at::Tensor* sums) {
    const FusedResult found = compute(*batch, *objective, *normalizer, input.requires_grad());
    *sums = found.sums;
    context->save_for_backward({found.gradient, input.requires_grad() ? input : at::Tensor()});
    return found.loss;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& upstream) {
    const torch::autograd::variable_list saved = context->get_saved_variables();
    return {scaled(Names::kFunction, upstream[0], saved[0], saved[1]), {}, {}, {}, {}, {}};
  }
};

}  // namespace tether::detail
