#include <string>
#include <type_traits>

#include "core/check.h"
#include "core/cuda_doors.h"
#include "core/cuda_launch.h"
#include "logits/row_program.h"
#include "logits/row_types_cuda.h"
#include "logits/rows_cuda.h"

namespace tether::cuda {
namespace {

// Blocks on a multiprocessor: the registers that a thread may use are 65536 over its threads.
template <bool kCapped>
constexpr int kForwardBlocks = kCapped ? 2 : kMultiprocessorThreads / kForwardThreads;
template <bool kCapped>
constexpr int kBackwardBlocks = kCapped ? 4 : 6;

template <class Stored, bool kCapped, bool kAll>
__global__ __launch_bounds__(kForwardThreads, kForwardBlocks<kCapped>) void statistics_kernel(
    RowParameters<kCapped> in, int64_t first, RowResults out) {
  row_statistics_program<Stored, kCapped, kAll>(DeviceTeam<kForwardThreads>{}, in,
                                                first + blockIdx.x, out);
}

template <class Stored, bool kCapped>
__global__ __launch_bounds__(kBackwardThreads, kBackwardBlocks<kCapped>) void gradient_kernel(
    RowParameters<kCapped> in, int64_t first, int pieces, const RowState* states,
    const float* dlogps, const float* dentropies, MutableLogits dlogits) {
  const unsigned row = blockIdx.x / pieces, piece = blockIdx.x % pieces;
  row_gradient_program<Stored, kCapped>(DeviceTeam<kBackwardThreads>{}, in, first + row,
                                        static_cast<int>(piece), pieces, states, dlogps, dentropies,
                                        dlogits);
}

}  // namespace

void row_statistics(const ConstLogits& logits, const int64_t* targets, const RowOptions& options,
                    const RowResults& results, Stream stream) {
  const std::string function = "row_statistics";
  check_rows(function, logits, options);
  const bool wants_all = options.sums == RowSums::all;
  check_sums(function, options, results);
  with_types(logits.dtype, options, [&]<class Stored, bool kCapped>() {
    const auto in = row_parameters<kCapped>(logits, targets, options);
    // Few cap their logits: one kind of sums is enough for them.
    const auto launch = [&]<bool kAll>(std::bool_constant<kAll>) {
      launch_tasks(function, logits.rows, 1, [&](int64_t first, unsigned blocks) {
        statistics_kernel<Stored, kCapped, kAll>
            <<<blocks, kForwardThreads, 0, static_cast<cudaStream_t>(stream)>>>(in, first, results);
      });
    };
    if constexpr (kCapped) {
      launch(std::true_type{});
    } else {
      wants_all ? launch(std::true_type{}) : launch(std::false_type{});
    }
  });
}

void row_gradients(const ConstLogits& logits, const int64_t* targets, const RowOptions& options,
                   const RowState* states, const float* dlogps, const float* dentropies,
                   const MutableLogits& dlogits, Stream stream) {
  const std::string function = "row_gradients";
  check_rows(function, logits, options);
  if (logits.rows > 0) {
    require_memory(function, "states", states);
    require_memory(function, "dlogits", dlogits.data);
  }
  with_types(logits.dtype, options, [&]<class Stored, bool kCapped>() {
    const int pieces = pieces_of_row<Stored>(logits.vocabulary);
    const auto in = row_parameters<kCapped>(logits, targets, options);
    launch_tasks(function, logits.rows, pieces, [&](int64_t first, unsigned blocks) {
      gradient_kernel<Stored, kCapped>
          <<<blocks, kBackwardThreads, 0, static_cast<cudaStream_t>(stream)>>>(
              in, first, pieces, states, dlogps, dentropies, dlogits);
    });
  });
}

}  // namespace tether::cuda
