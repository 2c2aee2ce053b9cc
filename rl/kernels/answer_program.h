#pragma once

#include <cstdint>

#include "../../core/elements.h"
#include "../../core/team.h"
#include "../../core/token_piece.h"
#include "../preference_objective.h"
#include "answer_sums.h"
#include "arrays.h"
#include "bounds.h"

// The tokens of answers as programs of a team: what those of each add up to, and their gradients by
// the slopes of their answer. As in answer_sums.cc; sums are in double.

namespace tether::cuda {

inline constexpr int kPreferenceThreads = 256;

struct PreferenceParameters {
  PreferenceArrays batch;
  MutableArray dlogps;  // or absent
  PairScore score;
  bool reference;
  bool of_log_ratio;  // of the link: false where it takes log-probabilities
  double ld_alpha, beta, loss_weight;
  Nll nll;
  double factor;         // of the whole loss
  const double* counts;  // of the step: examples, tokens of the NLL
  int64_t pieces;        // of a row, for its gradients

  TETHER_TEAM bool has_nll_mask() const { return batch.nll_mask && nll.coefficient != 0; }
  TETHER_TEAM bool has_pairs() const { return !batch.labels; }
  TETHER_TEAM bool has_tails() const { return ld_alpha < 1; }
  TETHER_TEAM int64_t examples() const {
    return has_pairs() ? batch.layout.rows / 2 : batch.layout.rows;
  }
};

// What the tokens of an answer add up to, and where its tail begins: the tokens beyond the length
// of the shorter answer of its pair.
struct AnswerState {
  AnswerSums sums;
  int64_t tail;
};

struct TokenCount {
  int64_t n = 0;

  static TETHER_TEAM TokenCount none() { return {}; }
  static TETHER_TEAM TokenCount of(const TokenCount& a, const TokenCount& b) { return {a.n + b.n}; }
};

TETHER_TEAM bool is_token(const PreferenceParameters& in, int64_t row, int64_t column) {
  return load_mask(in.batch.layout, in.batch.response_mask, row, column) != 0;
}

template <class Team>
TETHER_TEAM int64_t tokens_of(const Team& team, const PreferenceParameters& in, int64_t row) {
  typename Team::template Local<TokenCount> local;
  team.each(local, [&](int thread, TokenCount& own) {
    for (int64_t i = thread; i < in.batch.layout.length(row); i += Team::kThreads) {
      own.n += is_token(in, row, i) ? 1 : 0;
    }
  });
  return team
      .template reduce<Sum>(local, [](const TokenCount& own) { return Several<int64_t, 1>{own.n}; })
      .each[0];
}

// The column of the token with `behind` tokens behind it.
template <class Team>
TETHER_TEAM int64_t column_before(const Team& team, const PreferenceParameters& in, int64_t row,
                                  int64_t behind) {
  struct Own {
    TokenCount token, behind;
    int64_t found = -1;
  };
  typename Team::template Local<Own> local;
  const int64_t length = in.batch.layout.length(row);
  int64_t behind_tile = 0;
  for (int64_t begin = (length - 1) / Team::kThreads * Team::kThreads; begin >= 0;
       begin -= Team::kThreads) {
    team.each(local, [&](int thread, Own& own) {
      const int64_t column = begin + thread;
      own.token.n = column < length && is_token(in, row, column) ? 1 : 0;
    });
    const TokenCount all = team.template scan_back<TokenCount>(
        local, [](const Own& own) { return own.token; },
        [](Own& own, const TokenCount& of_others) { own.behind = of_others; });
    team.each(local, [&](int thread, Own& own) {
      const bool here = own.token.n != 0 && behind_tile + own.behind.n == behind;
      if (here) own.found = begin + thread;
    });
    behind_tile += all.n;
  }
  return team
      .template reduce<Max>(local, [](const Own& own) { return Several<int64_t, 1>{own.found}; })
      .each[0];
}

template <class Team>
TETHER_TEAM int64_t tail_of(const Team& team, const PreferenceParameters& in, int64_t row) {
  const int64_t half = in.batch.layout.rows / 2, length = in.batch.layout.length(row);
  const int64_t tokens = tokens_of(team, in, row);
  const int64_t others = tokens_of(team, in, row < half ? row + half : row - half);
  return others < tokens ? column_before(team, in, row, tokens - 1 - others) : length;
}

TETHER_TEAM void add_answer_token(const PreferenceParameters& in, int64_t row, int64_t column,
                                  int64_t tail, AnswerSums& own) {
  const RowLayout& layout = in.batch.layout;
  const double w = load_mask(layout, in.batch.response_mask, row, column);
  const double q = in.has_nll_mask() ? load_mask(layout, in.batch.nll_mask, row, column) : w;
  if (w == 0 && q == 0) return;
  const auto number = [&](const ConstArray& array) {
    return double{saturated(load(layout, array, row, column), Largest<float>::kInput)};
  };
  const double logp = number(in.batch.logps);
  own.nll_n += q;
  if (q != 0) own.nll_logp += q * logp;
  if (w == 0) return;
  const double gap = in.reference ? logp - number(in.batch.ref_logps) : logp;
  own.n += w;
  own.logp += w * logp;
  own.score += (column < tail ? w : w * in.ld_alpha) * gap;
}

template <class Team>
TETHER_TEAM void answer_program(const Team& team, const PreferenceParameters& in, int64_t row,
                                AnswerState* answers) {
  const int64_t tail = in.has_tails() ? tail_of(team, in, row) : in.batch.layout.length(row);
  typename Team::template Local<AnswerSums> local;
  team.each(local, [&](int thread, AnswerSums& own) {
    for (int64_t i = thread; i < in.batch.layout.length(row); i += Team::kThreads) {
      add_answer_token(in, row, i, tail, own);
    }
  });
  const auto all = team.template reduce<Sum>(local, [](const AnswerSums& own) {
    return Several<double, 5>{own.n, own.logp, own.score, own.nll_n, own.nll_logp};
  });
  team.each(local, [&](int thread, AnswerSums&) {
    if (thread != 0) return;
    answers[row] = {{all.each[0], all.each[1], all.each[2], all.each[3], all.each[4]}, tail};
  });
}

template <class Team>
TETHER_TEAM void answer_gradient_program(const Team& team, const PreferenceParameters& in,
                                         int64_t index, const AnswerState* answers,
                                         const AnswerSlopes* slopes) {
  const RowLayout& layout = in.batch.layout;
  const TokenPiece piece(layout, index, in.pieces);
  const int64_t tail = answers[piece.row].tail;
  const AnswerSlopes slope = slopes[piece.row];
  typename Team::template Local<NoState> local;
  team.each(local, [&](int thread, NoState&) {
    for (int64_t i = piece.begin + thread; i < piece.end; i += Team::kThreads) {
      const float w = load_mask(layout, in.batch.response_mask, piece.row, i);
      const float q = in.has_nll_mask() ? load_mask(layout, in.batch.nll_mask, piece.row, i) : w;
      const double v = i < tail ? static_cast<double>(w) : static_cast<double>(w) * in.ld_alpha;
      const double by_score = w == 0 ? 0 : v * slope.score;
      const double by_nll = q == 0 ? 0 : static_cast<double>(q) * slope.nll;
      store(layout, in.dlogps, piece.row, i, narrow<float>(by_score + by_nll));
    }
  });
}

}  // namespace tether::cuda
