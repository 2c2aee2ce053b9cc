#include "rl/kernels/gated_mask.h"

#include <atomic>
#include <cmath>
#include <string>

#include "core/check.h"
#include "rl/kernels/token_rows.h"
#include "rl/kernels/turns.h"
#include "rl/kernels/weight_block.h"

namespace tether {
namespace {

int64_t place_of(const RowLayout& layout, int64_t row, int64_t column) {
  return (layout.packed() ? layout.offset(row) : row * layout.columns) + column;
}

// The mask of those that the gates leave in a block. Whether all are numbers.
template <class T>
TETHER_CLONES bool fill_block(const TokenBlock<T>& block, int count, T* out) {
  Mask<T> broken = 0;
#pragma GCC ivdep
  for (int i = 0; i < count; ++i) {  // VECTOR
    const T w = block.weight[i], gate = block.token_weight[i];
    const T left = keep(mask<T>(w != T(0)) & mask<T>(gate != T(0)), w + gate * T(0));
    broken |= mask<T>(left - left != T(0));
    out[i] = left;
  }
  return broken == 0;
}

// Likewise of a row.
template <class T>
bool fill_row(const PolicyArrays& batch, const std::vector<TokenWeight>& gates,
              const TurnMarks& turns, int64_t row, TokenBlock<T>& block,
              WeightStatistics<T>& statistics, T* mask) {
  bool sound = true;
  find_statistics<true>(batch, gates, turns, row, row_tokens<T>(batch, row), block, statistics);
  for_each_block(batch, row, block, [&](const Place& place) {
    saturate(batch, block);
    fill_weights(gates, place, statistics, /*given=*/false, block);
    T* out = mask + place_of(batch.layout, place.row, place.column);
    sound &= fill_block(block, place.count, out);
  });
  return sound;
}

}  // namespace

GatedMask::GatedMask(std::string_view function, const PolicyArrays& batch,
                     const PolicyObjective& objective, const Executor& executor) {
  const std::vector<TokenWeight> gates = weights_that(true, objective.weights);
  if (gates.empty()) return;
  if (batch.logps.dtype == DType::float64) {
    fill(function, batch, gates, executor, doubles_);
  } else {
    fill(function, batch, gates, executor, floats_);
  }
}

template <class T>
void GatedMask::fill(std::string_view function, const PolicyArrays& batch,
                     const std::vector<TokenWeight>& gates, const Executor& executor,
                     std::vector<T>& mask) {
  const RowLayout& layout = batch.layout;
  mask.resize(static_cast<size_t>(layout.elements()));
  const Chunks chunks = Chunks::of(layout.rows, layout.elements());
  const TurnMarks turns =
      any_of_turns(gates) ? turn_marks<T>(function, batch, executor) : TurnMarks{};
  std::atomic<bool> sound = true;
  parallel_for(executor, chunks.count, [&](int64_t chunk) {
    TokenBlock<T> block;
    WeightStatistics<T> statistics;
    for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row) {
      if (!fill_row(batch, gates, turns, row, block, statistics, mask.data())) sound = false;
    }
  });
  if (sound) return;
  check_weights(function, layout, batch.response_mask);
  for (int64_t row = 0; row < layout.rows; ++row) {
    for (int64_t column = 0; column < layout.length(row); ++column) {
      require(!std::isnan(mask[static_cast<size_t>(place_of(layout, row, column))]), [&] {
        std::string names;
        for (const TokenWeight& gate : gates) detail::append(names, name_of(gate));
        return std::string(function) + ": weights that take tokens out, " + names +
               ", must be numbers, got nan at [" + text(row) + ", " + text(column) + "]";
      });
    }
  }
}

PolicyArrays GatedMask::applied_to(const PolicyArrays& batch) const {
  PolicyArrays out = batch;
  const auto apply = [&](const auto& mask, DType dtype) {
    if (mask.empty()) return;
    out.response_mask = {.data = mask.data(),
                         .dtype = dtype,
                         .row_stride = batch.layout.columns,
                         .column_stride = 1};
  };
  apply(floats_, DType::float32);
  apply(doubles_, DType::float64);
  return out;
}

}  // namespace tether
