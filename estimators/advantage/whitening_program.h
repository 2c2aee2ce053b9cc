#pragma once

#include <cmath>
#include <cstdint>

#include "../../core/elements.h"
#include "../../core/macros.h"
#include "../../core/team.h"
#include "../../core/token_piece.h"
#include "whitening.h"

// Moments and whitening (whitening.h) as programs of a team: whitening.cu runs them on a device.

namespace tether::cuda {

inline constexpr int kWhiteningThreads = 256;

struct WhiteningParameters {
  WhiteningArrays batch;
  MutableArray out;
  double epsilon;
  bool shift_mean;
  int64_t pieces;  // of a row
};

TETHER_TEAM double value_at(const WhiteningArrays& batch, int64_t row, int64_t column) {
  return saturated(load<double>(batch.layout, batch.values, row, column), kLargestValue);
}

// visit(weight, value, state) for the values of a piece of a row, by all threads.
template <class Team, class Local, class Visit>
TETHER_TEAM void for_each_value(const Team& team, Local& local, const WhiteningArrays& batch,
                                const TokenPiece& piece, Visit visit) {
  team.each(local, [&](int thread, auto& own) {
    for (int64_t i = piece.begin + thread; i < piece.end; i += Team::kThreads) {
      const double w = load_mask<double>(batch.layout, batch.response_mask, piece.row, i);
      if (w != 0) visit(w, value_at(batch, piece.row, i), own);
    }
  });
}

// Of one thread: the sums of its values' distances from its first.
struct ValueSums {
  bool any = false;
  double first = 0, count = 0, sum = 0, squares = 0;
};

// Merges moments, in the order of their places.
struct Merged {
  static TETHER_TEAM Moments none() { return {}; }
  static TETHER_TEAM Moments of(const Moments& before, const Moments& behind) {
    return before.merged(behind);
  }
};

template <class Team, class Local>
TETHER_TEAM Moments merged_moments(const Team& team, Local& local) {
  return team.template scan_back<Merged>(
      local, [](const auto& own) { return own.moments; }, [](auto&, const Moments&) {});
}

// Of a piece of a row. Distances are from a thread's first value: those of equal ones are 0.
template <class Team>
TETHER_TEAM void moments_program(const Team& team, const WhiteningArrays& batch, int64_t pieces,
                                 int64_t index, Moments* parts) {
  const TokenPiece piece(batch.layout, index, pieces);
  struct Own : ValueSums {
    Moments moments;
  };
  typename Team::template Local<Own> local;
  for_each_value(team, local, batch, piece, [](double w, double value, Own& own) {
    if (!own.any) own.first = value;
    own.any = true;
    own.count += w;
    own.sum += w * (value - own.first);
  });
  for_each_value(team, local, batch, piece, [](double w, double value, Own& own) {
    const double deviation = (value - own.first) - own.sum / own.count;
    own.squares += w * deviation * deviation;
  });
  team.each(local, [](int, Own& own) {
    if (own.any) own.moments = {own.count, own.first + own.sum / own.count, own.squares};
  });
  const Moments all = merged_moments(team, local);
  team.each(local, [&](int thread, Own&) {
    if (thread == 0) parts[index] = all;
  });
}

template <class Team>
TETHER_TEAM void merge_moments_program(const Team& team, const Moments* parts, int64_t count,
                                       Moments* out) {
  struct Own {
    Moments moments;
  };
  typename Team::template Local<Own> local;
  team.each(local, [&](int thread, Own& own) {
    for (int64_t i = thread; i < count; i += Team::kThreads) {
      own.moments = own.moments.merged(parts[i]);
    }
  });
  const Moments all = merged_moments(team, local);
  team.each(local, [&](int thread, Own&) {
    if (thread == 0) *out = all;
  });
}

template <class Team>
TETHER_TEAM void whitening_program(const Team& team, const WhiteningParameters& in,
                                   const Moments* moments, int64_t index) {
  const TokenPiece piece(in.batch.layout, index, in.pieces);
  const Moments step = *moments;
  const double variance = step.variance();
  const double scale = variance == 0 ? 0 : 1 / sqrt(variance + in.epsilon);  // NaN comes out
  const double centre = in.shift_mean ? 0 : step.mean;
  const RowLayout& layout = in.batch.layout;
  typename Team::template Local<NoState> local;
  team.each(local, [&](int thread, NoState&) {
    for (int64_t i = piece.begin + thread; i < piece.end; i += Team::kThreads) {
      const double w = load_mask<double>(layout, in.batch.response_mask, piece.row, i);
      double result = 0;
      if (w != 0) {
        const double value = value_at(in.batch, piece.row, i);
        result = (value - step.mean) * scale + centre + w * 0;
      }
      store(layout, in.out, piece.row, i, result);
    }
  });
}

}  // namespace tether::cuda
