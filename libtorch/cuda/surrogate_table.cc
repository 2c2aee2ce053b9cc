#include "libtorch/cuda/surrogate_table.h"

#include "rl/kernels/surrogate_table.h"

namespace tether {

void add_cuda_kernels(std::type_index formula, const cuda::SurrogateKernels& kernels) {
  cuda::add_kernels(formula, kernels);
}

bool has_cuda_kernels(std::type_index formula) { return cuda::has_kernels(formula); }

}  // namespace tether
