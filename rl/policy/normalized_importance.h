#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <span>
#include <string_view>
#include <tuple>

#include "../../core/options.h"
#include "../batch_weight.h"

namespace tether {

enum class ImportanceLevel { token, sequence_mean, sequence_sum };
inline constexpr std::array<std::string_view, 3> kImportanceLevelNames{"token", "sequence_mean",
                                                                       "sequence_sum"};

// Truncated importance weights of the mismatch between trainer and engine, divided by their mean
// over the batch: the step keeps its length, whatever the mismatch.
//
//   W = rho / mean rho,   rho = clamp(e^x, low, high),   x = old_logp - rollout_logp
//
// At the levels of sequences x is its sum or mean over the answer, and the mean that of answers,
// one weight for each.
// The self-normalised estimator: biased, by 1 / the size of the batch, of less variance. verl,
// rollout_is_batch_normalize.
struct NormalizedImportance {
  double low = 0;
  double high = 2;
  ImportanceLevel level = ImportanceLevel::token;

  static constexpr BatchNeeds needs{.old_logps = true, .rollout_logps = true};
  static constexpr auto fields() {
    using Self = NormalizedImportance;
    return std::tuple{field("low", &Self::low, {0, largest_option}),
                      field("high", &Self::high, {0, infinity, true})};
  }
  static constexpr auto choices() {
    return std::tuple{choice("level", &NormalizedImportance::level, kImportanceLevelNames)};
  }

  void operator()(const BatchTokens& tokens, std::span<double> out) const {
    BatchTokens counted{.weight = tokens.weight, .row_ends = tokens.row_ends};
    for (size_t i = 0; i < out.size(); ++i) out[i] = tokens.old_logp[i] - tokens.rollout_logp[i];
    if (level != ImportanceLevel::token) share_rows(counted, out);
    for (double& each : out) each = std::min(std::max(exp_within(each), low), high);
    const double mean = mean_of(counted, out);
    for (double& each : out) each /= mean;
  }

 private:
  // The x of an answer at each of its tokens, which together count as one.
  void share_rows(BatchTokens& tokens, std::span<double> x) const {
    size_t begin = 0;
    for (const size_t end : tokens.row_ends) {
      double n = 0, sum = 0;
      for (size_t i = begin; i < end; ++i) {
        n += tokens.weight[i];
        sum += tokens.weight[i] * x[i];
      }
      for (; begin < end; ++begin) {
        x[begin] = level == ImportanceLevel::sequence_mean ? sum / n : sum;
        tokens.weight[begin] /= n;
      }
    }
  }
};

}  // namespace tether
