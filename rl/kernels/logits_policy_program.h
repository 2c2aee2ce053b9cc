#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "../../logits/held_row_program.h"
#include "../catalogue.h"
#include "logits_policy_loss_cuda.h"
#include "policy_program.h"

// The policy loss of one token from its row of logits, as a program of a team (core/cluster.h): the
// row's log-probability and entropy, by them the gradient of the loss, and by it that of the
// logits. What the tokens add up to is for policy_row_program, which finds the log-probabilities in
// memory then.

namespace tether::cuda {

template <size_t kIndex>
using SurrogateAt = std::remove_cvref_t<decltype(std::get<kIndex>(kSurrogates))>;

inline constexpr size_t kSurrogateCount = std::tuple_size_v<decltype(kSurrogates)>;

// A formula of the catalogue, by its place there: one kernel has all of them.
struct CataloguedSurrogate {
  int index = 0;
  alignas(8) std::byte bytes[64] = {};

  explicit CataloguedSurrogate(const Surrogate& surrogate) {
    int next = 0;
    for_each_surrogate([&]<class Formula>(Formula) {
      const Formula* formula = surrogate.target<Formula>();
      if (formula != nullptr) {
        index = next;
        std::memcpy(bytes, formula, sizeof(Formula));
      }
      ++next;
    });
  }

  template <size_t kIndex = 0, class Seen>
  TETHER_INLINE Dual<float> operator()(const Seen& token) const {
    if constexpr (kIndex + 1 < kSurrogateCount) {
      if (index != int{kIndex}) return operator()<kIndex + 1>(token);
    }
    SurrogateAt<kIndex> formula;
    std::memcpy(&formula, bytes, sizeof(formula));
    return formula(token);
  }
};

struct TokenPlace {
  int64_t row, column;
};

// Of the token with this row of logits.
TETHER_TEAM TokenPlace place_of(const RowLayout& layout, int64_t token) {
  if (!layout.packed()) return {token / layout.columns, token % layout.columns};
  int64_t row = 0, end = layout.rows;
  while (end - row > 1) {
    const int64_t middle = row + (end - row) / 2;
    (layout.offset(middle) <= token ? row : end) = middle;
  }
  return {row, token - layout.offset(row)};
}

// The gradients of a token of weight w, whose log-probability is known now.
template <class Formula>
TETHER_TEAM RowUpstream upstream_of_token(const Formula& formula, const PolicyParameters& in,
                                          const TokenPlace& at, float w, float logp) {
  const TermFactors terms(in, at.row, /*n=*/0);
  const RowFactors factors{narrow<float>(terms.loss), narrow<float>(terms.kl)};
  const LoadedToken token(in, at.row, at.column, w, logp);
  TokenSums sums;
  const SegmentRatio own;
  RowUpstream out{add_token(formula, in, factors, own, at.row, at.column, token, sums).logp, 0};
  if (in.entropy_coefficient != 0) {
    out.dentropy =
        bounded(-narrow<float>(terms.entropy) * entropy_weight(in, at.row, at.column, w));
  }
  return out;
}

// in.row_tokens is there where the aggregation asks for the length of a row.
template <class Stored, bool kCapped, int kHeld, class Formula, class Team>
TETHER_TEAM void token_of_logits_program(const Team& team, const Formula& formula,
                                         const PolicyParameters& in,
                                         const RowParameters<kCapped>& rows, int64_t row,
                                         const TokensOfLogits& found,
                                         const MutableLogits& dlogits) {
  const int64_t token = found.first + row;
  const auto put_found = [&](float logp, float entropy) {
    typename Team::template Local<NoState> local;
    team.each(local, [&](int thread, NoState&) {
      if (thread != 0) return;
      found.logps[token] = logp;
      put(found.entropies, token, entropy);
    });
  };
  const TokenPlace at = place_of(in.layout, token);
  const float w = load_mask(in.layout, in.response_mask, at.row, at.column);
  if (w == 0 || rows.is_ignored(row)) {
    put_found(0, 0);
    return clear_row(team, RowMemory<Stored>(rows.logits, dlogits, row));
  }
  held_row_program<Stored, kCapped, kHeld>(team, rows, row, dlogits, [&](const RowState& state) {
    const float logp = logp_of(state, rows.multiplier);
    put_found(logp, entropy_of(state));
    return upstream_of_token(formula, in, at, w, logp);
  });
}

}  // namespace tether::cuda
