#include "libtorch/token_checks.h"

#include <string>

#include "core/check.h"
#include "libtorch/arrays.h"

namespace tether::detail {

std::string named(std::string_view function, std::string_view name) {
  return std::string(function) + ": " + std::string(name);
}

void check_given(std::string_view function, std::string_view name, const at::Tensor& tensor) {
  if (!tensor.defined()) check_value(false, named(function, name) + " must be given, got none");
}

void check_shape_of_logps(std::string_view function, const at::Tensor& logps,
                          const at::Tensor& offsets) {
  const int64_t dimensions = offsets.defined() ? 1 : 2;
  if (logps.dim() == dimensions) return;
  check_value(false, named(function, "logps") +
                         (dimensions == 1 ? " must be [N] with offsets"
                                          : " must be [B, T], or [N] with offsets") +
                         ", got " + shape_text(logps.sizes()));
}

// Arithmetic is in float32, or in float64 with logps; nothing is rounded to enter it.
void check_width(std::string_view function, std::string_view name, const at::Tensor& tensor,
                 const at::Tensor& logps) {
  if (tensor.scalar_type() != at::kDouble || logps.scalar_type() == at::kDouble) return;
  check_type(false, named(function, name) + " must not be wider than logps, " +
                        dtype_text(logps.scalar_type()) + ", got float64. Pass " +
                        std::string(name) + ".to(torch.float32)");
}

void check_tokens(std::string_view function, std::string_view name, const at::Tensor& tensor,
                  const at::Tensor& logps) {
  check_device(function, name, tensor, "logps", logps);
  if (tensor.sizes() == logps.sizes()) return;
  check_value(false, named(function, name) + " must be " + shape_text(logps.sizes()) +
                         " like logps, got " + shape_text(tensor.sizes()));
}

void check_optional_tokens(std::string_view function, std::string_view name,
                           const at::Tensor& tensor, const at::Tensor& logps) {
  if (!tensor.defined()) return;
  check_floating(function, name, tensor);
  check_width(function, name, tensor, logps);
  check_tokens(function, name, tensor, logps);
}

void check_constant_tokens(std::string_view function, std::string_view name,
                           const at::Tensor& tensor, const at::Tensor& logps) {
  check_optional_tokens(function, name, tensor, logps);
  if (tensor.defined()) check_constant(function, name, tensor);
}

void check_rows(std::string_view function, std::string_view name, const at::Tensor& rows,
                const at::Tensor& offsets) {
  check_given(function, name, rows);
  check_floating(function, name, rows);
  if (rows.dim() == (offsets.defined() ? 1 : 2)) return;
  check_value(false, named(function, name) +
                         (offsets.defined() ? " must be [N] with offsets"
                                            : " must be [B, T], or [N] with offsets") +
                         ", got " + shape_text(rows.sizes()));
}

namespace {

void check_weights(std::string_view function, const at::Tensor& mask) {
  const at::ScalarType type = mask.scalar_type();
  if (!at::isIntegralType(type, /*includeBool=*/true)) {
    check_floating(function, "response_mask", mask);
  }
  check_constant(function, "response_mask", mask);
}

}  // namespace

void check_rows_mask(std::string_view function, const at::Tensor& mask, std::string_view like_name,
                     const at::Tensor& like) {
  check_given(function, "response_mask", mask);
  check_device(function, "response_mask", mask, like_name, like);
  check_weights(function, mask);
  if (mask.sizes() == like.sizes()) return;
  check_value(false, named(function, "response_mask") + " must be " + shape_text(like.sizes()) +
                         " like " + std::string(like_name) + ", got " + shape_text(mask.sizes()));
}

at::Tensor as_weights(const at::Tensor& mask) {
  const bool integers = at::isIntegralType(mask.scalar_type(), /*includeBool=*/false);
  return integers ? mask.to(at::kFloat) : mask;
}

at::Tensor checked_mask(std::string_view function, const at::Tensor& mask,
                        const at::Tensor& logps) {
  check_given(function, "response_mask", mask);
  check_tokens(function, "response_mask", mask, logps);
  check_weights(function, mask);
  return as_weights(mask);
}

at::Tensor checked_offsets(std::string_view function, const at::Tensor& given,
                           const at::Tensor& like, std::string_view like_name) {
  if (!given.defined()) return {};
  const at::ScalarType type = given.scalar_type();
  if (type != at::kInt && type != at::kLong) {
    check_type(false,
               named(function, "offsets") + " must be int32 or int64, got " + dtype_text(type));
  }
  if (given.dim() != 1 || given.size(0) < 1) {
    check_value(false,
                named(function, "offsets") + " must be [B + 1], got " + shape_text(given.sizes()));
  }
  check_device(function, "offsets", given, like_name, like);
  const at::Tensor offsets = given.cpu().contiguous();
  const int64_t first = offsets[0].item<int64_t>(), last = offsets[-1].item<int64_t>();
  if (first != 0 || last != like.size(0)) {
    check_value(false, named(function, "offsets") + " must run from 0 to " + text(like.size(0)) +
                           ", the size of " + std::string(like_name) + ", got " + text(first) +
                           " to " + text(last));
  }
  with_value_errors([&] { check_layout(function, layout_of(like, offsets)); });
  return offsets;
}

RowLayout layout_of(const at::Tensor& logps, const at::Tensor& offsets) {
  if (!offsets.defined()) return {.rows = logps.size(0), .columns = logps.size(1)};
  RowLayout layout{.rows = offsets.size(0) - 1};
  if (offsets.scalar_type() == at::kInt) {
    layout.offsets32 = offsets.const_data_ptr<int32_t>();
  } else {
    layout.offsets64 = offsets.const_data_ptr<int64_t>();
  }
  return layout;
}

}  // namespace tether::detail
