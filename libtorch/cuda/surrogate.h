#pragma once

#include <typeinfo>

#include "../../rl/kernels/surrogate_cuda.h"
#include "surrogate_table.h"

// The kernels of a surrogate of your own for CUDA tensors, in a .cu file of your own that links
// tether::tether, where that was built with TETHER_CUDA:
//
//   #include <libtorch/cuda/surrogate.h>
//   TETHER_TORCH_CUDA_SURROGATE(MySurrogate);
//
// From then on tether::policy_loss and local_counts of CUDA tensors run them for objectives with
// it, in every file of the program that knows the type, as they do for formulas of the catalogue.

namespace tether {

// What TETHER_TORCH_CUDA_SURROGATE does when the program is loaded (see register_surrogate).
template <TokenFormula Formula>
void register_cuda_surrogate() {
  add_cuda_kernels(typeid(Formula), cuda::kernels_for<Formula>());
}

}  // namespace tether

#define TETHER_TORCH_CUDA_SURROGATE(...) \
  TETHER_CUDA_LOADED(__COUNTER__, ::tether::register_cuda_surrogate, __VA_ARGS__)
