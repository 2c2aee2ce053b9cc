#include "logits/support.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <functional>
#include <iterator>
#include <string>
#include <vector>

#include "core/check.h"
#include "logits/rows.h"
#include "logits/stored_rows.h"
#include "logits/stores.h"

namespace tether {
namespace {

using namespace rows;

constexpr int64_t kNone = -1;  // of ids; a row that has no target

// visit(ids, stride, count) of a row, in the type of the ids.
template <class Visit>
void with_ids(const KeptIds& kept, int64_t row, Visit visit) {
  const int64_t first = kept.ids.index(kept.layout, row, 0);
  const int64_t stride = kept.ids.index(kept.layout, row, 1) - first;
  const int64_t count = kept.layout.length(row);
  if (count == 0) return;
  if (kept.ids.dtype == DType::int32) {
    visit(static_cast<const int32_t*>(kept.ids.data) + first, stride, count);
  } else {
    visit(static_cast<const int64_t*>(kept.ids.data) + first, stride, count);
  }
}

// Of divergences: active (may be null) has 0 where a row is ignored too.
bool is_skipped(const int64_t* targets, const uint8_t* active, int64_t row,
                const RowOptions& options) {
  return (active != nullptr && active[row] == 0) || is_ignored(targets, row, options);
}

int64_t target_of(const int64_t* targets, int64_t row) {
  return targets == nullptr ? kNone : targets[row];
}

// ---- the set of a row ---------------------------------------------------------------------------

// The ids of which the logits are the columns [first, first + columns).
struct Ids {
  int64_t first, columns, all;

  Ids(const ConstLogits& logits, const RowOptions& options)
      : first(options.first_id),
        columns(logits.vocabulary),
        all(options.ids > 0 ? options.ids : columns) {}
};

struct Set {
  bool whole = false;                 // no ids were given
  bool added = false;                 // they lacked the target
  std::vector<int64_t> columns = {};  // of the logits, ascending; none where all are elsewhere

  int64_t size() const { return std::ssize(columns); }
  int64_t column(int64_t i) const { return columns[static_cast<size_t>(i)]; }
  // The place of a column, or kNone.
  int64_t find(int64_t column) const {
    const auto place = std::lower_bound(columns.begin(), columns.end(), column);
    return place != columns.end() && *place == column ? place - columns.begin() : kNone;
  }
};

// Ascending, each once; those of an engine mostly are in order. A bit for each id: 10 times as fast
// as a sort of hundreds.
void put_in_order(std::vector<int64_t>& ids, int64_t all) {
  if (ids.front() > ids.back()) std::reverse(ids.begin(), ids.end());
  if (std::adjacent_find(ids.begin(), ids.end(), std::greater_equal<>()) == ids.end()) return;
  std::vector<uint64_t> words(static_cast<size_t>(all / 64 + 1));
  for (const int64_t id : ids) words[size_t(id / 64)] |= uint64_t{1} << (id % 64);
  ids.clear();
  for (size_t i = 0; i < words.size(); ++i) {
    for (uint64_t left = words[i]; left != 0; left &= left - 1) {
      ids.push_back(int64_t(i) * 64 + std::countr_zero(left));
    }
  }
}

Set set_of(const KeptIds& kept, int64_t row, int64_t target, const Ids& of) {
  Set out;
  std::vector<int64_t>& ids = out.columns;
  with_ids(kept, row, [&](const auto* each, int64_t stride, int64_t count) {
    ids.resize(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) ids[size_t(i)] = each[i * stride];
  });
  std::erase(ids, kNone);
  out.whole = ids.empty();
  if (out.whole) return out;
  put_in_order(ids, of.all);
  const auto place = std::lower_bound(ids.begin(), ids.end(), target);
  out.added = target != kNone && (place == ids.end() || *place != target);
  if (out.added) ids.insert(place, target);
  ids.erase(std::lower_bound(ids.begin(), ids.end(), of.first + of.columns), ids.end());
  ids.erase(ids.begin(), std::lower_bound(ids.begin(), ids.end(), of.first));
  for (int64_t& id : ids) id -= of.first;
  return out;
}

// ---- its logits ---------------------------------------------------------------------------------

// visit(Word{}): numbers are moved, not read.
template <class Visit>
void with_words(DType dtype, Visit visit) {
  switch (bytes_of(dtype)) {
    case 2:
      return visit(uint16_t{});
    case 4:
      return visit(uint32_t{});
    default:
      return visit(uint64_t{});
  }
}

template <class Word>
void gather(const Set& set, const char* row, int64_t stride, char* out) {
  for (size_t i = 0; i < set.columns.size(); ++i) {
    std::memcpy(out + i * sizeof(Word), row + set.columns[i] * stride * int64_t{sizeof(Word)},
                sizeof(Word));
  }
}

// The numbers at the set's columns and zeros beside them: block by block, so that each element is
// written once.
template <class Word>
void scatter(const Set& set, const char* numbers, const MutableLogits& out, int64_t row) {
  constexpr int64_t kBlock = 2048, kBytes = sizeof(Word);
  const bool past_caches = out.stride == 1 && is_large(out);
  char* to = static_cast<char*>(lone_row(out, row).data);
  alignas(64) char block[kBlock * kBytes] = {};
  for (int64_t begin = 0, next = 0, count = 0; begin < out.vocabulary; begin += count) {
    // From the second block on in whole lines of memory.
    const auto ahead = static_cast<int64_t>(reinterpret_cast<uintptr_t>(to + begin * kBytes) % 64);
    const int64_t first = next;
    count = std::min(kBlock - ahead / kBytes, out.vocabulary - begin);
    const auto place = [&](int64_t i) { return block + (set.column(i) - begin) * kBytes; };
    for (; next < set.size() && set.column(next) < begin + count; ++next) {
      std::memcpy(place(next), numbers + next * kBytes, kBytes);
    }
    if (past_caches) {
      store_past_caches(block, to + begin * kBytes, count * kBytes);
    } else if (out.stride == 1) {
      std::memcpy(to + begin * kBytes, block, static_cast<size_t>(count * kBytes));
    } else {
      for (int64_t i = 0; i < count; ++i) {
        std::memcpy(to + (begin + i) * out.stride * kBytes, block + i * kBytes, kBytes);
      }
    }
    for (int64_t i = first; i < next; ++i) std::memset(place(i), 0, kBytes);
  }
  if (past_caches) finish_stores();
}

// The kept logits of a row, or memory for their gradients, as a row of their own.
class Gathered {
 public:
  Gathered(const Set& set, DType dtype)
      : set_(set), dtype_(dtype), memory_(set.columns.size() * size_t(bytes_of(dtype)) / 8 + 1) {}
  Gathered(const Set& set, const ConstLogits& logits, int64_t row) : Gathered(set, logits.dtype) {
    const char* from = static_cast<const char*>(lone_row(logits, row).data);
    with_words(dtype_, [&]<class Word>(Word) { gather<Word>(set_, from, logits.stride, data()); });
  }

  ConstLogits view() const {
    return {.data = memory_.data(), .dtype = dtype_, .rows = 1, .vocabulary = set_.size()};
  }
  MutableLogits memory() {
    return {.data = memory_.data(), .dtype = dtype_, .rows = 1, .vocabulary = set_.size()};
  }
  void write_to(const MutableLogits& out, int64_t row) {
    with_words(dtype_, [&]<class Word>(Word) { scatter<Word>(set_, data(), out, row); });
  }

 private:
  char* data() { return reinterpret_cast<char*>(memory_.data()); }

  const Set& set_;
  DType dtype_;
  std::vector<double> memory_;  // aligned for every type
};

// Of the gathered row: a target is a place in it.
RowOptions of_gathered(RowOptions options) {
  options.ignore_index = kNone;
  options.first_id = options.ids = 0;
  return options;
}

// ---- checks -------------------------------------------------------------------------------------

void check_kept(const std::string& function, const ConstLogits& logits, const int64_t* targets,
                const KeptIds& kept, const RowOptions& options, const uint8_t* active = nullptr) {
  if (!is_floating(logits.dtype)) refuse_type(function, "logits", logits.dtype);
  check_rows(function, logits, targets, options);
  check_layout(function, kept.layout);
  check_given(function, "ids", kept.layout, kept.ids);
  require(is_integer(kept.ids.dtype), [&] {
    return function + ": ids must be int32 or int64, got " + std::string(name_of(kept.ids.dtype));
  });
  require(kept.layout.rows == logits.rows, [&] {
    return function + ": ids must be of " + text(logits.rows) + " rows like the logits, got " +
           text(kept.layout.rows);
  });
  const int64_t all = Ids(logits, options).all;
  for (int64_t row = 0; row < kept.layout.rows; ++row) {
    if (is_skipped(targets, active, row, options)) continue;
    with_ids(kept, row, [&](const auto* ids, int64_t stride, int64_t count) {
      int64_t good = 0;
      while (good < count && kNone <= ids[good * stride] && ids[good * stride] < all) ++good;
      require(good == count, [&] {
        return function + ": ids must be in [0, " + text(all) + ") or -1 for none, got " +
               text(ids[good * stride]) + " at [" + text(row) + ", " + text(good) + "]";
      });
    });
  }
}

}  // namespace

// ---- log-probabilities --------------------------------------------------------------------------

int64_t support_statistics(const ConstLogits& logits, const int64_t* targets, const KeptIds& kept,
                           const RowOptions& options, RowStatistics* statistics, uint8_t* added,
                           const Executor& executor) {
  const std::string function = "support_statistics";
  check_kept(function, logits, targets, kept, options);
  const Ids ids(logits, options);
  std::atomic<int64_t> count = 0;
  for_each_row(logits, executor, [&](int64_t row) {
    if (added != nullptr) added[row] = 0;
    statistics[row] = ignored_row();
    if (is_ignored(targets, row, options)) return;
    const int64_t target = target_of(targets, row);
    const Set set = set_of(kept, row, target, ids);
    if (set.whole) {
      const int64_t* own = targets == nullptr ? nullptr : &target;
      return row_statistics(lone_row(logits, row), own, options, statistics + row);
    }
    if (set.added) ++count;
    if (added != nullptr) added[row] = set.added ? 1 : 0;
    statistics[row] = {};
    if (set.size() == 0) return;
    const Gathered in(set, logits, row);
    const int64_t place = set.find(target - ids.first);
    row_statistics(in.view(), place == kNone ? nullptr : &place, of_gathered(options),
                   statistics + row);
  });
  return count;
}

void support_gradients(const ConstLogits& logits, const int64_t* targets, const KeptIds& kept,
                       const RowOptions& options, const RowStatistics* statistics,
                       const double* dlogps, const double* dentropies, const MutableLogits& dlogits,
                       const Executor& executor) {
  const std::string function = "support_gradients";
  check_kept(function, logits, targets, kept, options);
  const Ids ids(logits, options);
  for_each_row(logits, executor, [&](int64_t row) {
    const double* dlogp = dlogps == nullptr ? nullptr : dlogps + row;
    const double* dentropy = dentropies == nullptr ? nullptr : dentropies + row;
    const bool ignored = is_ignored(targets, row, options);
    const bool wanted =
        (dlogp != nullptr && *dlogp != 0) || (dentropy != nullptr && *dentropy != 0);
    const int64_t target = target_of(targets, row);
    const Set set = ignored || !wanted ? Set{} : set_of(kept, row, target, ids);
    if (set.whole) {
      return row_gradients(lone_row(logits, row), targets == nullptr ? nullptr : &target, options,
                           statistics + row, dlogp, dentropy, lone_row(dlogits, row));
    }
    Gathered out(set, logits.dtype);
    if (set.size() > 0) {
      const int64_t place = set.find(target - ids.first);
      row_gradients(Gathered(set, logits, row).view(), place == kNone ? nullptr : &place,
                    of_gathered(options), statistics + row, dlogp, dentropy, out.memory());
    }
    out.write_to(dlogits, row);
  });
}

// ---- divergences --------------------------------------------------------------------------------

namespace {

RowOptions row_options(const SupportKlOptions& options) {
  return {.temperature = options.temperature,
          .ignore_index = options.ignore_index,
          .first_id = options.first_id,
          .ids = options.ids};
}

}  // namespace

void support_kl_statistics(const ConstLogits& q, const ConstLogits& p, const int64_t* targets,
                           const KeptIds& kept, const SupportKlOptions& options,
                           KlStatistics* statistics, const Executor& executor) {
  const std::string function = "support_kl_statistics";
  const RowOptions of_q = row_options(options);
  check_pair(function, q, p, options.temperature);
  check_kept(function, q, targets, kept, of_q, options.active);
  const Ids ids(q, of_q);
  for_each_row(q, executor, [&](int64_t row) {
    const uint8_t active = is_skipped(targets, options.active, row, of_q) ? 0 : 1;
    const Set set =
        active != 0 ? set_of(kept, row, target_of(targets, row), ids) : Set{.whole = true};
    const auto of = [&](const ConstLogits& x, const ConstLogits& y) {
      logits_kl_statistics(x, y, options.temperature, &active, statistics + row);
    };
    statistics[row] = {};
    if (set.whole) return of(lone_row(q, row), lone_row(p, row));
    if (set.size() == 0) return;
    const Gathered x(set, q, row), y(set, p, row);
    of(x.view(), y.view());
  });
}

void support_kl_gradients(const ConstLogits& q, const ConstLogits& p, const int64_t* targets,
                          const KeptIds& kept, const SupportKlOptions& options,
                          const KlStatistics* statistics, const LogitsKl* upstream,
                          const MutableLogits& dq, const MutableLogits& dp,
                          const Executor& executor) {
  const std::string function = "support_kl_gradients";
  const RowOptions of_q = row_options(options);
  check_pair(function, q, p, options.temperature);
  check_kept(function, q, targets, kept, of_q, options.active);
  const Ids ids(q, of_q);
  const bool with_q = dq.data != nullptr, with_p = dp.data != nullptr;
  for_each_row(q, executor, [&](int64_t row) {
    const LogitsKl& factors = upstream[row];
    const bool wanted = factors.kl != 0 || factors.reverse_kl != 0 || factors.entropy != 0;
    const bool read = wanted && !is_skipped(targets, options.active, row, of_q);
    const Set set = read ? set_of(kept, row, target_of(targets, row), ids) : Set{};
    const auto of = [&](const ConstLogits& x, const ConstLogits& y, const MutableLogits& dx,
                        const MutableLogits& dy) {
      logits_kl_gradients(x, y, options.temperature, statistics + row, &factors, dx, dy);
    };
    const MutableLogits none;
    if (set.whole) {
      return of(lone_row(q, row), lone_row(p, row), with_q ? lone_row(dq, row) : none,
                with_p ? lone_row(dp, row) : none);
    }
    Gathered dx(set, q.dtype), dy(set, q.dtype);
    if (set.size() > 0) {
      const Gathered x(set, q, row), y(set, p, row);
      of(x.view(), y.view(), with_q ? dx.memory() : none, with_p ? dy.memory() : none);
    }
    if (with_q) dx.write_to(dq, row);
    if (with_p) dy.write_to(dp, row);
  });
}

}  // namespace tether
