// A loss of one's own on the CPU and, where there is a device, by its kernels.
#include <cuda_runtime_api.h>
#include <rl/kernels/policy_loss.h>
#include <rl/kernels/policy_loss_cuda.h>
#include <rl/policy/grpo.h>

#include <iostream>
#include <vector>

#include "my_surrogate.h"

constexpr int kRows = 2, kTokens = 3;

struct Tokens {
  const float *logps, *old_logps, *advantages, *mask;

  tether::PolicyArrays arrays() const {
    const auto tokens = [](const float* data) {
      return tether::ConstArray{
          .data = data, .dtype = tether::DType::float32, .row_stride = kTokens};
    };
    return {.layout = {.rows = kRows, .columns = kTokens},
            .logps = tokens(logps),
            .advantages = tokens(advantages),
            .response_mask = tokens(mask),
            .old_logps = tokens(old_logps)};
  }
};

template <class Number>
Number* on_device(const std::vector<Number>& numbers) {
  void* out = nullptr;
  cudaMalloc(&out, numbers.size() * sizeof(Number));
  cudaMemcpy(out, numbers.data(), numbers.size() * sizeof(Number), cudaMemcpyHostToDevice);
  return static_cast<Number*>(out);
}

int main() {
  const std::vector<float> logps(6, -1), old_logps(6, -1.1f), advantages{1, 1, 1, -0.5, -0.5, -0.5},
      mask(6, 1);
  const Tokens host{logps.data(), old_logps.data(), advantages.data(), mask.data()};
  tether::PolicyObjective objective = tether::presets::grpo();
  objective.surrogate = MySurrogate{.strength = 2};
  std::cout << "loss " << tether::policy_loss(host.arrays(), objective, {}, {}).loss << '\n';

  tether::cuda::check_supported("consumer", host.arrays(), objective);
  std::cout << "it has kernels\n";
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess) return 0;

  const Tokens device{on_device(logps), on_device(old_logps), on_device(advantages),
                      on_device(mask)};
  const auto batch = device.arrays();
  auto* totals = on_device(std::vector<tether::PolicyTotals>(1));
  const auto bytes = tether::cuda::policy_workspace_bytes(batch, objective);
  auto* workspace = on_device(std::vector<char>(static_cast<size_t>(bytes)));
  tether::cuda::policy_loss(batch, objective, /*counts=*/nullptr, /*factor=*/1, {}, totals,
                            workspace, /*stream=*/nullptr);
  tether::PolicyTotals found;
  cudaMemcpy(&found, totals, sizeof(found), cudaMemcpyDeviceToHost);
  std::cout << "loss on the device " << found.loss << '\n';
}
