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
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    tether::python::Name name{std::string(data, length)};
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
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

// body(); its errors, which begin with the name of the callee, begin with the caller's.
template <class Body>
auto in_name_of(const std::string& caller, std::string_view callee, Body body) {
  try {
    return body();
  } catch (const Error& error) {
    std::string sentence = error.what();
    if (sentence.starts_with(std::string(callee) + ":")) sentence.replace(0, callee.size(), caller);
    throw std::invalid_argument(sentence);
  }
}

inline Executor torch_executor() {
  return {.run = [](void*, int64_t tasks, Executor::Task task, void* argument) {
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) task(argument, i);
    });
  }};
}

// none: a type that kernels do not know.
inline DType dtype_of(ScalarType type) {
  switch (type) {
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
    case ScalarType::Int:
      return DType::int32;
    case ScalarType::Long:
      return DType::int64;
    default:
      return DType::none;
  }
}

// Contiguous memory on the host. torch::stable::empty finds its operator by name, which takes as
// long as the loss of a few rows.
inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType type) {
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) {
    strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
  }
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), dtype,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional(torch::stable::contiguous(*tensor)) : std::nullopt;
}

// ---- memory: a direct call of an operator stays inside it ---------------------------------------

// `count` numbers of a contiguous tensor; Number is double, float or int64_t, const or not.
template <class Number>
Number* numbers_of(std::string_view function, std::string_view name, const Tensor& tensor,
                   int64_t count) {
  constexpr bool single = std::is_same_v<std::remove_const_t<Number>, float>;
  constexpr bool integer = std::is_integral_v<Number>;
  constexpr ScalarType type = integer  ? ScalarType::Long
                              : single ? ScalarType::Float
                                       : ScalarType::Double;
  require(tensor.scalar_type() == type && tensor.is_contiguous() && tensor.numel() == count, [&] {
    return std::string(function) + ": " + std::string(name) + " must be " + text(count) +
           (integer  ? " int64"
            : single ? " float32"
                     : " float64") +
           " numbers side by side";
  });
  if constexpr (std::is_const_v<Number>) {
    return static_cast<Number*>(tensor.const_data_ptr());
  } else {
    return static_cast<Number*>(tensor.mutable_data_ptr());
  }
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
  const Tensor out = empty({static_cast<int64_t>(values.size())}, ScalarType::Double);
  auto* next = static_cast<double*>(out.mutable_data_ptr());
  for (const auto& [name, value] : values) *next++ = value;
  return out;
}

}  // namespace tether::python
