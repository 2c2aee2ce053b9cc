#pragma once

#include <string>

#include "../core/check.h"
#include "../core/cuda_doors.h"
#include "../core/cuda_launch.h"
#include "row_parts.h"

// What the doors of kernels on rows of logits share, for .cu files.

namespace tether::cuda {

inline void check_rows(const std::string& function, const ConstLogits& logits,
                       const RowOptions& options) {
  check_fields(function, options);
  require(logits.vocabulary >= 1, [&] {
    return function + ": logits must have a vocabulary of at least 1, got " +
           text(logits.vocabulary);
  });
  require(options.ids == 0, [&] {
    return function + ": ids must be 0 on a CUDA device, which has no shards, got " +
           text(options.ids);
  });
  require(is_floating(logits.dtype) && logits.dtype != DType::float64, [&] {
    return function + ": logits must be float32, bfloat16 or float16 on a CUDA device, got " +
           std::string(name_of(logits.dtype));
  });
  if (logits.rows > 0) require_memory(function, "logits", logits.data);
}

// body(Stored{}) for a type that has kernels.
template <class Body>
void with_stored(DType dtype, Body body) {
  if (dtype == DType::float32) body(float{});
  if (dtype == DType::bfloat16) body(BFloat16{});
  if (dtype == DType::float16) body(Float16{});
}

// body.operator()<Stored, kCapped>() for a type that check_rows lets through.
template <class Body>
void with_types(DType dtype, const RowOptions& options, Body body) {
  with_stored(dtype, [&]<class Stored>(Stored) {
    rows::is_capped(options) ? body.template operator()<Stored, true>()
                             : body.template operator()<Stored, false>();
  });
}

}  // namespace tether::cuda
