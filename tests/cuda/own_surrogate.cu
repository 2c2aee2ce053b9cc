#include <rl/kernels/surrogate_cuda.h>

#include "tests/rl/own_surrogate.h"

// A user's file of kernels.

TETHER_CUDA_SURROGATE(OwnSurrogate);

tether::Surrogate made_beside_its_kernels(double strength) { return OwnSurrogate{strength}; }
