// Two prompts, two answers each, of three tokens: their GRPO loss and its gradient.
#include <ATen/ATen.h>
#include <libtorch/tether.h>

#include <iostream>

int main() {
  const at::Tensor logps = (at::arange(1, 13).reshape({4, 3}) / -10).requires_grad_();
  const at::Tensor rewards = at::tensor({1.0f, 0.0f, 0.2f, 0.8f});
  const tether::PolicyBatch batch{
      .logps = logps,
      .advantages = tether::group_advantage(rewards, /*group_size=*/2),
      .response_mask = at::ones({4, 3}),
      .old_logps = at::full({4, 3}, -0.6),
      .ref_logps = at::full({4, 3}, -0.7),
  };
  const tether::LossOutput output = tether::grpo_loss(batch, /*beta=*/0.04);
  output.loss.backward();
  std::cout << "loss " << output.loss.item<double>() << "\ngradient\n" << logps.grad() << '\n';
}
