#include <libtorch/cuda/surrogate.h>

#include "my_surrogate.h"

TETHER_TORCH_CUDA_SURROGATE(MySurrogate);
