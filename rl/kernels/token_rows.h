#pragma once

#include <algorithm>
#include <cstdint>

#include "../../core/batch.h"
#include "../../core/sum.h"
#include "arrays.h"
#include "token_block.h"

// The tokens of a batch, a block at a time.

namespace tether {

inline const ConstArray& old_logps_of(const PolicyArrays& batch) {
  return batch.old_logps ? batch.old_logps : batch.logps;
}

// Whether load_plain can read the batch.
template <class T>
bool is_plain(const PolicyArrays& batch) {
  constexpr DType kType = sizeof(T) == 8 ? DType::float64 : DType::float32;
  const auto plain = [](const ConstArray& array, DType type) {
    return array.dtype == type && array.column_stride == 1 && !array.per_row;
  };
  return plain(batch.logps, kType) && plain(old_logps_of(batch), kType) &&
         plain(batch.advantages, kType);
}

template <class T>
PlainTokens<T> plain_tokens(const PolicyArrays& batch, int64_t row, int64_t column) {
  const auto at = [&](const ConstArray& array) {
    return static_cast<const T*>(array.data) + array.index(batch.layout, row, column);
  };
  return {at(batch.logps), at(old_logps_of(batch)), at(batch.advantages)};
}

template <class T>
void load_tokens(const PolicyArrays& batch, int64_t row, int64_t column, int count,
                 TokenBlock<T>& block) {
  const auto load = [&](const ConstArray& array, const T* weights, T* out) {
    load_block(batch.layout, array, row, column, count, weights, out);
  };
  block.size = whole_lanes(count);
  load(batch.response_mask, nullptr, block.weight);
  if (is_plain<T>(batch)) {
    load_plain(plain_tokens<T>(batch, row, column), count, block);
  } else {
    load(batch.logps, block.weight, block.logp);
    load(old_logps_of(batch), block.weight, block.old_logp);
    load(batch.advantages, block.weight, block.advantage);
  }
  if (batch.ref_logps) load(batch.ref_logps, block.weight, block.ref_logp);
  if (batch.rollout_logps) load(batch.rollout_logps, block.weight, block.rollout_logp);
  const auto load_weights = [&](const ConstArray& array, T* out) {
    load(array, block.weight, out);
    saturate_column(Largest<T>::kWeight, block.size, out);
  };
  if (batch.token_weights) load_weights(batch.token_weights, block.given_weight);
  if (batch.kl_weights) load_weights(batch.kl_weights, block.given_kl_weight);
}

// The number of true ones.
TETHER_CLONES inline int64_t count_true(const uint8_t* mask, int64_t size) {
  int64_t count = 0;
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t end = begin + kBlock < size ? begin + kBlock : size;
    int32_t part = 0;
    for (int64_t i = begin; i < end; ++i) part += mask[i] != 0;  // VECTOR
    count += part;
  }
  return count;
}

template <class T>
double row_tokens(const PolicyArrays& batch, int64_t row) {
  const ConstArray& mask = batch.response_mask;
  const int64_t length = batch.layout.length(row);
  if (mask.dtype == DType::boolean && mask.column_stride == 1) {
    const auto* data = static_cast<const uint8_t*>(mask.data);
    return static_cast<double>(count_true(data + mask.index(batch.layout, row, 0), length));
  }
  alignas(64) T weight[kBlock];
  LaneSum tokens;
  for (int64_t column = 0; column < length; column += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, length - column));
    load_block<T>(batch.layout, mask, row, column, count, nullptr, weight);
    sum_weights(weight, whole_lanes(count), tokens);
  }
  return tokens.total();
}

// The number of a row, of an array that has one for each; `absent` without one.
inline double number_of_row(const RowLayout& layout, const ConstArray& array, int64_t row,
                            double absent) {
  if (!array) return absent;
  double out[kLanes];
  load_block<double>(layout, array, row, 0, 1, nullptr, out);
  return out[0];
}

// What sequence_mean_token_mean divides a row of n tokens by.
inline double length_of(const PolicyArrays& batch, int64_t row, double n) {
  return number_of_row(batch.layout, batch.row_tokens, row, n);
}

// Where a block is.
struct Place {
  int64_t row, column;
  int count;

  Place next(const RowLayout& layout) const {
    const int64_t column_after = column + count;
    if (column_after < layout.length(row)) return at(layout, row, column_after);
    return row + 1 < layout.rows ? at(layout, row + 1, 0) : Place{row, column, 0};
  }
  static Place at(const RowLayout& layout, int64_t row, int64_t column) {
    return {row, column, static_cast<int>(std::min<int64_t>(kBlock, layout.length(row) - column))};
  }
};

// visit(place) for every block of the row, with its tokens loaded.
template <class T, class Visit>
void for_each_block(const PolicyArrays& batch, int64_t row, TokenBlock<T>& block, Visit visit) {
  const int64_t length = batch.layout.length(row);
  for (int64_t column = 0; column < length; column += kBlock) {
    const Place place = Place::at(batch.layout, row, column);
    load_tokens(batch, row, column, place.count, block);
    visit(place);
  }
}

}  // namespace tether
