#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>

#include "check.h"

// Launches of kernels, for .cu files. The second number of their __launch_bounds__ is how many
// blocks a multiprocessor shall hold: of its own accord ptxas makes room for more, by spills.

namespace tether::cuda {

// Threads that a multiprocessor holds: 2048 of sm_80, 9x and 10x, fewer of others. More of them are
// not to be asked for: ptxas ignores that, with a warning.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 800 || \
    (__CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1100)
inline constexpr int kMultiprocessorThreads = 2048;
#else
inline constexpr int kMultiprocessorThreads = 1536;
#endif

inline void require_launched(std::string_view function) {
  const cudaError_t error = cudaGetLastError();
  require(error == cudaSuccess, [&] {
    return std::string(function) + ": CUDA must accept the launch, got " +
           cudaGetErrorString(error);
  });
}

// launch(first, blocks) for all of `tasks`, `blocks_of_each` each: a grid has 2^31 - 1 in its first
// dimension, and 65535 in the others, which are left alone.
template <class Launch>
void for_each_grid(int64_t tasks, int64_t blocks_of_each, Launch launch) {
  constexpr int64_t kLargestGrid = 0x7FFFFFFF;
  const int64_t at_once = kLargestGrid / blocks_of_each;
  for (int64_t first = 0; first < tasks; first += at_once) {
    launch(first, static_cast<unsigned>(std::min(at_once, tasks - first) * blocks_of_each));
  }
}

template <class Launch>
void launch_tasks(std::string_view function, int64_t tasks, int64_t blocks_of_each, Launch launch) {
  for_each_grid(tasks, blocks_of_each, [&](int64_t first, unsigned blocks) {
    launch(first, blocks);
    require_launched(function);
  });
}

// A kernel knows of clusters (cluster.h) where it was compiled for 9.0 or later. What the driver
// compiles for a newer device, from PTX of an older one, does not.
constexpr bool knows_clusters(bool device, int ptx_version) { return device && ptx_version >= 90; }

// Whether blocks of this kernel can run as clusters on the current device.
template <class... Parameters>
bool has_clusters(void (*kernel)(Parameters...)) {
  int current = 0, device = 0;
  cudaFuncAttributes compiled{};
  cudaGetDevice(&current);
  cudaDeviceGetAttribute(&device, cudaDevAttrClusterLaunch, current);
  cudaFuncGetAttributes(&compiled, reinterpret_cast<const void*>(kernel));
  cudaGetLastError();  // that there is no device is for the launch to say
  return knows_clusters(device != 0, compiled.ptxVersion);
}

// `cluster` blocks of them side by side.
template <class... Parameters, class... Arguments>
void launch_clusters(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, int cluster,
                     void* stream, const Arguments&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t launch{};
  launch.gridDim = blocks;
  launch.blockDim = threads;
  launch.stream = static_cast<cudaStream_t>(stream);
  launch.attrs = &attribute;
  launch.numAttrs = cluster > 1 ? 1 : 0;
  cudaLaunchKernelEx(&launch, kernel, arguments...);
}

}  // namespace tether::cuda
