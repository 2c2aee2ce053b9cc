#pragma once

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <string>
#include <vector>

#include "libtorch/categorical_kl.h"

namespace tether {

// The three values of call(q, p), and the gradients of a mixture of them.
template <class Call>
std::vector<at::Tensor> results(const Call& call, const at::Tensor& q_logits,
                                const at::Tensor& p_logits) {
  const at::Tensor q = q_logits.detach().requires_grad_(), p = p_logits.detach().requires_grad_();
  const CategoricalKl out = call(q, p);
  const at::Tensor a = at::linspace(-0.5, 2, out.kl.numel(), at::kDouble).view(out.kl.sizes());
  const at::Tensor loss =
      (out.kl * a + out.reverse_kl * (0.3 - a) + out.entropies * (1.7 - a)).sum();
  std::vector<at::Tensor> all = {out.kl.detach(), out.reverse_kl.detach(), out.entropies.detach()};
  for (const at::Tensor& each : torch::autograd::grad({loss}, {q, p})) all.push_back(each);
  return all;
}

inline void expect_same(const std::vector<at::Tensor>& got, const std::vector<at::Tensor>& want,
                        double tolerance, const std::string& what = "") {
  for (size_t i = 0; i < want.size(); ++i) {
    ASSERT_EQ(got[i].sizes(), want[i].sizes()) << what;
    EXPECT_TRUE(at::allclose(got[i].to(at::kDouble), want[i].to(at::kDouble), tolerance, tolerance))
        << what << ", result " << i;
  }
}

}  // namespace tether
