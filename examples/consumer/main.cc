// Two prompts, two answers each, of three tokens: their GRPO loss and its gradient.
#include <ATen/ATen.h>
#include <libtorch/tether.h>

#include <iostream>

int main() {
  const at::Tensor logps = (at::arange(1, 13).reshape({4, 3}) / -10).requires_grad_();
  const at::Tensor rewards = at::tensor({1.0f, 0.0f, 0.2f, 0.8f});
  const at::Tensor response_mask = at::ones({4, 3});
  const at::Tensor old_logps = at::full({4, 3}, -0.6);
  const at::Tensor ref_logps = at::full({4, 3}, -0.7);

  const tether::PolicyBatch batch{
      .logps = logps,                                                    // [B, T], requires grad
      .advantages = tether::group_advantage(rewards, /*group_size=*/2),  // [B], of rewards [B]
      .response_mask = response_mask,                                    // [B, T]
      .old_logps = old_logps,
      .ref_logps = ref_logps};
  const tether::LossOutput output = tether::grpo_loss(batch, /*beta=*/0.04);
  output.loss.backward();

  std::cout << "loss " << output.loss.item<double>() << "\ngradient\n" << logps.grad() << '\n';
}
