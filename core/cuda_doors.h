#pragma once

#include <cstdint>
#include <optional>
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

// Why a call has no kernel: the rule, and what was got.
struct NoKernel {
  std::string rule, got;
};

// None where it has one.
inline std::optional<NoKernel> no_kernel_unless(bool holds, std::string_view rule,
                                                std::string_view got) {
  if (holds) return std::nullopt;
  return NoKernel{std::string(rule), std::string(got)};
}

inline void require_kernel(std::string_view function, const std::optional<NoKernel>& lack) {
  require(!lack,
          [&] { return named(function, lack->rule) + " on a CUDA device, got " + lack->got; });
}
inline void require_kernel(bool holds, std::string_view function, std::string_view rule,
                           std::string_view got) {
  require_kernel(function, no_kernel_unless(holds, rule, got));
}

// What an array may hold: numbers of a kernel in float, or in double; weights and flags; ids.
enum class Numbers { narrow, wide, weights, ids };

// Of packed rows as many as the layout says.
inline int64_t elements_on_device(const RowLayout& layout) {
  return layout.packed() ? layout.columns : layout.rows * layout.columns;
}

inline std::optional<NoKernel> lacks_type(std::string_view name, DType dtype, Numbers numbers) {
  const bool floating = is_floating(dtype), is_double = dtype == DType::float64;
  const auto must = [&](bool legal, const char* types) {
    if (legal) return std::optional<NoKernel>();  // without a word
    return no_kernel_unless(false, std::string(name) + " must be " + types, name_of(dtype));
  };
  switch (numbers) {
    case Numbers::narrow:
      return must(floating && !is_double, "float32, bfloat16 or float16");
    case Numbers::wide:
      return must(floating, "float32, float64, bfloat16 or float16");
    case Numbers::weights:
      return must(!is_integer(dtype), "float32, float64, bfloat16, float16 or boolean");
    case Numbers::ids:
      return must(is_integer(dtype), "int32 or int64");
  }
  return std::nullopt;
}

inline void check_device_array(std::string_view function, std::string_view name, DType dtype,
                               const void* data, Numbers numbers, const RowLayout& layout) {
  require_kernel(function, lacks_type(name, dtype, numbers));
  if (elements_on_device(layout) > 0) require_memory(function, name, data);
}

// `numbers`: of the arrays that are neither weights nor flags nor ids.
inline Numbers numbers_of(Kind kind, Numbers numbers) {
  if (kind == Kind::ids) return Numbers::ids;
  const bool weights = kind == Kind::mask || kind == Kind::counts || kind == Kind::flags;
  return weights ? Numbers::weights : numbers;
}

// Of the first array whose type has no kernel.
template <class Inputs>
std::optional<NoKernel> lacks_types(const Inputs& batch, Numbers numbers) {
  std::optional<NoKernel> out;
  for (const auto& each : Inputs::arguments()) {
    const ConstArray& array = batch.*each.member;
    if (!out && array) out = lacks_type(each.name, array.dtype, numbers_of(each.kind, numbers));
  }
  return out;
}

template <class Inputs>
void check_device_inputs(std::string_view function, const Inputs& batch, Numbers numbers) {
  for (const auto& each : Inputs::arguments()) {
    const ConstArray& array = batch.*each.member;
    require(bool(array) || each.use == Use::optional,
            [&] { return named(function, each.name) + " must be given, got none"; });
    if (!array) continue;
    check_device_array(function, each.name, array.dtype, array.data, numbers_of(each.kind, numbers),
                       batch.layout);
  }
}

// Of a result that may be absent.
inline void check_device_result(std::string_view function, std::string_view name,
                                const MutableArray& array, Numbers numbers,
                                const RowLayout& layout) {
  if (array) check_device_array(function, name, array.dtype, array.data, numbers, layout);
}

}  // namespace tether::cuda
