#pragma once

#include <array>
#include <string_view>

namespace tether {

// The level at which an objective compares the policy with the old one. A surrogate sees its log-
// ratio L_t in place of the token's own u_t = logp_t - old_logp_t; w_t is the response mask and
// n = sum_t w_t, over the tokens of a row.
//
//   token            L_t = u_t                                    PPO, GRPO
//   sequence_mean    L_t = sum_s w_s u_s / n                      GSPO, arXiv:2507.18071, eq. 7
//   sequence_token   L_t = u_t - sg(u_t) + sg(sequence_mean)      GSPO-token, the same, eq. 14
//   sequence_sum     L_t = sum_s w_s u_s                          RLOO, arXiv:2402.14740
//
// d L_t / d logp_s is 1 for s = t; w_s / n; 1 for s = t; w_s. Where one number stands for the
// sequence, so does its log-probability: logp is the mean, or the sum, of the row's. Each token
// then carries the sequence's loss with its own weight and advantage, so that every aggregation
// means the same at all levels, and sequence_mean_token_mean gives each sequence its loss once.
enum class RatioLevel { token, sequence_mean, sequence_token, sequence_sum };

inline constexpr std::array<std::string_view, 4> kRatioLevelNames{"token", "sequence_mean",
                                                                  "sequence_token", "sequence_sum"};

// Whether all tokens of a row share one log-ratio that depends on all their log-probabilities.
constexpr bool shares_ratio(RatioLevel level) {
  return level == RatioLevel::sequence_mean || level == RatioLevel::sequence_sum;
}

}  // namespace tether
