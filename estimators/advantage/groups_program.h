#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "../../core/elements.h"
#include "../../core/macros.h"
#include "../../core/team.h"
#include "group_rule.h"
#include "groups_cuda.h"

// The advantage of one answer relative to its group (group_rule.h) as a program of a team:
// groups.cu runs it on a device. Each answer walks over its group itself, in the order of the
// batch, so that its members agree to the bit: no group waits for another one, and none is sorted.

namespace tether::cuda {

inline constexpr int kGroupThreads = 128;

// A reward that is not finite is NaN, and so is a length that is none.
struct RewardOf {
  const float* data;

  TETHER_TEAM double operator[](int64_t i) const {
    const double x = static_cast<double>(data[i]);
    return x + x * 0;
  }
};
struct LengthOf {
  const float* data;

  TETHER_TEAM double operator[](int64_t i) const {
    const double length = static_cast<double>(data[i]);
    return length >= 0 ? length + length * 0 : double{kNaN};
  }
};

// As Group, in double, which holds the square of a difference of floats; members by their places in
// the batch.
struct PlacedGroup {
  using Number = double;

  int64_t size = 0;
  RewardOf reward = {};
  LengthOf length = {};
  double first = 0, mean = 0, length_mean = 0, std = 0, batch_std = 0;
  double rival = 0;  // the largest deviation of the others than one answer

  TETHER_TEAM double deviation(int64_t i) const { return reward[i] - first; }
  TETHER_TEAM double best_of_others(int64_t) const { return rival; }
};

struct GroupParameters {
  GroupBatch batch;
  bool skips_nan;     // NaN rewards are missing
  bool with_lengths;  // length_mean is read
  float* advantages;

  TETHER_TEAM bool is_there(int64_t place) const {
    const float reward = batch.rewards[place];
    return !skips_nan || reward == reward;
  }
};

inline GroupParameters group_parameters(const GroupBatch& batch, const GroupRule& rule,
                                        float* advantages) {
  return {batch, rule.nan_reward() == NanReward::missing, rule.traits().needs_lengths, advantages};
}

// The places of a group: those between two, and of one id where there are ids.
struct GroupPlaces {
  int64_t begin, end;
  const int64_t* ids;
  int64_t id;

  TETHER_TEAM bool has(int64_t place) const { return ids == nullptr || ids[place] == id; }
};

// visit(place, state) for the members that are there, by all threads.
template <class Team, class Local, class Visit>
TETHER_TEAM void for_each_member(const Team& team, Local& local, const GroupParameters& in,
                                 const GroupPlaces& places, Visit visit) {
  team.each(local, [&](int thread, auto& own) {
    for (int64_t i = places.begin + thread; i < places.end; i += Team::kThreads) {
      if (places.has(i) && in.is_there(i)) visit(i, own);
    }
  });
}

struct GroupSums {
  double n = 0, deviation = 0, squares = 0, tokens = 0, weighted = 0;
  int64_t before_first = INT64_MIN;  // - the place of the first member
};

template <class Team>
TETHER_TEAM PlacedGroup group_of(const Team& team, const GroupParameters& in,
                                 const GroupPlaces& places) {
  PlacedGroup out;
  out.reward.data = in.batch.rewards;
  out.length.data = in.batch.lengths;
  typename Team::template Local<GroupSums> local;
  for_each_member(team, local, in, places, [&](int64_t i, GroupSums& own) {
    own.n += 1;
    own.before_first = own.before_first > -i ? own.before_first : -i;
  });
  const auto first = team.template reduce<Max>(
      local, [](const GroupSums& own) { return Several<int64_t, 1>{own.before_first}; });
  if (first.each[0] == INT64_MIN) return out;  // none is there
  out.first = out.reward[-first.each[0]];
  for_each_member(team, local, in, places, [&](int64_t i, GroupSums& own) {
    own.deviation += out.deviation(i);
    if (!in.with_lengths) return;
    own.tokens += out.length[i];
    own.weighted += out.length[i] * out.deviation(i);
  });
  const auto sums = team.template reduce<Sum>(local, [](const GroupSums& own) {
    return Several<double, 4>{own.n, own.deviation, own.tokens, own.weighted};
  });
  out.size = static_cast<int64_t>(sums.each[0]);
  out.mean = sums.each[1] / sums.each[0];
  const double tokens = sums.each[2];
  out.length_mean = tokens == 0 ? out.mean : sums.each[3] / tokens;
  for_each_member(team, local, in, places, [&](int64_t i, GroupSums& own) {
    const double gap = out.deviation(i) - out.mean;
    own.squares += gap * gap;
  });
  const double squares =
      team.template reduce<Sum>(
              local, [](const GroupSums& own) { return Several<double, 1>{own.squares}; })
          .each[0];
  if (out.size > 1) out.std = sqrt(squares / static_cast<double>(out.size - 1));
  return out;
}

TETHER_TEAM GroupPlaces places_of(const GroupBatch& batch, int64_t place) {
  const int64_t* ids = batch.group_ids;
  const int64_t begin = ids != nullptr ? 0 : place / batch.group_size * batch.group_size;
  const int64_t end = ids != nullptr ? batch.count : begin + batch.group_size;
  return {begin, end, ids, ids != nullptr ? ids[place] : 0};
}

// The largest deviation of the others than the answer at `place`; NaN where one of the group is.
template <class Team>
TETHER_TEAM double best_of_others(const Team& team, const GroupParameters& in,
                                  const PlacedGroup& group, int64_t place) {
  if (group.size < 2) return group.deviation(place);
  struct Best {
    double deviation = -DBL_MAX;
  };
  typename Team::template Local<Best> local;
  for_each_member(team, local, in, places_of(in.batch, place), [&](int64_t i, Best& own) {
    if (i != place) own.deviation = Max::of(own.deviation, group.deviation(i));
  });
  const auto best = team.template reduce<Max>(
      local, [](const Best& own) { return Several<double, 1>{own.deviation}; });
  return best.each[0] + 0 * group.mean;
}

template <class Rule>
inline constexpr bool kReadsBatch = requires(const Rule& rule) { rule.reads_batch(); };
template <class Rule>
inline constexpr bool kReadsBest = requires(const Rule& rule) { rule.reads_best(); };

template <class Team>
TETHER_TEAM double std_of_batch(const Team& team, const GroupParameters& in) {
  return group_of(team, in, {0, in.batch.count, nullptr, 0}).std;
}

// To in.batch.batch_std, before group_program.
template <class Team>
TETHER_TEAM void batch_std_program(const Team& team, const GroupParameters& in) {
  const double std = std_of_batch(team, in);
  typename Team::template Local<NoState> local;
  team.each(local, [&](int thread, NoState&) {
    if (thread == 0) *in.batch.batch_std = std;
  });
}

template <class Rule, class Team>
TETHER_TEAM void group_program(const Team& team, const Rule& rule, const GroupParameters& in,
                               int64_t place) {
  PlacedGroup group = group_of(team, in, places_of(in.batch, place));
  if constexpr (kReadsBatch<Rule>) {
    const double* known = in.batch.batch_std;
    if (rule.reads_batch()) group.batch_std = known != nullptr ? *known : std_of_batch(team, in);
  }
  if constexpr (kReadsBest<Rule>) {
    if (rule.reads_best()) group.rival = best_of_others(team, in, group, place);
  }
  typename Team::template Local<NoState> local;
  team.each(local, [&](int thread, NoState&) {
    if (thread != 0) return;
    in.advantages[place] = in.is_there(place) ? static_cast<float>(rule(group, place)) : 0;
  });
}

}  // namespace tether::cuda
