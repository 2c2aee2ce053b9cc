#pragma once

#include <typeindex>

// Which formulas of surrogates have kernels on a device: those of the catalogue, and others that
// were added, from any thread.

namespace tether::cuda {

struct SurrogateKernels;  // policy_launch_cuda.h

void add_kernels(std::type_index formula, const SurrogateKernels& kernels);
bool has_kernels(std::type_index formula);

}  // namespace tether::cuda
