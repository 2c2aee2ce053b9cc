#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "core/batch.h"
#include "core/check.h"
#include "core/parallel.h"

// What the operators share: errors, threads and types on torch's stable ABI.

namespace tether::python {

// A string argument. torch's own conversion to std::string (2.13) leaks its copy.
struct Name {
  std::string text;
};

}  // namespace tether::python

template <>
struct torch::stable::detail::ToImpl<tether::python::Name> {
  static tether::python::Name call(StableIValue value, uint64_t, bool) {
    const auto handle = to<StringHandle>(value);
    size_t length = 0;
    const char* data = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    tether::python::Name name{std::string(data, length)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return name;
  }
};

namespace tether::python {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// An Error of the core has a type that only this library knows.
template <class Body>
auto with_public_errors(Body body) {
  try {
    return body();
  } catch (const Error& error) {
    throw std::invalid_argument(error.what());
  }
}

inline Executor torch_executor() {
  return {.run = [](void*, int64_t tasks, Executor::Task task, void* argument) {
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) task(argument, i);
    });
  }};
}

inline DType dtype_of(std::string_view function, std::string_view name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::Double:
      return DType::float64;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    case ScalarType::Bool:
      return DType::boolean;
    default:
      throw Error(std::string(function) + ": " + std::string(name) +
                  " must have a supported dtype");
  }
}

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional(torch::stable::contiguous(*tensor)) : std::nullopt;
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (a.size(i) != b.size(i)) return false;
  }
  return true;
}

// ---- memory: a direct call of an operator stays inside it ---------------------------------------

// `count` numbers of a contiguous tensor; Number is double or int64_t, const or not.
template <class Number>
Number* numbers_of(std::string_view function, std::string_view name, const Tensor& tensor,
                   int64_t count) {
  constexpr bool floating = std::is_floating_point_v<Number>;
  require(tensor.scalar_type() == (floating ? ScalarType::Double : ScalarType::Long) &&
              tensor.is_contiguous() && tensor.numel() == count,
          [&] {
            return std::string(function) + ": " + std::string(name) + " must be " + text(count) +
                   (floating ? " float64" : " int64") + " numbers side by side";
          });
  if constexpr (std::is_const_v<Number>) {
    return static_cast<Number*>(tensor.const_data_ptr());
  } else {
    return static_cast<Number*>(tensor.mutable_data_ptr());
  }
}

template <class Index>
void check_ends(std::string_view function, std::string_view name, const Index* offsets,
                int64_t rows, int64_t tokens) {
  require(offsets[0] == 0 && offsets[rows] == tokens, [&] {
    return std::string(function) + ": offsets must run from 0 to " + text(tokens) +
           ", the size of " + std::string(name) + ", got " + text(offsets[0]) + " to " +
           text(offsets[rows]);
  });
}

// The layout of `tokens`, which the call knows as `name`. Offsets: contiguous, and must outlive it.
inline RowLayout layout_of(std::string_view function, std::string_view name, const Tensor& tokens,
                           const std::optional<Tensor>& offsets) {
  const std::string where = std::string(function) + ": ";
  if (!offsets) {
    require(tokens.dim() == 2, [&] { return where + std::string(name) + " must be [B, T]"; });
    return {.rows = tokens.size(0), .columns = tokens.size(1)};
  }
  require(
      tokens.dim() == 1 && offsets->dim() == 1 && offsets->size(0) >= 1 && offsets->is_contiguous(),
      [&] { return where + std::string(name) + " must be [N] and offsets [B + 1]"; });
  RowLayout layout{.rows = offsets->size(0) - 1};
  if (offsets->scalar_type() == ScalarType::Int) {
    layout.offsets32 = static_cast<const int32_t*>(offsets->const_data_ptr());
    check_ends(function, name, layout.offsets32, layout.rows, tokens.size(0));
  } else {
    require(offsets->scalar_type() == ScalarType::Long,
            [&] { return where + "offsets must be int32 or int64"; });
    layout.offsets64 = static_cast<const int64_t*>(offsets->const_data_ptr());
    check_ends(function, name, layout.offsets64, layout.rows, tokens.size(0));
  }
  return layout;
}

// A value per token, [B, T] or [N].
template <class Array, class Pointer>
Array token_view(std::string_view function, std::string_view name, const Tensor& tensor,
                 Pointer* data) {
  const bool padded = tensor.dim() == 2;
  return {.data = data,
          .dtype = dtype_of(function, name, tensor),
          .row_stride = padded ? tensor.stride(0) : 0,
          .column_stride = tensor.stride(padded ? 1 : 0)};
}

inline ConstArray token_array(std::string_view function, std::string_view name,
                              const Tensor& tensor, std::string_view like_name,
                              const Tensor& like) {
  require(same_shape(tensor, like), [&] {
    return std::string(function) + ": " + std::string(name) + " must be of the shape of " +
           std::string(like_name);
  });
  return token_view<ConstArray>(function, name, tensor, tensor.const_data_ptr());
}

// ---- metrics: names once, values as a tensor; torch's lists of strings leak (2.13) --------------

// The float64 block of a loss.
template <size_t kSize>
void fill(std::string_view function, std::string_view name, const Tensor& tensor,
          std::array<double, kSize>& out) {
  const Tensor block = torch::stable::contiguous(tensor);
  std::copy_n(numbers_of<const double>(function, name, block, kSize), kSize, out.begin());
}

inline std::vector<std::string> names_of(const std::map<std::string, double>& values) {
  std::vector<std::string> out;
  for (const auto& [name, value] : values) out.push_back(name);
  return out;
}

inline Tensor values_of(const std::map<std::string, double>& values) {
  const Tensor out =
      torch::stable::empty({static_cast<int64_t>(values.size())}, ScalarType::Double);
  auto* next = static_cast<double*>(out.mutable_data_ptr());
  for (const auto& [name, value] : values) *next++ = value;
  return out;
}

}  // namespace tether::python
