#include <string>
#include <type_traits>

#include "core/check.h"
#include "core/cuda_launch.h"
#include "logits/row_program.h"
#include "logits/rows_cuda.h"

namespace tether::cuda {
namespace {

// Blocks on a multiprocessor: the registers that a thread may use are 65536 over its threads.
template <bool kCapped>
constexpr int kForwardBlocks = kCapped ? 2 : 4;
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

void check_rows(const std::string& function, const ConstLogits& logits, const RowOptions& options) {
  check_fields(function, options);
  require(logits.vocabulary >= 1, [&] {
    return function + ": logits must have a vocabulary of at least 1, got " +
           text(logits.vocabulary);
  });
  require(options.ids == 0, [&] {
    return function + ": ids must be 0 on a CUDA device, which has no shards, got " +
           text(options.ids);
  });
  if (logits.rows > 0) require_memory(function, "logits", logits.data);
}

// body.operator()<Stored, kCapped>()
template <class Body>
void with_types(const std::string& function, DType dtype, const RowOptions& options, Body body) {
  const auto with = [&]<class Stored>(Stored) {
    options.softcap > 0 ? body.template operator()<Stored, true>()
                        : body.template operator()<Stored, false>();
  };
  switch (dtype) {
    case DType::float32:
      return with(float{});
    case DType::bfloat16:
      return with(BFloat16{});
    case DType::float16:
      return with(Float16{});
    default:
      throw Error(function +
                  ": logits must be float32, bfloat16 or float16 on a CUDA device, got " +
                  std::string(name_of(dtype)));
  }
}

}  // namespace

void row_statistics(const ConstLogits& logits, const int64_t* targets, const RowOptions& options,
                    const RowResults& results, Stream stream) {
  const std::string function = "row_statistics";
  check_rows(function, logits, options);
  const bool wants_all = results.sums_of_squared_p != nullptr || results.mean_logits != nullptr;
  require(!wants_all || options.sums == RowSums::all, [&] {
    return function + ": sums must be all for sums_of_squared_p and mean_logits, got less";
  });
  with_types(function, logits.dtype, options, [&]<class Stored, bool kCapped>() {
    const auto in = row_parameters<kCapped>(logits, targets, options);
    // Few softcaps are in use: one kind of sums is enough for them.
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
  with_types(function, logits.dtype, options, [&]<class Stored, bool kCapped>() {
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
