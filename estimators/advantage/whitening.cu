#include "core/check.h"
#include "core/cuda_doors.h"
#include "core/cuda_launch.h"
#include "estimators/advantage/whitening_cuda.h"
#include "estimators/advantage/whitening_program.h"

namespace tether::cuda {
namespace {

using Team = DeviceTeam<kWhiteningThreads>;

__global__ __launch_bounds__(kWhiteningThreads,
                             4) void moments_kernel(const __grid_constant__ WhiteningArrays batch,
                                                    int64_t pieces, int64_t first, Moments* parts) {
  moments_program(Team{}, batch, pieces, first + blockIdx.x, parts);
}

__global__ __launch_bounds__(kWhiteningThreads, 4) void merge_moments_kernel(const Moments* parts,
                                                                             int64_t count,
                                                                             Moments* out) {
  merge_moments_program(Team{}, parts, count, out);
}

__global__ __launch_bounds__(kWhiteningThreads, 6) void whitening_kernel(
    const __grid_constant__ WhiteningParameters in, const Moments* step, int64_t first) {
  whitening_program(Team{}, in, step, first + blockIdx.x);
}

}  // namespace

int64_t moments_workspace(const RowLayout& layout) { return layout.rows * pieces_of_rows(layout); }

void moments(const WhiteningArrays& batch, Moments* workspace, Moments* out, Stream stream) {
  const char* function = "moments";
  check_device_inputs(function, batch, Numbers::wide);
  if (batch.layout.rows > 0) require_memory(function, "workspace", workspace);
  const int64_t parts = moments_workspace(batch.layout), pieces = pieces_of_rows(batch.layout);
  launch_tasks(function, parts, 1, [&](int64_t first, unsigned blocks) {
    moments_kernel<<<blocks, kWhiteningThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        batch, pieces, first, workspace);
  });
  merge_moments(workspace, parts, out, stream);
}

void merge_moments(const Moments* parts, int64_t count, Moments* out, Stream stream) {
  const char* function = "moments";
  require_memory(function, "out", out);
  if (count > 0) require_memory(function, "parts", parts);
  merge_moments_kernel<<<1, kWhiteningThreads, 0, static_cast<cudaStream_t>(stream)>>>(parts, count,
                                                                                       out);
  require_launched(function);
}

void whiten(const WhiteningArrays& batch, const Moments* step, const Whitening& options,
            const MutableArray& out, Stream stream) {
  const char* function = "whiten";
  check_fields(function, options);
  check_device_inputs(function, batch, Numbers::wide);
  require(bool(out), [&] { return named(function, "out") + " must be given, got none"; });
  check_device_result(function, "out", out, Numbers::wide, batch.layout);
  require_memory(function, "step", step);
  const int64_t pieces = pieces_of_rows(batch.layout);
  const WhiteningParameters in{batch, out, options.epsilon, options.shift_mean, pieces};
  launch_tasks(function, batch.layout.rows * pieces, 1, [&](int64_t first, unsigned blocks) {
    whitening_kernel<<<blocks, kWhiteningThreads, 0, static_cast<cudaStream_t>(stream)>>>(in, step,
                                                                                          first);
  });
}

}  // namespace tether::cuda
