#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <type_traits>

#include "../core/arguments.h"
#include "../core/batch.h"
#include "../core/check.h"

// The arrays of a function as tensors of a face: checks and views, made from the function's own
// list (core/arguments.h), the same for at::Tensor, torch's stable tensor and Eigen arrays. What a
// face knows of its tensors it says by specialising Access.

namespace tether::face {

// The type of a tensor's elements: `dtype` is none where kernels do not know it.
struct Element {
  DType dtype = DType::none;
  bool integer = false;
  bool index = false;  // int32 or int64
  std::string name = {};

  bool floating() const { return is_floating(dtype); }
};

// Of every face:
//   static Element element(const Tensor&)
//   static std::string device(const Tensor&)
//   static void check_gradient(function, name, const Tensor&, Flow)   where tensors have one
template <class Tensor>
struct Access;

// Of the first dimensions.
template <class Tensor>
std::string shape_text(const Tensor& tensor, int64_t dimensions) {
  std::string out;
  for (int64_t d = 0; d < dimensions; ++d) out += (d ? ", " : "") + text(tensor.size(d));
  return in_brackets(out);
}
template <class Tensor>
std::string shape_text(const Tensor& tensor) {
  return shape_text(tensor, tensor.dim());
}

template <class Tensor>
bool same_shape(const Tensor& a, const Tensor& b) {
  bool same = a.dim() == b.dim();
  for (int64_t d = 0; same && d < a.dim(); ++d) same = a.size(d) == b.size(d);
  return same;
}

// All dimensions of `like` but its last.
template <class Tensor>
bool same_leading(const Tensor& tensor, const Tensor& like) {
  bool same = tensor.dim() >= like.dim() - 1;
  for (int64_t d = 0; same && d + 1 < like.dim(); ++d) same = tensor.size(d) == like.size(d);
  return same;
}

// The tensor that the others of a call are like.
template <class Tensor>
struct Like {
  std::string_view name;
  const Tensor& tensor;
  Shape shape;
  bool packed;
  int64_t rows;
};

// ---- checks: of presence, type, device, shape and gradient, in this order -----------------------

// [B], or [B, 1] where `column`.
template <class Tensor>
bool is_per_row(const Tensor& tensor, int64_t rows, bool column) {
  if constexpr (requires { tensor.is_per_row(rows); }) {
    return tensor.is_per_row(rows);
  } else {
    const bool narrow = column && tensor.dim() == 2 && tensor.size(1) == 1;
    return (tensor.dim() == 1 || narrow) && tensor.size(0) == rows;
  }
}

template <class Tensor>
void check_kind(const std::string& where, std::string_view name, Kind kind, const Tensor& tensor,
                const Like<Tensor>& like) {
  const Element element = Access<Tensor>::element(tensor);
  const auto must = [&](bool holds, std::string_view rule) {
    require_type(holds,
                 [&] { return where + " must be " + std::string(rule) + ", got " + element.name; });
  };
  if (kind == Kind::flags) return must(element.dtype == DType::boolean, "bool");
  if (kind == Kind::ids) return must(element.index, "int32 or int64");
  if (kind == Kind::same) {
    const std::string wanted = Access<Tensor>::element(like.tensor).name;
    return must(element.name == wanted, wanted + " like " + std::string(like.name));
  }
  if (kind == Kind::mask && (element.integer || element.dtype == DType::boolean)) return;
  if (kind == Kind::counts)
    return must(element.floating() || element.integer, "floating or integer");
  must(element.floating(), "float32, float64, bfloat16 or float16");
  if (kind != Kind::narrow || element.dtype != DType::float64) return;
  const Element arithmetic = Access<Tensor>::element(like.tensor);
  require_type(arithmetic.dtype == DType::float64, [&] {
    return where + " must not be wider than " + std::string(like.name) + ", " + arithmetic.name +
           ", got float64. Pass " + std::string(name) + ".to(torch.float32)";
  });
}

template <class Tensor>
void check_device(const std::string& where, const Tensor& tensor, const Like<Tensor>& like) {
  const std::string got = Access<Tensor>::device(tensor);
  const std::string device = Access<Tensor>::device(like.tensor);
  require(got == device, [&] {
    return where + " must be on " + device + " like " + std::string(like.name) + ", got " + got;
  });
}

// " like logits [4, 8]"
template <class Tensor>
std::string like_text(const Like<Tensor>& like) {
  return " like " + std::string(like.name) + " " + shape_text(like.tensor);
}

template <class Tensor>
std::string rule_of_shape(Shape shape, const Like<Tensor>& like) {
  switch (shape) {
    case Shape::rows:
      return like.packed ? "[N] with offsets" : "[B, T], or [N] with offsets";
    case Shape::elements:
      return "[B, T] or [N]";
    case Shape::answers:
      return "[B]";
    case Shape::per_row:
      return in_brackets(text(like.rows));
    case Shape::either:
      return in_brackets(text(like.rows)) + " or " + shape_text(like.tensor);
    case Shape::logits:
      return "[..., V] with V at least 1";
    case Shape::hidden:
      return "[..., H] with H at least 1";
    case Shape::positions:
      return shape_text(like.tensor, like.tensor.dim() - 1) + like_text(like);
    case Shape::heads:
      return "[..., k]" + like_text(like);
    case Shape::weight:
      return "[V, " + text(like.tensor.size(like.tensor.dim() - 1)) + "] with V at least 1, for " +
             std::string(like.name) + " " + shape_text(like.tensor);
    case Shape::bias:
      return in_brackets(text(like.tensor.size(0))) + " like the rows of " + std::string(like.name);
    case Shape::tokens:
      break;
  }
  return shape_text(like.tensor) + " like " + std::string(like.name);
}

template <class Tensor>
bool has_shape(Shape shape, const Tensor& tensor, const Like<Tensor>& like) {
  switch (shape) {
    case Shape::rows:
      return tensor.dim() == (like.packed ? 1 : 2);
    case Shape::elements:
      return tensor.dim() == 1 || tensor.dim() == 2;
    case Shape::answers:
      return tensor.dim() == 1;
    case Shape::per_row:
      return is_per_row(tensor, like.rows, false);
    case Shape::either:
      return is_per_row(tensor, like.rows, true) || same_shape(tensor, like.tensor);
    case Shape::logits:
    case Shape::hidden:
      return tensor.dim() >= 1 && tensor.size(tensor.dim() - 1) >= 1;
    case Shape::positions:
      return tensor.dim() == like.tensor.dim() - 1 && same_leading(tensor, like.tensor);
    case Shape::heads:
      return tensor.dim() == like.tensor.dim() && same_leading(tensor, like.tensor);
    case Shape::weight:
      return tensor.dim() == 2 && tensor.size(0) >= 1 &&
             tensor.size(1) == like.tensor.size(like.tensor.dim() - 1);
    case Shape::bias:
      return tensor.dim() == 1 && tensor.size(0) == like.tensor.size(0);
    case Shape::tokens:
      break;
  }
  return same_shape(tensor, like.tensor);
}

template <class Tensor>
void check_shape(const std::string& where, Shape shape, const Tensor& tensor,
                 const Like<Tensor>& like) {
  require(has_shape(shape, tensor, like), [&] {
    return where + " must be " + rule_of_shape(shape, like) + ", got " + shape_text(tensor);
  });
  const bool one_a_row = shape == Shape::either && is_per_row(tensor, like.rows, false);
  const bool twofold = like.rows > 0 && one_a_row && same_shape(tensor, like.tensor);
  require(!like.packed || !twofold, [&] {
    return where + " must be [" + text(like.rows) + ", 1] where there are as many rows as tokens" +
           ", got " + shape_text(tensor) + ". It may be read in two ways";
  });
}

template <class Rule, class Tensor>
void check_argument(std::string_view function, const Rule& rule, const Tensor& tensor,
                    const Like<Tensor>& like) {
  const bool given = tensor.defined();
  if (!given && rule.use == Use::optional) return;
  const std::string where = named(function, rule.name);
  require(given, [&] { return where + " must be given, got none"; });
  check_kind(where, rule.name, rule.kind, tensor, like);
  check_device(where, tensor, like);
  check_shape(where, rule.shape, tensor, like);
  if constexpr (requires { Access<Tensor>::check_gradient(where, rule.name, tensor, Flow{}); }) {
    Access<Tensor>::check_gradient(where, rule.name, tensor, rule.flow);
  }
}

template <class Tensor>
void check_offsets(std::string_view function, const Tensor& offsets, const Like<Tensor>& like) {
  const std::string where = named(function, "offsets");
  check_kind(where, "offsets", Kind::ids, offsets, like);
  require(offsets.dim() == 1 && offsets.size(0) >= 1,
          [&] { return where + " must be [B + 1], got " + shape_text(offsets); });
  check_device(where, offsets, like);
}

template <class Batch>
constexpr bool kHasOffsets = false;
template <template <class> class Inputs, class Tensor>
  requires requires(Inputs<Tensor> batch) { batch.offsets.dim(); }
constexpr bool kHasOffsets<Inputs<Tensor>> = true;

// The rows of a batch of tokens.
template <template <class> class Inputs, class Tensor>
int64_t count_rows(const Inputs<Tensor>& batch) {
  if constexpr (kHasOffsets<Inputs<Tensor>>) {
    if (batch.offsets.defined()) return batch.offsets.size(0) - 1;
  }
  const Tensor& first = batch.*Inputs<Tensor>::arguments()[0].member;
  return first.dim() > 0 ? first.size(0) : 0;
}

// Throws unless every array is what the function's list says.
template <template <class> class Inputs, class Tensor>
void check_arguments(std::string_view function, const Inputs<Tensor>& batch) {
  const auto list = Inputs<Tensor>::arguments();
  const Tensor& first = batch.*list[0].member;
  Like<Tensor> like{list[0].name, first, list[0].shape, false, 0};
  if constexpr (kHasOffsets<Inputs<Tensor>>) like.packed = batch.offsets.defined();
  check_argument(function, list[0], first, like);
  if constexpr (kHasOffsets<Inputs<Tensor>>) {
    if (like.packed) check_offsets(function, batch.offsets, like);
  }
  like.rows = count_rows(batch);
  for (size_t i = 1; i < list.size(); ++i) {
    const auto* of = &list[0];
    for (const auto& other : list) of = other.name == list[i].like ? &other : of;
    const Like<Tensor> like_of{of->name, batch.*of->member, of->shape, like.packed, like.rows};
    check_argument(function, list[i], batch.*list[i].member, like_of);
  }
}

// ---- views --------------------------------------------------------------------------------------

// A value per token, [B, T] or [N].
template <class Array, class Tensor, class Pointer>
Array token_view(const Tensor& tensor, Pointer* data) {
  const bool padded = tensor.dim() == 2;
  return {.data = data,
          .dtype = Access<Tensor>::element(tensor).dtype,
          .row_stride = padded ? tensor.stride(0) : 0,
          .column_stride = tensor.stride(padded ? 1 : 0)};
}
template <class Tensor>
ConstArray token_array(const Tensor& tensor) {
  return token_view<ConstArray>(tensor, tensor.const_data_ptr());
}
template <class Tensor>
MutableArray mutable_token_array(const Tensor& tensor) {
  return token_view<MutableArray>(tensor, tensor.mutable_data_ptr());
}

template <class Tensor>
ConstArray row_array(const Tensor& tensor) {
  int64_t stride = tensor.stride(0);
  if constexpr (requires { tensor.step_of_rows(); }) stride = tensor.step_of_rows();
  return {.data = tensor.const_data_ptr(),
          .dtype = Access<Tensor>::element(tensor).dtype,
          .row_stride = stride,
          .column_stride = 0,
          .per_row = true};
}

// The rows of `tokens`, of checked sizes. Offsets: contiguous, on the host, and referred to; their
// ends and order are checked here.
template <class Tensor>
RowLayout layout_of(std::string_view function, std::string_view name, const Tensor& tokens,
                    const Tensor& offsets) {
  if (!offsets.defined()) {
    if (tokens.dim() == 1) return {.rows = 1, .columns = tokens.size(0)};
    return {.rows = tokens.size(0), .columns = tokens.size(1)};
  }
  RowLayout layout{.rows = offsets.size(0) - 1};
  if (Access<Tensor>::element(offsets).name == "int32") {
    layout.offsets32 = static_cast<const int32_t*>(offsets.const_data_ptr());
  } else {
    layout.offsets64 = static_cast<const int64_t*>(offsets.const_data_ptr());
  }
  const int64_t first = layout.offset(0), last = layout.offset(layout.rows);
  require(first == 0 && last == tokens.size(0), [&] {
    return named(function, "offsets") + " must run from 0 to " + text(tokens.size(0)) +
           ", the size of " + std::string(name) + ", got " + text(first) + " to " + text(last);
  });
  check_layout(function, layout);
  return layout;
}

// Views of a batch whose rows lie so.
template <template <class> class Inputs, class Tensor>
Inputs<ConstArray> arrays_in(const RowLayout& layout, const Inputs<Tensor>& batch) {
  const auto from = Inputs<Tensor>::arguments();
  const auto to = Inputs<ConstArray>::arguments();
  const Tensor& first = batch.*from[0].member;
  Inputs<ConstArray> out;
  out.layout = layout;
  for (size_t i = 0; i < from.size(); ++i) {
    const Tensor& tensor = batch.*from[i].member;
    if (!tensor.defined()) continue;
    const bool per_row = from[i].shape == Shape::per_row ||
                         (from[i].shape == Shape::either && !same_shape(tensor, first));
    out.*to[i].member = per_row ? row_array(tensor) : token_array(tensor);
  }
  return out;
}

// A checked batch as the kernels see it. Refers to its tensors.
template <template <class> class Inputs, class Tensor>
Inputs<ConstArray> arrays_of(std::string_view function, const Inputs<Tensor>& batch) {
  const auto list = Inputs<Tensor>::arguments();
  Tensor offsets;
  if constexpr (kHasOffsets<Inputs<Tensor>>) offsets = batch.offsets;
  return arrays_in(layout_of(function, list[0].name, batch.*list[0].member, offsets), batch);
}

}  // namespace tether::face
