#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <string_view>

#include "../core/batch.h"

// What every loss over token rows asks of its tensors. Each throws before anything is computed.

namespace tether::detail {

// "function: name"
std::string named(std::string_view function, std::string_view name);

void check_given(std::string_view function, std::string_view name, const at::Tensor& tensor);
// [B, T], or packed [N] with offsets.
void check_shape_of_logps(std::string_view function, const at::Tensor& logps,
                          const at::Tensor& offsets);
void check_width(std::string_view function, std::string_view name, const at::Tensor& tensor,
                 const at::Tensor& logps);
// Like logps in shape and place.
void check_tokens(std::string_view function, std::string_view name, const at::Tensor& tensor,
                  const at::Tensor& logps);
void check_optional_tokens(std::string_view function, std::string_view name,
                           const at::Tensor& tensor, const at::Tensor& logps);
void check_constant_tokens(std::string_view function, std::string_view name,
                           const at::Tensor& tensor, const at::Tensor& logps);

// Rows of floating-point tokens, [B, T], or packed [N] with offsets; and their mask.
void check_rows(std::string_view function, std::string_view name, const at::Tensor& rows,
                const at::Tensor& offsets);
void check_rows_mask(std::string_view function, const at::Tensor& mask, std::string_view like_name,
                     const at::Tensor& like);
// In a type that the loops take: integers as float32.
at::Tensor as_weights(const at::Tensor& mask);

at::Tensor checked_mask(std::string_view function, const at::Tensor& mask, const at::Tensor& logps);
// On the CPU, contiguous, from 0 to N in order. `like` is called `like_name`.
at::Tensor checked_offsets(std::string_view function, const at::Tensor& given,
                           const at::Tensor& like, std::string_view like_name = "logps");

// Refers to the offsets.
RowLayout layout_of(const at::Tensor& logps, const at::Tensor& offsets);

}  // namespace tether::detail
