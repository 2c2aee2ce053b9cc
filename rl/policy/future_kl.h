#pragma once

#include <algorithm>
#include <cmath>
#include <span>

#include "../batch_weight.h"

namespace tether {

// FIPO: a token counts by how the rest of its answer has moved since the old policy.
//
//   W_t = clip(exp F_t, low, high),   F_t = u_t + gamma F_{t+1},   u = logp - old_logp
//
// u = 0 where the ratio is above ratio_high. Where A < 0 and the ratio is above safe_ratio, W_t is
// within [0.8, 1], in the paper 1. arXiv:2603.19835, eq. 6 and 7; defaults of ms-swift. As
// token_weights of ppo; gamma counts tokens: masked slots between them do not age, a token of a
// fractional weight counts as one.
struct FutureKl {
  double gamma = 0.97857206208770009;  // 2^(-1/32)
  double low = 1;
  double high = 1.2;
  double ratio_high = infinity;
  double safe_ratio = 4;

  static constexpr BatchNeeds needs{.logps = true, .old_logps = true, .advantages = true};
  static constexpr auto fields() {
    using Self = FutureKl;
    return std::tuple{field("gamma", &Self::gamma, {0, 1}),
                      field("low", &Self::low, {0, largest_option}),
                      field("high", &Self::high, {0, infinity, true}),
                      field("ratio_high", &Self::ratio_high, {0, infinity, true}),
                      field("safe_ratio", &Self::safe_ratio, {0, infinity, true})};
  }

  void operator()(const BatchTokens& tokens, std::span<double> out) const {
    size_t begin = 0;
    for (const size_t end : tokens.row_ends) {
      double future = 0;  // its ratio saturates
      for (size_t i = end; i-- > begin;) {
        const double u = tokens.logp[i] - tokens.old_logp[i], ratio = std::exp(u);
        future = (ratio > ratio_high ? 0 : u) + gamma * future;
        out[i] = std::min(std::max(exp_within(future), low), high);
        if (tokens.advantage[i] < 0 && ratio > safe_ratio) out[i] = std::clamp(out[i], 0.8, 1.0);
      }
      begin = end;
    }
  }
};

}  // namespace tether
