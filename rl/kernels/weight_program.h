#pragma once

#include "../../core/team.h"
#include "../token_weight.h"
#include "measures.h"
#include "token_program.h"
#include "turn_table.h"

// A weight of a row's tokens (rl/token_weight.h) as a program of a team: its product with those
// before it, in an array of the workspace.

namespace tether::cuda {

struct WeightParameters {
  RowLayout layout;
  ConstArray mask;  // of the tokens that are measured
  ConstArray logps, old_logps, ref_logps, rollout_logps, advantages;
  ConstArray before;  // what it is multiplied with; absent: 1
  MutableArray out;
  Segment segment;
  TurnTable turns;  // where the segment is a turn
  bool measures;    // no weight is made: the measures of the tokens go to the turns
  Reduction reduction;
  bool leaves;  // out is a mask, of the tokens that stay
};

template <class Formula>
inline constexpr Traits kTraitsOf = detail::traits_of<Formula>();

// NaN for what a formula does not say that it reads.
template <class Formula>
TETHER_TEAM WeightToken<Constant<float>> weight_token(const WeightParameters& in, int64_t row,
                                                      int64_t column) {
  constexpr Traits kReads = kTraitsOf<Formula>;
  const auto number = [&](bool read, const ConstArray& array, float largest) {
    if (!read || !array) return Constant<float>{kNaN};
    return Constant<float>{saturated(load(in.layout, array, row, column), largest)};
  };
  constexpr float kLogp = Largest<float>::kInput;
  return {number(kReads.reads_policy, in.logps, kLogp), number(true, in.old_logps, kLogp),
          number(kReads.needs_ref_logps, in.ref_logps, kLogp),
          number(kReads.needs_rollout_logps, in.rollout_logps, kLogp),
          number(true, in.advantages, Largest<float>::kInput)};
}

// The measure of a token with a NaN or infinity is NaN, although its formula may hide it.
template <class Formula>
TETHER_TEAM float measure_of(const Formula& formula, const WeightToken<Constant<float>>& token) {
  constexpr Traits kReads = kTraitsOf<Formula>;
  float trace = token.old_logp.value * 0 + token.advantage.value * 0;
  if constexpr (kReads.reads_policy) trace += token.logp.value * 0;
  if constexpr (kReads.needs_ref_logps) trace += token.ref_logp.value * 0;
  if constexpr (kReads.needs_rollout_logps) trace += token.rollout_logp.value * 0;
  return formula.measure(token).value + trace;
}

// Of a segment.
TETHER_TEAM float statistic_of(const WeightParameters& in, const MeasureTotals& all) {
  if (all.n == 0) return 0;
  return narrow(all.reduced(in.reduction), Largest<float>::kInput);
}

// Over the active tokens of a row.
template <class Formula, class Team>
TETHER_TEAM float statistic_of_row(const Team& team, const Formula& formula,
                                   const WeightParameters& in, int64_t row) {
  typename Team::template Local<MeasureTotals> local;
  team.each(local, [&](int thread, MeasureTotals& own) {
    for (int64_t i = thread; i < in.layout.length(row); i += Team::kThreads) {
      const float w = load_mask(in.layout, in.mask, row, i);
      if (w == 0) continue;
      const float measure = measure_of(formula, weight_token<Formula>(in, row, i));
      own.add(static_cast<double>(w), static_cast<double>(measure));
    }
  });
  const auto sums = team.template reduce<Sum>(
      local, [](const MeasureTotals& own) { return Several<double, 2>{own.n, own.sum}; });
  const auto extremes = team.template reduce<Max>(local, [](const MeasureTotals& own) {
    return Several<double, 2>{own.largest, -own.smallest};
  });
  return statistic_of(in, {sums.each[0], sums.each[1], extremes.each[0], -extremes.each[1]});
}

template <class Formula, class Team>
TETHER_TEAM void measure_program(const Team& team, const Formula& formula,
                                 const WeightParameters& in, int64_t row) {
  typename Team::template Local<NoState> local;
  team.each(local, [&](int thread, NoState&) {
    for (int64_t i = thread; i < in.layout.length(row); i += Team::kThreads) {
      const bool active = load_mask(in.layout, in.mask, row, i) != 0;
      in.turns.sums[TurnTable::slot(in.layout, row, i)] =
          active ? measure_of(formula, weight_token<Formula>(in, row, i)) : 0;
    }
  });
}

template <class Formula, class Team>
TETHER_TEAM void weight_program(const Team& team, const Formula& formula,
                                const WeightParameters& in, int64_t row) {
  if (in.measures) return measure_program(team, formula, in, row);
  const bool by_row = in.segment == Segment::row;
  const float of_row = by_row ? statistic_of_row(team, formula, in, row) : 0;
  typename Team::template Local<NoState> local;
  team.each(local, [&](int thread, NoState&) {
    for (int64_t i = thread; i < in.layout.length(row); i += Team::kThreads) {
      float weight = 0;
      const float before = load_weight(in.layout, in.before, row, i);
      if (load_mask(in.layout, in.mask, row, i) != 0) {
        const auto token = weight_token<Formula>(in, row, i);
        const float statistic = in.turns ? in.turns.sums[in.turns.turn_of(in.layout, row, i)]
                                : by_row ? of_row
                                         : measure_of(formula, token);
        const float own = formula(token, Constant<float>{statistic}).value + statistic * 0;
        if (in.leaves) {
          weight = before == 0 || own == 0 ? 0 : before + own * 0;
        } else {
          weight = before * own;
        }
      }
      store(in.layout, in.out, row, i, weight);
    }
  });
}

}  // namespace tether::cuda
