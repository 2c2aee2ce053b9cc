#pragma once

#include <array>
#include <cstdint>
#include <string_view>

#include "batch.h"

// The arrays of a function, each declared once. The struct that holds them is a template over the
// array: ConstArray for kernels, the tensors of a face elsewhere. Beside its members it has
//
//   static constexpr auto arguments()   std::array of Argument<Inputs<Array>, Array>
//
// From this list come views and checks of every tensor type (face/arguments.h), the schemas of the
// Python operators and the checks of the Python functions.

namespace tether {

enum class Shape : uint8_t {
  rows,       // the tokens that the others are like: [B, T], or packed [N] with offsets
  tokens,     // like the rows, or the argument that `like` names
  per_row,    // [B]
  either,     // [B], [B, 1] or like the rows; refused where [B] may be read in two ways
  elements,   // what the others are like, where rows do not matter: [B, T] or [N]
  answers,    // what the others are like: [B]
  logits,     // what the others are like: [..., V], V at least 1
  hidden,     // what the others are like: [..., H], H at least 1
  positions,  // [...] of the logits or hidden states
  heads,      // [..., k]
  weight,     // [V, H] for hidden states
  bias,       // [V] for a weight
};

enum class Kind : uint8_t {
  floating,  // float32, float64, bfloat16 or float16
  narrow,    // one of them that is not wider than the rows, whose arithmetic it enters
  mask,      // weights in [0, 1]: floating, integer or bool
  counts,    // at least 0: floating or integer
  flags,     // bool
  ids,       // int32 or int64
  same,      // the type of what it is like
};

enum class Use : uint8_t { required, optional };
enum class Flow : uint8_t { constant, differentiable };

template <class Inputs, class Array>
struct Argument {
  std::string_view name;
  Array Inputs::* member;
  Shape shape;
  Kind kind = Kind::floating;
  Use use = Use::required;
  Flow flow = Flow::constant;
  std::string_view like = {};  // the argument that it is like; empty: the first
};

struct Nothing {};

// How the rows of a batch are told from each other: raw memory has a RowLayout beside it, tensors
// know their sizes, and have offsets where they are packed.
template <class Array>
struct RowsOf {
  using Layout = Nothing;
  using Offsets = Array;
};
template <>
struct RowsOf<ConstArray> {
  using Layout = RowLayout;
  using Offsets = Nothing;
};
template <class Array>
using LayoutOf = typename RowsOf<Array>::Layout;
template <class Array>
using OffsetsOf = typename RowsOf<Array>::Offsets;

// What a kernel asks of its arrays; the message begins with `function`.
template <class Inputs>
void check_inputs(std::string_view function, const Inputs& batch) {
  check_layout(function, batch.layout);
  for (const auto& each : Inputs::arguments()) {
    const ConstArray& array = batch.*each.member;
    if (each.use == Use::required) {
      check_given(function, each.name, batch.layout, array);
    } else {
      check_array(function, each.name, batch.layout, array);
    }
    const bool ids = each.kind == Kind::ids;
    require(!array || is_integer(array.dtype) == ids, [&] {
      return named(function, each.name) + " must be " +
             (ids ? "int32 or int64" : "a floating-point type or boolean") + ", got " +
             std::string(name_of(array.dtype));
    });
  }
}

// Which arrays are there: the rules that hang on it are functions of this.
template <class Array>
bool is_given(const Array& array) {
  if constexpr (requires { array.defined(); }) {
    return array.defined();
  } else {
    return bool(array);
  }
}
template <template <class> class Inputs, class Array>
Inputs<bool> presence_of(const Inputs<Array>& batch) {
  Inputs<bool> out;
  const auto from = Inputs<Array>::arguments();
  const auto to = Inputs<bool>::arguments();
  for (size_t i = 0; i < from.size(); ++i) out.*to[i].member = is_given(batch.*from[i].member);
  return out;
}

}  // namespace tether
