#pragma once

#include <cstdint>

#include "../../core/elements.h"
#include "../../core/team.h"
#include "policy_program.h"
#include "weight_program.h"

// The turns of a row (rl/level.h) as programs of a team: where each begins, what its tokens add up
// to, and the gradients of tokens that share their turn's ratio. A row is scanned in tiles that
// begin with it, one after the other: padding behind it, or another row, changes no bit.

namespace tether::cuda {

struct TurnParameters {
  RowLayout layout;
  ConstArray ids;   // absent: each run of the mask is a turn
  ConstArray mask;  // the caller's: tokens that weights take out do not cut a turn in two
  int64_t* begins;  // of TurnTable
};

// ---- where turns begin --------------------------------------------------------------------------

// The number of the nearest slot that has one.
struct Nearest {
  int64_t number = -1, found = 0;

  static TETHER_TEAM Nearest none() { return {}; }
  static TETHER_TEAM Nearest of(const Nearest& near, const Nearest& far) {
    return near.found != 0 ? near : far;
  }
};

struct TurnSlot {
  Nearest id;  // of a token
  bool begins = false;
};

TETHER_TEAM TurnSlot turn_slot(const TurnParameters& in, int64_t row, int64_t column) {
  const auto is_token = [&](int64_t at) { return load_mask(in.layout, in.mask, row, at) != 0; };
  if (column >= in.layout.length(row) || !is_token(column)) return {};
  if (!in.ids) return {{}, column == 0 || !is_token(column - 1)};
  const int64_t i = in.ids.index(in.layout, row, column);
  const int64_t id = in.ids.dtype == DType::int32 ? static_cast<const int32_t*>(in.ids.data)[i]
                                                  : static_cast<const int64_t*>(in.ids.data)[i];
  return {{id, 1}, false};
}

// A turn begins at a token with another id than the token before it, or where a run of the mask
// does. Masked slots are of the turn before them.
template <class Team>
TETHER_TEAM void find_turns_program(const Team& team, const TurnParameters& in, int64_t row) {
  const int64_t length = in.layout.length(row), first = TurnTable::slot(in.layout, row, 0);
  Nearest id, begin;
  typename Team::template Local<TurnSlot> local;
  for (int64_t tile = 0; tile < length; tile += Team::kThreads) {
    // A scan looks at the threads behind one: the last slot of the tile is the first thread's.
    const auto column_of = [&](int thread) { return tile + (Team::kThreads - 1 - thread); };
    team.each(local,
              [&](int thread, TurnSlot& own) { own = turn_slot(in, row, column_of(thread)); });
    if (in.ids) {
      const Nearest all = team.template scan_back<Nearest>(
          local, [](const TurnSlot& own) { return own.id; },
          [&](TurnSlot& own, const Nearest& in_tile) {
            const Nearest before = Nearest::of(in_tile, id);
            own.begins = own.id.found != 0 && (before.found == 0 || before.number != own.id.number);
          });
      id = Nearest::of(all, id);
    }
    team.each(local, [&](int thread, TurnSlot& own) {
      own.id = own.begins ? Nearest{column_of(thread), 1} : Nearest{};
    });
    const Nearest all = team.template scan_back<Nearest>(
        local, [](const TurnSlot& own) { return own.id; },
        [&](TurnSlot& own, const Nearest& in_tile) {
          own.id = Nearest::of(own.id, Nearest::of(in_tile, begin));
        });
    begin = Nearest::of(all, begin);
    team.each(local, [&](int thread, const TurnSlot& own) {
      const int64_t column = column_of(thread);
      if (column < length) in.begins[first + column] = own.id.number;
    });
  }
}

// ---- what their tokens add up to ----------------------------------------------------------------

// Of slots from one on to the end of its turn, or of the slots that were looked at: `closed`.
template <class Totals>
struct OfTurn {
  Totals totals = {};
  int64_t closed = 0;

  static TETHER_TEAM OfTurn none() { return {}; }
  static TETHER_TEAM OfTurn of(const OfTurn& before, const OfTurn& behind) {
    if (before.closed != 0) return before;
    return {Totals::of(before.totals, behind.totals), behind.closed};
  }
};

// visit(column, totals) for every turn of a row, in the thread of the slot at which it begins, with
// what load(column) says of its slots, added up from its end. Returns how many have tokens.
template <class Totals, class Team, class Load, class Visit>
TETHER_TEAM double for_each_turn(const Team& team, const RowLayout& layout, const TurnTable& turns,
                                 int64_t row, Load load, Visit visit) {
  struct Own {
    OfTurn<Totals> scan;
    double turns = 0;
  };
  const int64_t length = layout.length(row);
  const int64_t* begins = turns.begins + TurnTable::slot(layout, row, 0);
  OfTurn<Totals> after;
  typename Team::template Local<Own> local;
  for (int64_t tile = (length - 1) / Team::kThreads * Team::kThreads; tile >= 0;
       tile -= Team::kThreads) {
    team.each(local, [&](int thread, Own& own) {
      const int64_t column = tile + thread;
      own.scan = {};
      if (column >= length) return;
      own.scan = {load(column),
                  column + 1 < length && begins[column] != begins[column + 1] ? 1 : 0};
    });
    const OfTurn<Totals> all = team.template scan_back<OfTurn<Totals>>(
        local, [](const Own& own) { return own.scan; },
        [&](Own& own, const OfTurn<Totals>& behind) {
          own.scan = OfTurn<Totals>::of(own.scan, OfTurn<Totals>::of(behind, after));
        });
    after = OfTurn<Totals>::of(all, after);
    team.each(local, [&](int thread, Own& own) {
      const int64_t column = tile + thread;
      if (column >= length || begins[column] != column) return;
      visit(column, own.scan.totals);
      own.turns += own.scan.totals.n > 0 ? 1 : 0;
    });
  }
  return team
      .template reduce<Sum>(local, [](const Own& own) { return Several<double, 1>{own.turns}; })
      .each[0];
}

// The ratio of each turn, and how many there are.
template <class Team>
TETHER_TEAM void turn_ratio_program(const Team& team, const PolicyParameters& in, int64_t row) {
  const int64_t first = TurnTable::slot(in.layout, row, 0);
  const double count = for_each_turn<LevelSums>(
      team, in.layout, in.turns, row,
      [&](int64_t column) { return level_sums_of(in, LoadedToken(in, row, column)); },
      [&](int64_t column, const LevelSums& sums) {
        in.turns.ratios[first + column] = segment_ratio_of(in, sums);
      });
  typename Team::template Local<NoState> local;
  team.each(local, [&](int thread, NoState&) {
    if (thread == 0) in.turns.counts[row] = count;
  });
}

// As MeasureTotals, with the extremes in float, which the measures are.
struct TurnMeasures {
  double n = 0, sum = 0;
  float largest = -math::detail::Format<float>::kInfinity;
  float smallest = math::detail::Format<float>::kInfinity;

  static TETHER_TEAM TurnMeasures of(const TurnMeasures& a, const TurnMeasures& b) {
    return {a.n + b.n, a.sum + b.sum, a.largest > b.largest ? a.largest : b.largest,
            a.smallest < b.smallest ? a.smallest : b.smallest};
  }
};

// The statistic of a weight for each turn, from the measures of its tokens.
template <class Team>
TETHER_TEAM void turn_statistic_program(const Team& team, const WeightParameters& in, int64_t row) {
  float* const sums = in.turns.sums + TurnTable::slot(in.layout, row, 0);
  for_each_turn<TurnMeasures>(
      team, in.layout, in.turns, row,
      [&](int64_t column) {
        const float w = load_mask(in.layout, in.mask, row, column), x = sums[column];
        if (w == 0) return TurnMeasures{};
        return TurnMeasures{static_cast<double>(w), static_cast<double>(w) * static_cast<double>(x),
                            x, x};
      },
      [&](int64_t column, const TurnMeasures& all) {
        sums[column] = statistic_of(in, {all.n, all.sum, all.largest, all.smallest});
      });
}

// ---- gradients of tokens that share the ratio of their turn -------------------------------------

template <class Team>
TETHER_TEAM RowFactors row_factors_of(const Team& team, const PolicyParameters& in, int64_t row) {
  const TermFactors terms(in, row, divides_by_length(in) ? level_sums(team, in, row).n : 0);
  return {narrow<float>(terms.loss), narrow<float>(terms.kl)};
}

// Of some tokens: w, w W dS/dL.
struct SlopeSums {
  double n = 0, slope = 0;

  static TETHER_TEAM SlopeSums of(const SlopeSums& a, const SlopeSums& b) {
    return {a.n + b.n, a.slope + b.slope};
  }
};

// d loss / d logp over w of each turn, from the slopes of its tokens.
template <class Team>
TETHER_TEAM void turn_slope_program(const Team& team, const PolicyParameters& in, int64_t row) {
  const RowFactors factors = row_factors_of(team, in, row);
  float* const sums = in.turns.sums + TurnTable::slot(in.layout, row, 0);
  for_each_turn<SlopeSums>(
      team, in.layout, in.turns, row,
      [&](int64_t column) {
        const float w = load_mask(in.layout, in.response_mask, row, column);
        return SlopeSums{static_cast<double>(w), static_cast<double>(sums[column])};
      },
      [&](int64_t column, const SlopeSums& all) {
        sums[column] =
            narrow<float>(static_cast<double>(factors.loss) * level_scale(in, all.n) * all.slope);
      });
}

template <class Team>
TETHER_TEAM void turn_gradient_program(const Team& team, const PolicyParameters& in,
                                       int64_t index) {
  const TokenPiece piece(in.layout, index, in.pieces);
  const RowFactors factors = row_factors_of(team, in, piece.row);
  typename Team::template Local<NoState> local;
  team.each(local, [&](int thread, NoState&) {
    for (int64_t i = piece.begin + thread; i < piece.end; i += Team::kThreads) {
      const LoadedToken token(in, piece.row, i);
      float gradient = 0;
      if (token.w != 0) {
        const int64_t turn = in.turns.turn_of(in.layout, piece.row, i);
        gradient = shared_gradient(in, factors, in.turns.ratios[turn], in.turns.sums[turn],
                                   piece.row, i, token);
      }
      store(in.layout, in.dlogps, piece.row, i, gradient);
    }
  });
}

}  // namespace tether::cuda
