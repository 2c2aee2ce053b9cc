#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "arguments.h"
#include "check.h"

// What the doors of CUDA kernels ask of arrays: all that can be said without looking into their
// memory, which is the device's.

namespace tether::cuda {

// Of an array that is not empty.
inline void require_memory(std::string_view function, std::string_view name, const void* data) {
  require(data != nullptr,
          [&] { return named(function, name) + " must have memory on the device, got none"; });
}

inline void require_kernel(bool holds, std::string_view function, std::string_view what,
                           std::string_view got) {
  require(holds,
          [&] { return named(function, what) + " on a CUDA device, got " + std::string(got); });
}

// What an array may hold: numbers of a kernel in float, or in double; weights and flags.
enum class Numbers { narrow, wide, weights };

// Of packed rows as many as the layout says.
inline int64_t elements_on_device(const RowLayout& layout) {
  return layout.packed() ? layout.columns : layout.rows * layout.columns;
}

inline void check_device_array(std::string_view function, std::string_view name, DType dtype,
                               const void* data, Numbers numbers, const RowLayout& layout) {
  const bool floating = is_floating(dtype), is_double = dtype == DType::float64;
  const auto must = [&](bool legal, const char* types) {
    require_kernel(legal, function, std::string(name) + " must be " + types, name_of(dtype));
  };
  switch (numbers) {
    case Numbers::narrow:
      must(floating && !is_double, "float32, bfloat16 or float16");
      break;
    case Numbers::wide:
      must(floating, "float32, float64, bfloat16 or float16");
      break;
    case Numbers::weights:
      must(!is_integer(dtype), "float32, float64, bfloat16, float16 or boolean");
      break;
  }
  if (elements_on_device(layout) > 0) require_memory(function, name, data);
}

// `numbers`: of the arrays that are neither weights nor flags.
template <class Inputs>
void check_device_inputs(std::string_view function, const Inputs& batch, Numbers numbers) {
  for (const auto& each : Inputs::arguments()) {
    const ConstArray& array = batch.*each.member;
    require(bool(array) || each.use == Use::optional,
            [&] { return named(function, each.name) + " must be given, got none"; });
    if (!array || each.kind == Kind::ids) continue;
    const bool weights =
        each.kind == Kind::mask || each.kind == Kind::counts || each.kind == Kind::flags;
    check_device_array(function, each.name, array.dtype, array.data,
                       weights ? Numbers::weights : numbers, batch.layout);
  }
}

// Of a result that may be absent.
inline void check_device_result(std::string_view function, std::string_view name,
                                const MutableArray& array, Numbers numbers,
                                const RowLayout& layout) {
  if (array) check_device_array(function, name, array.dtype, array.data, numbers, layout);
}

}  // namespace tether::cuda
