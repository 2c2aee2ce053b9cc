#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string_view>

#include "../../core/batch.h"
#include "../../core/bit_cast.h"
#include "../../core/macros.h"
#include "../../core/parallel.h"
#include "../../core/select.h"
#include "arrays.h"
#include "token_rows.h"

// Where the turns of a row begin (rl/level.h).

namespace tether {

// What tells turns apart: ids, or the mask as the caller gave it. Weights that take tokens out do
// not cut a turn in two.
struct TurnMarks {
  ConstArray ids;
  ConstArray mask;
  bool ascend;  // the ids of masked slots, too
};

namespace detail {

// Whether no id is smaller than the one before it.
template <class Int>
TETHER_CLONES bool ascends(const Int* ids, int64_t length) {
  int64_t falls = 0;
  for (int64_t i = 1; i < length; ++i) falls += ids[i] < ids[i - 1];  // VECTOR
  return falls == 0;
}

// Whether a slot has another id than the one before it; the first is compared with `last`.
template <class Int>
TETHER_CLONES void mark_changes(const Int* ids, Int last, int count, uint8_t* change) {
  change[0] = ids[0] != last;
  for (int i = 1; i < count; ++i) change[i] = ids[i] != ids[i - 1];  // VECTOR
}

// Whether it is the first of a run of the mask.
template <class T>
TETHER_CLONES void mark_runs(const T* mask, bool inside, int count, uint8_t* change) {
  change[0] = (mask[0] != T(0)) & !inside;
  for (int i = 1; i < count; ++i) change[i] = (mask[i] != T(0)) & (mask[i - 1] == T(0));  // VECTOR
}

// visit(i) for every mark among the first `count` of a block, whose rest is 0.
template <class Visit>
void for_each_mark(const uint8_t* marks, int count, Visit visit) {
  for (int start = 0; start < count; start += 8) {
    uint64_t eight;
    std::memcpy(&eight, marks + start, 8);
    if (eight == 0) continue;
    for (int i = start; i < start + 8; ++i) {
      if (marks[i] != 0) visit(i);
    }
  }
}

template <class Read>
auto with_ids(const ConstArray& ids, int64_t first, Read read) {
  return ids.dtype == DType::int32 ? read(static_cast<const int32_t*>(ids.data) + first)
                                   : read(static_cast<const int64_t*>(ids.data) + first);
}

// Whether all ids of a row ascend, those of masked slots too. Of strided ones nobody says.
inline bool ascends(const RowLayout& layout, const ConstArray& ids, int64_t row) {
  if (ids.column_stride != 1) return false;
  return with_ids(ids, ids.index(layout, row, 0),
                  [&](const auto* in) { return ascends(in, layout.length(row)); });
}

}  // namespace detail

// Where the turns of one row begin, a block after the other: at a change of the ids or where a run
// of the mask begins. There may be turns without a token among them.
template <class T>
class TurnScan {
 public:
  TurnScan(const TurnMarks& marks, const RowLayout& layout) : marks_(marks), layout_(layout) {}

  // begin(i) for each slot of the block at which another turn begins than that of the slots before.
  template <class Begin>
  void for_each_begin(const Place& place, const T* weight, Begin begin) {
    alignas(64) uint8_t change[kBlock] = {};
    const auto& [row, column, count] = place;
    if (!marks_.ids) {
      alignas(64) T mask[kBlock];
      load_block<T>(layout_, marks_.mask, row, column, count, nullptr, mask);
      detail::mark_runs(mask, inside_, count, change);
      inside_ = mask[count - 1] != T(0);
    } else {
      detail::with_ids(marks_.ids, marks_.ids.index(layout_, row, column), [&](const auto* ids) {
        if (!marks_.ascend) return mark_changes_of_active(ids, weight, count, change);
        detail::mark_changes(ids, column > 0 ? ids[-1] : ids[0], count, change);
      });
    }
    detail::for_each_mark(change, count, begin);
  }

 private:
  // Masked slots may hold anything. Without branches: nobody foresees a mask.
  template <class Int>
  void mark_changes_of_active(const Int* ids, const T* weight, int count, uint8_t* change) {
    const int64_t stride = marks_.ids.column_stride;
    for (int i = 0; i < count && !any_; ++i) {
      any_ = weight[i] != T(0);
      last_ = ids[i * stride];
    }
    for (int i = 0; i < count; ++i) {
      const int64_t active = -int64_t(bit_cast<Mask<T>>(weight[i]) != 0);
      const int64_t other = (ids[i * stride] ^ last_) & active;
      change[i] = other != 0;
      last_ ^= other;  // the id of this token, if it is active
    }
  }

  const TurnMarks& marks_;
  const RowLayout& layout_;
  bool inside_ = false, any_ = false;
  int64_t last_ = 0;
};

// Whether the ids of the active tokens of a row ascend.
template <class T>
bool active_ascend(const PolicyArrays& caller, int64_t row) {
  const RowLayout& layout = caller.layout;
  const int64_t stride = caller.turn_ids.column_stride;
  int64_t last = std::numeric_limits<int64_t>::min(), falls = 0;
  alignas(64) T weight[kBlock];
  for (int64_t column = 0; column < layout.length(row); column += kBlock) {
    const Place place = Place::at(layout, row, column);
    load_block<T>(layout, caller.response_mask, row, column, place.count, nullptr, weight);
    const int64_t first = caller.turn_ids.index(layout, row, column);
    detail::with_ids(caller.turn_ids, first, [&](const auto* ids) {
      for (int i = 0; i < place.count; ++i) {
        const int64_t active = -int64_t(bit_cast<Mask<T>>(weight[i]) != 0), id = ids[i * stride];
        falls |= active & -int64_t(id < last);
        last = (id & active) | (last & ~active);
      }
    });
  }
  return falls == 0;
}

// Those of a batch. Throws where the ids of active tokens decrease along a row.
template <class T>
TurnMarks turn_marks(std::string_view function, const PolicyArrays& caller,
                     const Executor& executor) {
  const RowLayout& layout = caller.layout;
  const ConstArray& ids = caller.turn_ids;
  if (!ids) return {{}, caller.response_mask, false};
  const Chunks chunks = Chunks::of(layout.rows, layout.elements());
  std::atomic<bool> ascend = true, sound = true;
  parallel_for(executor, chunks.count, [&](int64_t chunk) {
    for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row) {
      if (layout.length(row) == 0 || detail::ascends(layout, ids, row)) continue;
      ascend = false;
      if (!active_ascend<T>(caller, row)) sound = false;
    }
  });
  if (!sound) check_ascending(function, "turn_ids", layout, ids, caller.response_mask);
  return {ids, caller.response_mask, ascend};
}

}  // namespace tether
