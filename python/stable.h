#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>

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

}  // namespace tether::python
