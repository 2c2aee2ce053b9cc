#pragma once

#include <string>

#include "../core/check.h"
#include "../core/cuda_doors.h"
#include "../core/cuda_launch.h"
#include "row_parts.h"
#include "stored_rows.h"

// What the doors of kernels on rows of logits share, for .cu files.

namespace tether::cuda {

inline void check_rows(const std::string& function, const ConstLogits& logits,
                       const RowOptions& options) {
  check_fields(function, options);
  require(logits.vocabulary >= 1, [&] {
    return function + ": logits must have a vocabulary of at least 1, got " +
           text(logits.vocabulary);
  });
  const int64_t last = options.ids > 0 ? options.ids - logits.vocabulary : 0;
  require(options.first_id >= 0 && options.first_id <= last, [&] {
    return function + ": first_id must be in [0, " + text(last) + "], got " +
           text(options.first_id);
  });
  require(is_floating(logits.dtype) && logits.dtype != DType::float64, [&] {
    return function + ": logits must be float32, bfloat16 or float16 on a CUDA device, got " +
           std::string(name_of(logits.dtype));
  });
  if (logits.rows > 0) require_memory(function, "logits", logits.data);
}

inline void check_device_pair(const std::string& function, const ConstLogits& q,
                              const ConstLogits& p, double temperature) {
  rows::check_pair(function, q, p, temperature);
  require(is_floating(q.dtype) && q.dtype != DType::float64, [&] {
    return function + ": q must be float32, bfloat16 or float16 on a CUDA device, got " +
           std::string(name_of(q.dtype));
  });
  if (q.rows == 0) return;
  require_memory(function, "q", q.data);
  require_memory(function, "p", p.data);
}

inline void check_sums(const std::string& function, const RowOptions& options,
                       const RowResults& results) {
  const bool asked = results.sums_of_squared_p != nullptr || results.mean_logits != nullptr;
  require(!asked || options.sums == RowSums::all, [&] {
    return function + ": sums must be all for sums_of_squared_p and mean_logits, got less";
  });
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
