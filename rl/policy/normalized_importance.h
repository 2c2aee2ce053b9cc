#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <span>
#include <string_view>
#include <tuple>
#include <vector>

#include "../../core/options.h"
#include "../batch_weight.h"

namespace tether {

enum class ImportanceLevel { token, sequence_mean, sequence_sum, turn_mean, turn_sum };
inline constexpr std::array<std::string_view, 5> kImportanceLevelNames{
    "token", "sequence_mean", "sequence_sum", "turn_mean", "turn_sum"};

// What a ratio beyond its bounds counts as: the bound, or 0.
enum class BeyondBounds { truncated, masked };
inline constexpr std::array<std::string_view, 2> kBeyondBoundsNames{"truncated", "masked"};

// Importance weights of the mismatch between trainer and engine within bounds, divided by their
// mean over the batch: the step keeps its length, whatever the mismatch.
//
//   W = rho / mean rho,   rho = clamp(e^x, low, high),   x = old_logp - rollout_logp
//
// or, `beyond` masked, rho = e^x where low <= e^x <= high, else 0, as IcePop has it; where all are
// 0 they stay 0. At the levels of sequences or turns x is its sum or mean over the answer or the
// turn, and the mean that of answers or turns, one weight for each.
// The self-normalised estimator: biased, by 1 / the size of the batch, of less variance. verl,
// rollout_is_batch_normalize; turns are as its answers.
struct NormalizedImportance {
  double low = 0;
  double high = 2;
  ImportanceLevel level = ImportanceLevel::token;
  BeyondBounds beyond = BeyondBounds::truncated;

  BatchNeeds needs() const {
    return {.old_logps = true, .rollout_logps = true, .turns = is_of_turns()};
  }
  static constexpr auto fields() {
    using Self = NormalizedImportance;
    return std::tuple{field("low", &Self::low, {0, largest_option}),
                      field("high", &Self::high, {0, infinity, true})};
  }
  static constexpr auto choices() {
    using Self = NormalizedImportance;
    return std::tuple{choice("level", &Self::level, kImportanceLevelNames),
                      choice("beyond", &Self::beyond, kBeyondBoundsNames)};
  }

  void operator()(const BatchTokens& tokens, std::span<double> out) const {
    BatchTokens counted{.weight = tokens.weight};
    for (size_t i = 0; i < out.size(); ++i) out[i] = tokens.old_logp[i] - tokens.rollout_logp[i];
    if (level != ImportanceLevel::token) {
      share(is_of_turns() ? tokens.turn_ends : tokens.row_ends, counted, out);
    }
    for (double& each : out) {
      const double ratio = exp_within(each), inside = std::min(std::max(ratio, low), high);
      each = beyond == BeyondBounds::truncated || ratio == inside ? inside : 0;
    }
    const double mean = mean_of(counted, out);
    for (double& each : out) each /= mean > 0 ? mean : 1;
  }

 private:
  bool is_of_turns() const {
    return level == ImportanceLevel::turn_mean || level == ImportanceLevel::turn_sum;
  }

  // The x of an answer or turn at each of its tokens, which together count as one.
  void share(const std::vector<size_t>& ends, BatchTokens& tokens, std::span<double> x) const {
    const bool is_mean =
        level == ImportanceLevel::sequence_mean || level == ImportanceLevel::turn_mean;
    size_t begin = 0;
    for (const size_t end : ends) {
      double n = 0, sum = 0;
      for (size_t i = begin; i < end; ++i) {
        n += tokens.weight[i];
        sum += tokens.weight[i] * x[i];
      }
      for (; begin < end; ++begin) {
        x[begin] = is_mean ? sum / n : sum;
        tokens.weight[begin] /= n;
      }
    }
  }
};

}  // namespace tether
