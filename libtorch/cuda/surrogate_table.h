#pragma once

#include <typeindex>

namespace tether {

namespace cuda {
struct SurrogateKernels;  // rl/kernels/policy_launch_cuda.h
}

// Those that CUDA tensors take, beside the catalogue's (surrogate.h). From any thread.
void add_cuda_kernels(std::type_index formula, const cuda::SurrogateKernels& kernels);
bool has_cuda_kernels(std::type_index formula);

}  // namespace tether
