#pragma once

#include <cstdint>
#include <utility>

#include "../../core/elements.h"
#include "../../core/macros.h"
#include "../../core/select.h"
#include "../../core/team.h"
#include "recursion.h"

// A recursion over the tokens of a row (recursion.h) as a program of a team: row_scan.cu runs it on
// a device. What a slot makes of V and x behind it is affine, and so is what many do, one after the
// other: a tile of the row is scanned at once, and tiles one after the other, from the last.

namespace tether::cuda {

inline constexpr int kScanThreads = 128;
// Slots of a thread, beside each other. Tiles begin at the row: padding behind it, or another row,
// changes no bit.
inline constexpr int kScanRun = 4;

struct ScanParameters {
  AdvantageArrays batch;
  MutableArray advantages, returns;  // either may be absent
  double gamma, lambda;
  bool decays;
};

inline ScanParameters scan_parameters(const AdvantageArrays& batch, const Recursion& recursion,
                                      const MutableArray& advantages, const MutableArray& returns) {
  return {.batch = batch,
          .advantages = advantages,
          .returns = returns,
          .gamma = recursion.gamma(),
          .lambda = recursion.lambda(),
          .decays = recursion.gap() == MaskGap::decay};
}

// V and x behind a slot, as it sees them.
struct Behind {
  double value = 0, x = 0;
};

// What slots make of it:  V = value + value_factor V',  x = x + by_value V' + x_factor x'.
struct Passage {
  double value = 0, value_factor = 1;
  double x = 0, by_value = 0, x_factor = 1;
  int64_t open = 1;  // 0: an episode ends, and nothing behind is seen, not even a NaN

  TETHER_TEAM Behind operator()(const Behind& behind) const;
};

// Of results: what overflows, as row_scan.cc has it.
TETHER_TEAM double within_scan(double x) { return bounded(x, 1e300); }

struct Following {
  static TETHER_TEAM Passage none() { return {}; }
  static TETHER_TEAM Passage of(const Passage& before, const Passage& behind) {
    if (before.open == 0) return before;
    Passage out;
    out.value = before.value + before.value_factor * behind.value;
    out.value_factor = before.value_factor * behind.value_factor;
    out.x = (before.x + within_scan(before.by_value * behind.value)) +
            within_scan(before.x_factor * behind.x);
    out.by_value = within_scan(before.by_value * behind.value_factor) +
                   within_scan(before.x_factor * behind.by_value);
    out.x_factor = within_scan(before.x_factor * behind.x_factor);
    out.open = behind.open;
    return out;
  }
};

TETHER_TEAM Behind Passage::operator()(const Behind& behind) const {
  const Passage all = Following::of(*this, {behind.value, 0, behind.x, 0, 0, 1});
  return {all.value, all.x};
}

// A slot: a token, a masked slot between tokens that decays, or one that changes nothing.
enum class SlotKind : int { nothing, gap, token };

// Flat: with an EpisodeEnd inside, a thread takes twice the registers.
struct Slot {
  RecursionToken<Constant<double>> token = {};
  double seen = 0;   // or NaN, where something of it is no finite number
  double after = 0;  // V behind the end of an episode
  SlotKind kind = SlotKind::nothing;
  bool ends = false;
};

template <class Formula>
inline constexpr Traits kScanTraits = detail::traits_of<Formula>();
template <class Formula>
inline constexpr bool kHasLambda = requires(const Formula formula) { formula.lambda; };

template <class Formula>
TETHER_TEAM double lambda_of(const ScanParameters& in, int64_t row, int64_t column) {
  if (!kHasLambda<Formula> || !in.batch.lambdas) return in.lambda;
  const double lambda = load<double>(in.batch.layout, in.batch.lambdas, row, column);
  return lambda >= 0 && lambda <= 1 ? lambda : double{kNaN};
}

TETHER_TEAM EpisodeEnd read_end(const ScanParameters& in, int64_t row, int64_t column) {
  return EpisodeEnd::of([&](auto place) {
    constexpr ConstArray AdvantageArrays::* kArray = kEndArrays[decltype(place)::value];
    const ConstArray& array = in.batch.*kArray;
    return array ? load<double>(in.batch.layout, array, row, column) : 0;
  });
}

template <class Formula, size_t k>
TETHER_TEAM void read_number(const ScanParameters& in, int64_t row, int64_t column, Slot& slot) {
  constexpr TokenNumber kNumber = kTokenNumbers[k];
  constexpr bool kWanted = kNumber.needed == nullptr || kScanTraits<Formula>.*kNumber.needed;
  const ConstArray& array = in.batch.*kNumber.array;
  if (!kWanted || !array) return;
  const double number = load<double>(in.batch.layout, array, row, column);
  slot.seen += number * 0;
  slot.token.*kNumber.member = {within_scan(number)};
}
template <class Formula, size_t... k>
TETHER_TEAM void read_numbers(const ScanParameters& in, int64_t row, int64_t column, Slot& slot,
                              std::index_sequence<k...>) {
  (read_number<Formula, k>(in, row, column, slot), ...);
}

template <class Formula>
TETHER_TEAM Slot slot_at(const ScanParameters& in, int64_t row, int64_t column, int64_t last) {
  Slot slot;
  const double w = load_mask<double>(in.batch.layout, in.batch.response_mask, row, column);
  if (w == 0) {
    if (in.decays && column < last) slot.kind = SlotKind::gap;
    slot.token.lambda = {in.lambda};
    return slot;
  }
  slot.seen = w * 0;
  slot.token.lambda = {lambda_of<Formula>(in, row, column)};
  read_numbers<Formula>(in, row, column, slot, TokenNumberIndices{});
  slot.kind = SlotKind::token;
  const EpisodeEnd end = read_end(in, row, column);
  slot.ends = end.ends;
  slot.after = end.after;
  return slot;
}

template <class Formula>
TETHER_TEAM Passage passage_of(const Formula& formula, const ScanParameters& in, const Slot& slot) {
  if (slot.kind == SlotKind::nothing) return {};
  const Step<Constant<double>> step = formula.step(slot.token);
  if (slot.kind == SlotKind::gap) return {0, in.gamma, 0, 0, step.keep.value, 1};
  const double base = within_scan(step.base.value) + slot.seen;
  if (!slot.ends) return {slot.token.value.value, 0, base, step.next.value, step.keep.value, 1};
  return {slot.token.value.value, 0, base + within_scan(step.next.value * slot.after), 0, 0, 0};
}

// A of a token that sees `behind`.
template <class Formula>
TETHER_TEAM double advantage_of(const Formula& formula, const Slot& slot, const Behind& behind) {
  const Step<Constant<double>> step = [&] {
    if constexpr (HasOwnAdvantage<Formula>) {
      return formula.advantage(slot.token);
    } else {
      return formula.step(slot.token);
    }
  }();
  const Behind seen = slot.ends ? Behind{slot.after, 0} : behind;
  return (within_scan(step.base.value) + slot.seen + within_scan(step.next.value * seen.value)) +
         within_scan(step.keep.value * seen.x);
}

struct ScanRun {
  Slot slots[kScanRun];
  Behind behind;  // the run
};

// The lambda of the nearest token behind.
struct NearestLambda {
  double lambda = 1;
  int64_t found = 0;

  static TETHER_TEAM NearestLambda none() { return {}; }
  static TETHER_TEAM NearestLambda of(const NearestLambda& before, const NearestLambda& behind) {
    return before.found != 0 ? before : behind;
  }
};

// A masked slot that decays has it.
template <class Team, class Local>
TETHER_TEAM NearestLambda spread_lambdas(const Team& team, Local& local,
                                         const NearestLambda& behind_tile) {
  const auto nearest = [](const ScanRun& own) {
    NearestLambda out;
    TETHER_UNROLL
    for (int i = kScanRun - 1; i >= 0; --i) {
      if (own.slots[i].kind == SlotKind::token) out = {own.slots[i].token.lambda.value, 1};
    }
    return out;
  };
  const auto spread = [&](ScanRun& own, const NearestLambda& behind) {
    double lambda = NearestLambda::of(behind, behind_tile).lambda;
    TETHER_UNROLL
    for (int i = kScanRun - 1; i >= 0; --i) {
      if (own.slots[i].kind == SlotKind::token) lambda = own.slots[i].token.lambda.value;
      own.slots[i].token.lambda.value = lambda;
    }
  };
  return NearestLambda::of(team.template scan_back<NearestLambda>(local, nearest, spread),
                           behind_tile);
}

// The column of the last token; what follows it is padding. -1: there is none.
template <class Team>
TETHER_TEAM int64_t last_token(const Team& team, const ScanParameters& in, int64_t row) {
  struct Last {
    int64_t column = -1;
  };
  typename Team::template Local<Last> local;
  team.each(local, [&](int thread, Last& own) {
    for (int64_t i = thread; i < in.batch.layout.length(row); i += Team::kThreads) {
      if (load_mask(in.batch.layout, in.batch.response_mask, row, i) != 0) own.column = i;
    }
  });
  return team
      .template reduce<Max>(local, [](const Last& own) { return Several<int64_t, 1>{own.column}; })
      .each[0];
}

// The results of a run, from its end.
template <class Formula>
TETHER_TEAM void write_run(const Formula& formula, const ScanParameters& in, int64_t row,
                           int64_t column, int64_t length, const ScanRun& own) {
  Behind behind = own.behind;
  TETHER_UNROLL
  for (int i = kScanRun - 1; i >= 0; --i) {
    const Slot& slot = own.slots[i];
    const Behind now = passage_of(formula, in, slot)(behind);
    if (column + i < length) {
      const bool token = slot.kind == SlotKind::token;
      if (in.advantages) {
        const double advantage = token ? advantage_of(formula, slot, behind) : 0;
        store(in.batch.layout, in.advantages, row, column + i, advantage);
      }
      if (in.returns) {
        const double result = token ? now.x + slot.token.value.value : 0;
        store(in.batch.layout, in.returns, row, column + i, result);
      }
    }
    behind = now;
  }
}

template <class Formula, class Team>
TETHER_TEAM void row_scan_program(const Team& team, const Formula& formula,
                                  const ScanParameters& in, int64_t row) {
  constexpr int64_t kTile = int64_t{Team::kThreads} * kScanRun;
  const int64_t length = in.batch.layout.length(row);
  const int64_t last = in.decays ? last_token(team, in, row) : 0;
  const bool spreads = in.decays && kHasLambda<Formula> && in.batch.lambdas;
  Behind behind;
  if (in.batch.bootstrap) {
    const double value = load<double>(in.batch.layout, in.batch.bootstrap, row, 0);
    behind.value = value + value * 0;
  }
  NearestLambda lambda{in.lambda, 1};
  typename Team::template Local<ScanRun> local;
  for (int64_t begin = (length - 1) / kTile * kTile; begin >= 0; begin -= kTile) {
    team.each(local, [&](int thread, ScanRun& own) {
      TETHER_UNROLL
      for (int i = 0; i < kScanRun; ++i) {
        const int64_t column = begin + thread * kScanRun + i;
        own.slots[i] = column < length ? slot_at<Formula>(in, row, column, last) : Slot{};
      }
    });
    if (spreads) lambda = spread_lambdas(team, local, lambda);
    const auto passage = [&](const ScanRun& own) {
      Passage out;
      TETHER_UNROLL
      for (int i = kScanRun - 1; i >= 0; --i) {
        out = Following::of(passage_of(formula, in, own.slots[i]), out);
      }
      return out;
    };
    const Passage tile = team.template scan_back<Following>(
        local, passage,
        [&](ScanRun& own, const Passage& of_others) { own.behind = of_others(behind); });
    team.each(local, [&](int thread, ScanRun& own) {
      write_run(formula, in, row, begin + thread * kScanRun, length, own);
    });
    behind = tile(behind);
  }
}

}  // namespace tether::cuda
