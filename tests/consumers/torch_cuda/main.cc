// A loss of one's own of CUDA tensors: by its kernels where there is a device, without a formula
// for torch's operations.
#include <libtorch/cuda/surrogate_table.h>
#include <libtorch/tether.h>
#include <torch/cuda.h>
#include <torch/types.h>

#include <iostream>

#include "my_surrogate.h"

double loss_on(torch::Device device) {
  tether::PolicyObjective objective = tether::presets::grpo();
  objective.surrogate = MySurrogate{.strength = 2};
  const auto options = torch::dtype(torch::kFloat).device(device);
  const torch::Tensor logps = torch::full({2, 3}, -1.0, options);
  return tether::policy_loss({.logps = logps,
                              .advantages = torch::tensor({1.0, -0.5}, options),
                              .response_mask = torch::ones({2, 3}, options),
                              .old_logps = logps - 0.1},
                             objective)
      .loss.item<double>();
}

int main() {
  std::cout << "loss " << loss_on(torch::kCPU) << '\n';
  if (tether::has_cuda_kernels(typeid(MySurrogate))) std::cout << "it has kernels\n";
  if (torch::cuda::is_available()) {
    std::cout << "loss on the device " << loss_on(torch::kCUDA) << '\n';
  }
}
