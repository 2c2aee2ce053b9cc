#pragma once

#include <array>
#include <cstddef>
#include <span>
#include <string_view>
#include <tuple>

#include "../../core/options.h"
#include "../batch_weight.h"

namespace tether {

enum class TurnsOf { row, batch };
inline constexpr std::array<std::string_view, 2> kTurnsOfNames{"row", "batch"};

// Makes turns count alike, however long they are: with these as token_weights, kl_weights and
// entropy_weights a mean over tokens is one over turns of means over their tokens.
//
//   over row     W_t = n_row / (turns of the row  n_turn)    of sequence_mean_token_mean
//   over batch   W_t = n / (turns of the batch  n_turn)      of token_mean
//
// n: the weights of the tokens.
struct TurnMean {
  TurnsOf over = TurnsOf::row;

  static constexpr BatchNeeds needs{.turns = true};
  static constexpr auto choices() {
    return std::tuple{choice("over", &TurnMean::over, kTurnsOfNames)};
  }

  void operator()(const BatchTokens& tokens, std::span<double> out) const {
    const auto weights_in = [&](size_t begin, size_t end) {
      double sum = 0;
      for (size_t i = begin; i < end; ++i) sum += tokens.weight[i];
      return sum;
    };
    const std::array whole{tokens.size()};
    const std::span<const size_t> parts =
        over == TurnsOf::row ? std::span<const size_t>(tokens.row_ends) : std::span(whole);
    size_t begin = 0, turn = 0;
    for (const size_t end : parts) {
      size_t last = turn;
      while (last < tokens.turn_ends.size() && tokens.turn_ends[last] <= end) ++last;
      const double each = weights_in(begin, end) / static_cast<double>(last - turn);
      for (; turn < last; ++turn) {
        const size_t turn_end = tokens.turn_ends[turn];
        const double weight = each / weights_in(begin, turn_end);
        for (; begin < turn_end; ++begin) out[begin] = weight;
      }
    }
  }
};

}  // namespace tether
