#include <rl/kernels/surrogate_cuda.h>

#include "my_surrogate.h"

TETHER_CUDA_SURROGATE(MySurrogate);
