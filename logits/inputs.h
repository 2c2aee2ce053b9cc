#pragma once

#include <array>

#include "../core/arguments.h"

// The tensors of the functions on rows of logits, for the faces (core/arguments.h).

namespace tether {

// Log-probabilities of targets under softmax of logits.
template <class Array>
struct TokenLogpsInputs {
  Array logits = {};   // [..., V]
  Array targets = {};  // [...]

  static constexpr auto arguments() {
    using In = TokenLogpsInputs;
    using A = Argument<In, Array>;
    return std::array{A{"logits", &In::logits, Shape::logits, Kind::floating, Use::required,
                        Flow::differentiable},
                      A{"targets", &In::targets, Shape::positions, Kind::ids}};
  }
};

// The same of logits = hidden weight^T + bias.
template <class Array>
struct LinearLogpsInputs {
  Array hidden = {};   // [..., H]
  Array weight = {};   // [V, H]
  Array bias = {};     // [V]; absent: none
  Array targets = {};  // [...]
  // [..., K]: ids of a support that has been checked, padded with -1; absent: none. Not in the
  // list.
  Array support = {};

  static constexpr auto arguments() {
    using In = LinearLogpsInputs;
    using A = Argument<In, Array>;
    constexpr auto floating = Kind::floating;
    constexpr auto flows = Flow::differentiable;
    return std::array{A{"hidden", &In::hidden, Shape::hidden, floating, Use::required, flows},
                      A{"weight", &In::weight, Shape::weight, floating, Use::required, flows},
                      A{"bias", &In::bias, Shape::bias, floating, Use::optional, flows, "weight"},
                      A{"targets", &In::targets, Shape::positions, Kind::ids}};
  }
};

// Divergences of two rows of logits.
template <class Array>
struct CategoricalKlInputs {
  Array q_logits = {};  // [..., V]
  Array p_logits = {};  // like q_logits, in their type
  Array mask = {};      // [...]: positions that are 0 are not read; absent: all are

  static constexpr auto arguments() {
    using In = CategoricalKlInputs;
    using A = Argument<In, Array>;
    constexpr auto flows = Flow::differentiable;
    return std::array{
        A{"q_logits", &In::q_logits, Shape::logits, Kind::floating, Use::required, flows},
        A{"p_logits", &In::p_logits, Shape::tokens, Kind::same, Use::required, flows},
        A{"mask", &In::mask, Shape::positions, Kind::flags, Use::optional}};
  }
};

// Divergences from the head of a vocabulary and a sample of the rest; without a sample the last two
// are absent.
template <class Array>
struct TopKKlInputs {
  Array q_logits = {};      // [..., V]
  Array head_ids = {};      // [..., k]
  Array head_logps = {};    // like head_ids
  Array targets = {};       // [...]
  Array target_logps = {};  // like targets

  static constexpr auto arguments() {
    using In = TopKKlInputs;
    using A = Argument<In, Array>;
    constexpr auto floating = Kind::floating;
    constexpr auto optional = Use::optional;
    constexpr auto constant = Flow::constant;
    return std::array{
        A{"q_logits", &In::q_logits, Shape::logits, floating, Use::required, Flow::differentiable},
        A{"head_ids", &In::head_ids, Shape::heads, Kind::ids},
        A{"head_logps", &In::head_logps, Shape::tokens, floating, Use::required, constant,
          "head_ids"},
        A{"targets", &In::targets, Shape::positions, Kind::ids, optional},
        A{"target_logps", &In::target_logps, Shape::tokens, floating, optional, constant,
          "targets"}};
  }
};

// Log-probabilities of several ids a position.
template <class Array>
struct HeadLogpsInputs {
  Array logits = {};    // [..., V]
  Array head_ids = {};  // [..., k]

  static constexpr auto arguments() {
    using In = HeadLogpsInputs;
    using A = Argument<In, Array>;
    return std::array{A{"logits", &In::logits, Shape::logits, Kind::floating, Use::required,
                        Flow::differentiable},
                      A{"head_ids", &In::head_ids, Shape::heads, Kind::ids}};
  }
};

}  // namespace tether
