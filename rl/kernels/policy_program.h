#pragma once

#include "../../core/team.h"
#include "../../core/token_piece.h"
#include "counts_program.h"
#include "token_program.h"

// The policy loss of a row as a program of a team (core/team.h), and the sum of all rows:
// policy_loss.cu runs them on a device.

namespace tether::cuda {

inline constexpr int kPolicyThreads = 256;

// Of a row whose tokens share nothing but its length, or what is known of their turns.
inline int64_t pieces_of_tokens(const RowLayout& layout, Segment segment) {
  return segment == Segment::row ? 1 : pieces_of_rows(layout);
}

// What a piece of a row adds to the loss and the metrics.
struct RowTotals {
  double loss;
  double tokens;
  double sequences;  // with tokens
  double sums[PolicyMetrics::kSums];
  double maxima[PolicyMetrics::kMaxima];
};

// Of some tokens: w, w logp, w log_ratio.
struct LevelSums {
  double n = 0, logp = 0, log_ratio = 0;

  static TETHER_TEAM LevelSums of(const LevelSums& a, const LevelSums& b) {
    return {a.n + b.n, a.logp + b.logp, a.log_ratio + b.log_ratio};
  }
};

TETHER_TEAM LevelSums level_sums_of(const PolicyParameters& in, const LoadedToken& token) {
  const double w = token.w;
  if (w == 0) return {};
  const double u = static_cast<double>(token.logp) - static_cast<double>(token.old_logp);
  return {w, w * static_cast<double>(token.logp),
          w * (in.clip.is_on() ? clipped(u, token.advantage, in.clip) : u)};
}

// Of the row; where its tokens do not share a ratio, w alone.
template <class Team>
TETHER_TEAM LevelSums level_sums(const Team& team, const PolicyParameters& in, int64_t row) {
  typename Team::template Local<LevelSums> local;
  team.each(local, [&](int thread, LevelSums& own) {
    for (int64_t i = thread; i < in.layout.length(row); i += Team::kThreads) {
      if (in.segment == Segment::row) {
        own = LevelSums::of(own, level_sums_of(in, LoadedToken(in, row, i)));
      } else {
        own.n += static_cast<double>(load_mask(in.layout, in.response_mask, row, i));
      }
    }
  });
  const auto all = team.template reduce<Sum>(local, [](const LevelSums& own) {
    return Several<double, 3>{own.n, own.logp, own.log_ratio};
  });
  return {all.each[0], all.each[1], all.each[2]};
}

// d L / d logp over w (rl/level.h).
TETHER_TEAM double level_scale(const PolicyParameters& in, double n) {
  if (!in.is_mean) return 1;
  return n > 0 ? 1 / n : 0;
}

TETHER_TEAM SegmentRatio segment_ratio_of(const PolicyParameters& in, const LevelSums& sums) {
  const double scale = level_scale(in, sums.n);
  constexpr float kLargest = Largest<float>::kInput;
  return {narrow(scale * sums.logp, kLargest), narrow(scale * sums.log_ratio, kLargest),
          narrow<float>(sums.n > 0 ? 1 / sums.n : 1)};
}

TETHER_TEAM bool divides_by_length(const PolicyParameters& in) {
  return in.aggregation.mode == Aggregation::Mode::sequence_mean_token_mean;
}

// What the terms of a row are multiplied by.
struct TermFactors {
  double loss, kl, entropy;

  TETHER_TEAM TermFactors(const PolicyParameters& in, int64_t row, double n) {
    const double length =
        in.row_tokens
            ? static_cast<double>(load(in.row_tokens, in.row_tokens.index(in.layout, row, 0)))
            : n;
    const TermCounts policy{in.counts[0], in.counts[2]}, penalty{in.counts[1], in.counts[2]};
    const auto factor = [&](const TermCounts& step) {
      return bounded(bounded(in.factor) * checked_row_factor(in.aggregation, step, length));
    };
    loss = factor(policy);
    kl = in.beta == 0 ? 0 : bounded(in.beta * factor(penalty));
    entropy = bounded(in.entropy_coefficient * loss);
  }
};

// The totals of a row from what its threads have.
template <class Team, class Local>
TETHER_TEAM RowTotals row_totals(const Team& team, Local& local, const TermFactors& factors) {
  using M = PolicyMetrics;
  const auto terms = team.template reduce<Sum>(local, [](const TokenSums& own) {
    return Several<double, 3>{own.loss, own.kl, own.entropy};
  });
  const auto sums = team.template reduce<Sum>(local, [](const TokenSums& own) {
    Several<float, M::kSums> out;
    out.each[0] = own.tokens;  // in the place of a term
    TETHER_UNROLL
    for (int i = 1; i < M::kSums; ++i) out.each[i] = own.metrics[i];
    return out;
  });
  const auto maxima = team.template reduce<Max>(local, [](const TokenSums& own) {
    return Several<float, M::kMaxima>{own.log_ratio_max, own.neg_log_ratio_max, own.weight_max};
  });
  RowTotals out;
  TETHER_UNROLL
  for (int i = 0; i < M::kSums; ++i) out.sums[i] = static_cast<double>(sums.each[i]);
  TETHER_UNROLL
  for (int i = 0; i < M::kMaxima; ++i) out.maxima[i] = static_cast<double>(maxima.each[i]);
  out.tokens = out.sums[0];
  out.sums[M::kPolicyLoss] = terms.each[0];
  out.sums[M::kKl] = terms.each[1];
  out.sums[M::kEntropy] = terms.each[2];
  out.loss = 0;
  if (out.tokens == 0) return out;
  out.loss = bounded(factors.loss * terms.each[0]);
  if (factors.kl != 0) out.loss += bounded(factors.kl * terms.each[1]);
  if (factors.entropy != 0) out.loss -= bounded(factors.entropy * terms.each[2]);
  return out;
}

// The gradients of a row whose tokens share its ratio, once their slopes are added up.
template <class Team, class Local>
TETHER_TEAM void write_shared_gradients(const Team& team, Local& local, const PolicyParameters& in,
                                        int64_t row, const RowFactors& factors,
                                        const SegmentRatio& shared, double scale) {
  const double slopes =
      team.template reduce<Sum>(local,
                                [](const TokenSums& own) { return Several<double, 1>{own.slope}; })
          .each[0];
  const double slope = bounded(static_cast<double>(factors.loss) * (scale * slopes));
  team.each(local, [&](int thread, TokenSums&) {
    for (int64_t i = thread; i < in.layout.length(row); i += Team::kThreads) {
      const LoadedToken token(in, row, i);
      const float gradient =
          token.w == 0 ? 0 : shared_gradient(in, factors, shared, slope, row, i, token);
      store(in.layout, in.dlogps, row, i, gradient);
    }
  });
}

template <class Formula, class Team>
TETHER_TEAM void policy_row_program(const Team& team, const Formula& formula,
                                    const PolicyParameters& in, int64_t index,
                                    RowTotals* totals_of) {
  const TokenPiece piece(in.layout, index, in.pieces);
  const int64_t row = piece.row;
  const bool by_row = in.segment == Segment::row;
  const LevelSums level = by_row || divides_by_length(in) ? level_sums(team, in, row) : LevelSums{};
  const SegmentRatio of_row = by_row ? segment_ratio_of(in, level) : SegmentRatio{};
  const TermFactors terms(in, row, level.n);
  const RowFactors factors{narrow<float>(terms.loss), narrow<float>(terms.kl)};
  typename Team::template Local<TokenSums> local;
  team.each(local, [&](int thread, TokenSums& own) {
    for (int64_t i = piece.begin + thread; i < piece.end; i += Team::kThreads) {
      const LoadedToken token(in, row, i);
      const bool active = token.w != 0;
      TokenSlopes slopes;
      if (active) {
        const SegmentRatio shared =
            in.turns ? in.turns.ratios[in.turns.turn_of(in.layout, row, i)] : of_row;
        slopes = add_token(formula, in, factors, shared, row, i, token, own);
        own.slope += static_cast<double>(slopes.ratio);
      }
      if (in.dlogps && !in.is_shared) store(in.layout, in.dlogps, row, i, slopes.logp);
      if (in.dlogps && in.is_shared && in.turns) {
        in.turns.sums[TurnTable::slot(in.layout, row, i)] = slopes.ratio;
      }
      if (!in.entropies) continue;
      const float dentropy =
          active ? add_entropy(in, narrow<float>(terms.entropy), row, i, token.w, own) : 0;
      if (in.dentropies) store(in.layout, in.dentropies, row, i, dentropy);
    }
  });
  if (in.dlogps && in.is_shared && by_row) {
    write_shared_gradients(team, local, in, row, factors, of_row, level_scale(in, level.n));
  }
  RowTotals totals = row_totals(team, local, terms);
  totals.sequences = totals.tokens > 0 ? 1 : 0;
  team.each(local, [&](int thread, TokenSums&) {
    if (thread == 0) totals_of[index] = totals;
  });
}

// What all rows add up to, as PolicyTotals has it: the loss, pairs of sum and count, maxima.
struct FlatTotals {
  double loss;
  double sums[2 * PolicyMetrics::kPairs];
  double maxima[PolicyMetrics::kMaxima];
};

template <class Team>
TETHER_TEAM void add_rows_program(const Team& team, const RowTotals* rows, int64_t count,
                                  const PolicyParameters& in, FlatTotals* out) {
  using M = PolicyMetrics;
  constexpr int kSums = M::kSums + 3;
  struct Totals {
    Several<double, kSums> sums = {};
    Several<double, M::kMaxima> maxima = {{-M::kUnseen, -M::kUnseen, -M::kUnseen}};
  };
  typename Team::template Local<Totals> local;
  team.each(local, [&](int thread, Totals& own) {
    for (int64_t row = thread; row < count; row += Team::kThreads) {
      const RowTotals& each = rows[row];
      own.sums.each[M::kSums] += each.loss;
      own.sums.each[M::kSums + 1] += each.tokens;
      if (!in.turns) own.sums.each[M::kSums + 2] += each.sequences;
      for (int i = 0; i < M::kSums; ++i) own.sums.each[i] += each.sums[i];
      for (int i = 0; i < M::kMaxima; ++i) {
        own.maxima.each[i] = Max::of(own.maxima.each[i], each.maxima[i]);
      }
    }
    for (int64_t row = thread; in.turns && row < in.layout.rows; row += Team::kThreads) {
      own.sums.each[M::kSums + 2] += in.turns.counts[row];
    }
  });
  const auto sums = team.template reduce<Sum>(local, [](const Totals& own) { return own.sums; });
  const auto maxima =
      team.template reduce<Max>(local, [](const Totals& own) { return own.maxima; });
  team.each(local, [&](int thread, Totals&) {
    if (thread != 0) return;
    const double tokens = sums.each[M::kSums + 1], segments = sums.each[M::kSums + 2];
    out->loss = sums.each[M::kSums];
    for (int i = 0; i < M::kSums; ++i) {
      const bool by_segment = in.segment != Segment::token && M::is_of_ratio(i);
      out->sums[2 * i] = sums.each[i];
      out->sums[2 * i + 1] = by_segment ? segments : tokens;
    }
    for (int i = 0; i < M::kMaxima; ++i) out->maxima[i] = maxima.each[i];
    if (in.token_weights) return;
    out->sums[2 * M::kWeight] = out->sums[2 * M::kWeightSquared] = tokens;
    if (tokens > 0) out->maxima[M::kWeightMax] = 1;
  });
}

// The denominators of a batch: tokens under the surrogate, under the penalty, rows with tokens.
template <class Team>
TETHER_TEAM void count_row_program(const Team& team, const PolicyParameters& in, int64_t row,
                                   double* rows) {
  PolicyParameters by_token = in;
  by_token.segment = Segment::token;
  const double n = level_sums(team, by_token, row).n;
  typename Team::template Local<NoState> local;
  team.each(local, [&](int thread, NoState&) {
    if (thread == 0) rows[row] = n;
  });
}

template <class Team>
TETHER_TEAM void add_counts_program(const Team& team, const double* rows, int64_t count,
                                    double* counts) {
  const TermCounts all = counts_of_rows(team, rows, count);
  typename Team::template Local<NoState> local;
  team.each(local, [&](int thread, NoState&) {
    if (thread != 0) return;
    counts[0] = counts[1] = all.tokens;
    counts[2] = all.sequences;
  });
}

}  // namespace tether::cuda
