#pragma once

namespace tether::cuda {

// A cudaStream_t; null: the default one.
using Stream = void*;

}  // namespace tether::cuda
