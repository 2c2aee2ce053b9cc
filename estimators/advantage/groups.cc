#include "estimators/advantage/groups.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/fields.h"

namespace tether {
namespace {

using Number = Group::Number;

void check_rewards(std::string_view function, const GroupArrays& batch, NanReward rule) {
  for (int64_t i = 0; i < batch.count; ++i) {
    const double reward = batch.rewards[i];
    const bool missing = std::isnan(reward) && rule == NanReward::missing;
    require(std::isfinite(reward) || missing, [&] {
      return named(function, "rewards") + " must be finite, got " + text(reward) + " at [" +
             text(i) + "]" +
             (std::isnan(reward) ? ". Pass nan_reward = missing to leave it out of its group" : "");
    });
  }
}

void check_lengths(std::string_view function, const GroupArrays& batch) {
  for (int64_t i = 0; i < batch.count; ++i) {
    const double length = batch.lengths[i];
    require(length >= 0 && std::isfinite(length), [&] {
      return named(function, "lengths") + " must be at least 0 and finite, got " + text(length) +
             " at [" + text(i) + "]";
    });
  }
}

void check(std::string_view function, const GroupArrays& batch, const GroupRule& rule) {
  check_formula(function, rule);
  check_sizes(function, batch.group_ids != nullptr, batch.group_size, batch.count);
  check_rewards(function, batch, rule.nan_reward());
  const bool empty = batch.count == 0;  // then no array has memory
  check_reads(function, {.lengths = batch.lengths != nullptr || empty}, rule);
  if (rule.traits().needs_lengths) check_lengths(function, batch);
}

// The members of one group that are there, as rules read them.
class Members {
 public:
  Members(const GroupArrays& batch, bool with_lengths)
      : batch_(batch), with_lengths_(with_lengths) {}

  // Those that are there of the places from `first` up to `last`.
  void set(const int64_t* first, const int64_t* last) {
    places_.resize(static_cast<size_t>(last - first));
    const auto there = [this](int64_t place) { return !std::isnan(batch_.rewards[place]); };
    places_.erase(std::copy_if(first, last, places_.begin(), there), places_.end());
  }
  const std::vector<int64_t>& places() const { return places_; }

  Group group() {
    Group out{.size = static_cast<int64_t>(places_.size())};
    if (out.size == 0) return out;
    out.reward = gathered(batch_.rewards, rewards_);
    out.first = out.reward[0];
    Number sum = 0, squares = 0;
    out.best = out.second = -std::numeric_limits<Number>::infinity();
    for (int64_t i = 0; i < out.size; ++i) {
      sum += out.deviation(i);
      out.second = std::max(out.second, std::min(out.best, out.deviation(i)));
      out.best = std::max(out.best, out.deviation(i));
    }
    if (out.size == 1) out.second = out.best;
    out.mean = sum / Number(out.size);
    for (int64_t i = 0; i < out.size; ++i) {
      squares += (out.deviation(i) - out.mean) * (out.deviation(i) - out.mean);
    }
    if (out.size > 1) out.std = std::sqrt(squares / Number(out.size - 1));
    if (!with_lengths_) return out;
    out.length = gathered(batch_.lengths, lengths_);
    Number tokens = 0, weighted = 0;
    for (int64_t i = 0; i < out.size; ++i) {
      tokens += out.length[i];
      weighted += out.length[i] * out.deviation(i);
    }
    out.length_mean = tokens > 0 ? weighted / tokens : out.mean;
    return out;
  }

 private:
  const double* gathered(const double* numbers, std::vector<double>& out) const {
    out.resize(places_.size());
    for (size_t i = 0; i < out.size(); ++i) out[i] = numbers[places_[i]];
    return out.data();
  }

  const GroupArrays& batch_;
  bool with_lengths_;
  std::vector<int64_t> places_;
  std::vector<double> rewards_, lengths_;
};

// The places of all rewards, those of a group beside each other.
std::vector<int64_t> places_by_group(const GroupArrays& batch) {
  std::vector<int64_t> places(static_cast<size_t>(batch.count));
  std::iota(places.begin(), places.end(), 0);
  if (batch.group_ids == nullptr) return places;
  std::stable_sort(places.begin(), places.end(),
                   [&](int64_t a, int64_t b) { return batch.group_ids[a] < batch.group_ids[b]; });
  return places;
}

}  // namespace

void check_sizes(std::string_view function, bool has_ids, int64_t group_size, int64_t count) {
  require(count >= 0,
          [&] { return named(function, "count") + " must be at least 0, got " + text(count); });
  require(!has_ids || group_size == 0, [&] {
    return named(function, "group_size") + " must be 0 beside group_ids, got " + text(group_size);
  });
  if (has_ids || count == 0) return;
  require(group_size >= 1, [&] {
    return named(function, "group_size") + " must be at least 1, got " + text(group_size);
  });
  require(count % group_size == 0, [&] {
    return named(function, "rewards") + " must divide into groups of " + text(group_size) +
           ", got " + text(count) + ". Pass group ids for ragged groups";
  });
}

void check_reads(std::string_view function, const GroupInputs<bool>& given, const GroupRule& rule) {
  require(given.lengths || !rule.traits().needs_lengths,
          [&] { return named(function, "lengths") + " must be given, got none"; });
}

void advantages_of_groups(std::string_view function, const GroupArrays& batch,
                          const GroupRule& rule, double* advantages) {
  check(function, batch, rule);
  std::fill_n(advantages, batch.count, 0.0);
  Members members(batch, rule.traits().needs_lengths);
  const std::vector<int64_t> places = places_by_group(batch);
  const int64_t *first = places.data(), *last = first + batch.count;
  Number batch_std = 0;
  if (rule.reads_batch()) {
    members.set(first, last);
    batch_std = members.group().std;
  }
  std::vector<double> out;
  for (const int64_t* end = first; first < last; first = end) {
    end = first + (batch.group_ids ? 1 : batch.group_size);
    while (batch.group_ids && end < last && batch.group_ids[*end] == batch.group_ids[*first]) ++end;
    members.set(first, end);
    Group group = members.group();
    group.batch_std = batch_std;
    out.resize(members.places().size());
    rule.advantages(group, out.data());
    for (size_t i = 0; i < out.size(); ++i) advantages[members.places()[i]] = out[i];
  }
}

}  // namespace tether
