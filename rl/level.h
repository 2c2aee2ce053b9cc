#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "../core/fields.h"
#include "../core/macros.h"

namespace tether {

// Tokens that share a number: one alone, those of a turn, those of a row. A turn is a piece of its
// row, told from the others by `turn_ids`; without them each run of the response mask is one.
enum class Segment : uint8_t { token, turn, row };

// The level at which an objective compares the policy with the old one. A surrogate sees its log-
// ratio L_t in place of the token's own u_t = logp_t - old_logp_t; w_t is the response mask and
// n = sum_t w_t, over the tokens of the segment, a row or a turn.
//
//   token            L_t = u_t                                    PPO, GRPO
//   sequence_mean    L_t = sum_s w_s u_s / n                      GSPO, arXiv:2507.18071, eq. 7
//   sequence_token   L_t = u_t - sg(u_t) + sg(sequence_mean)      GSPO-token, the same, eq. 14
//   sequence_sum     L_t = sum_s w_s u_s                          RLOO, arXiv:2402.14740
//   turn_mean, turn_token, turn_sum: the same over the tokens of a turn (ROLL, segment ratio)
//
// d L_t / d logp_s is 1 for s = t; w_s / n; 1 for s = t; w_s. Where one number stands for the
// segment, so does its log-probability: logp is the mean, or the sum, of its tokens'. Each token
// then carries the segment's loss with its own weight and advantage, so that every aggregation
// means the same at all levels, and sequence_mean_token_mean gives each sequence its loss once.
enum class RatioLevel {
  token,
  sequence_mean,
  sequence_token,
  sequence_sum,
  turn_mean,
  turn_token,
  turn_sum
};

struct LevelRule {
  std::string_view name;
  Segment segment;
  bool is_mean;  // over n, else the sum
  bool shared;   // with its gradient, else as a constant beside the token's own
};

inline constexpr std::array kLevelRules{
    LevelRule{"token", Segment::token, false, false},
    LevelRule{"sequence_mean", Segment::row, true, true},
    LevelRule{"sequence_token", Segment::row, true, false},
    LevelRule{"sequence_sum", Segment::row, false, true},
    LevelRule{"turn_mean", Segment::turn, true, true},
    LevelRule{"turn_token", Segment::turn, true, false},
    LevelRule{"turn_sum", Segment::turn, false, true},
};

constexpr const LevelRule& rule_of(RatioLevel level) {
  return kLevelRules[static_cast<size_t>(level)];
}

inline constexpr auto kRatioLevelNames = [] {
  std::array<std::string_view, kLevelRules.size()> out;
  for (size_t i = 0; i < out.size(); ++i) out[i] = kLevelRules[i].name;
  return out;
}();

// What a token's own log-ratio counts as before it is added up with those of its segment: bounded
// on the side that its advantage asks for. Beyond, the token has no gradient, through its
// log-probability neither.
//
//   min(u, high) where A >= 0,   max(u, -low) where A < 0                                   [nats]
//
// GMPO, arXiv:2507.20673, eq. 4.
struct LogRatioClip {
  double low = infinity;  // off
  double high = infinity;

  TETHER_INLINE constexpr bool is_on() const { return low < infinity || high < infinity; }
};

// NaN where u is no number, which a bound would hide.
TETHER_INLINE double clipped(double u, double advantage, const LogRatioClip& clip) {
  const double above = u < -clip.low ? -clip.low : u, below = u > clip.high ? clip.high : u;
  return (advantage < 0 ? above : below) + u * 0;
}

// Whether all tokens of a segment share one log-ratio that depends on all their log-probabilities.
constexpr bool shares_ratio(RatioLevel level) { return rule_of(level).shared; }

}  // namespace tether
