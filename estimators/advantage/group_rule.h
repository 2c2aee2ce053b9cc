#pragma once

#include <array>
#include <concepts>
#include <cstdint>
#include <string_view>

#include "../../core/arguments.h"
#include "../../core/formula.h"
#include "../../core/macros.h"
#include "../../core/options.h"

namespace tether {

// Advantages relative to a group: the answers to one prompt. A rule is a formula of the group and
// one of its members (catalogue.h).

// Of a reward that is NaN: an error, or missing: its advantage is 0, and the group is as if it were
// absent.
enum class NanReward { error, missing };
inline constexpr std::array<std::string_view, 2> kNanRewardNames{"error", "missing"};

// One reward per sequence, its tokens share the advantage. Groups are of `group_size` consecutive
// rewards, or by id: any ids, in any order, groups of any size. A rule looks at what it reads.
template <class Array>
struct GroupInputs {
  LayoutOf<Array> layout = {};
  Array rewards = {};    // [B]
  Array group_ids = {};  // like rewards
  Array lengths = {};    // like rewards: tokens of the answer
  int64_t group_size = 0;

  static constexpr auto arguments() {
    using In = GroupInputs;
    using A = Argument<In, Array>;
    return std::array{A{"rewards", &In::rewards, Shape::answers},
                      A{"group_ids", &In::group_ids, Shape::tokens, Kind::ids, Use::optional},
                      A{"lengths", &In::lengths, Shape::tokens, Kind::counts, Use::optional}};
  }
};

// What rules read of a group: the rewards that are there, in the order of the batch. Sums are of
// deviations from the first reward, in long double: equal rewards have deviations and a mean of
// exactly 0, and where it is wider than double neither the difference nor the square of two doubles
// overflows or vanishes.
struct Group {
  using Number = long double;

  int64_t size = 0;
  const double* reward = nullptr;
  const double* length = nullptr;  // null for rules that do not need lengths
  Number first = 0;
  Number mean = 0;         // of the deviations
  Number length_mean = 0;  // of the deviations, each counted by its length; without tokens: mean
  Number std = 0;          // with size - 1; 0 for a group of one
  Number batch_std = 0;    // of all rewards of the batch, for rules that say that they read it
  Number best = 0, second = 0;  // the two largest deviations; of a group of one the same

  TETHER_INLINE Number deviation(int64_t i) const { return reward[i] - first; }
  TETHER_INLINE Number best_of_others(int64_t i) const {
    return deviation(i) > second ? second : best;
  }
};

template <class Formula>
concept GroupFormula = SmallFormula<Formula> && requires(const Formula formula, const Group group) {
  { formula.nan_reward } -> std::convertible_to<NanReward>;
  { formula(group, int64_t{0}) } -> std::same_as<Group::Number>;
};

namespace detail {

struct GroupCalls {
  NanReward (*nan_reward)(const void*);
  bool (*reads_batch)(const void*);
  void (*advantages)(const void*, const Group&, double*);

  template <class Formula>
  static constexpr GroupCalls of() {
    return {&nan_reward_of<Formula>, &reads_batch_of<Formula>, &advantages_of<Formula>};
  }
  template <class Formula>
  static NanReward nan_reward_of(const void* formula) {
    return static_cast<const Formula*>(formula)->nan_reward;
  }
  template <class Formula>
  static bool reads_batch_of(const void* formula) {
    if constexpr (requires(const Formula rule) { rule.reads_batch(); }) {
      return static_cast<const Formula*>(formula)->reads_batch();
    } else {
      return false;
    }
  }
  template <class Formula>
  static void advantages_of(const void* formula, const Group& in_place, double* out) {
    const Formula rule = *static_cast<const Formula*>(formula);
    const Group group = in_place;  // `out` is none of it: what members share is computed once
    for (int64_t i = 0; i < group.size; ++i) out[i] = static_cast<double>(rule(group, i));
  }
};

}  // namespace detail

// Any rule, the library's own (catalogue.h) or a user's, as a value: an option struct with a member
// `nan_reward` and
//   Group::Number operator()(const Group& group, int64_t i) const     the advantage of member i
// (a template over the group where it runs on a device too)
// and, where it reads group.batch_std, `bool reads_batch() const`. Its traits say whether it needs
// lengths.
class GroupRule : public AnyFormula<detail::GroupCalls> {
 public:
  template <GroupFormula Formula>
  GroupRule(const Formula& rule) : AnyFormula(rule) {}

  NanReward nan_reward() const { return calls().nan_reward(formula()); }
  bool reads_batch() const { return calls().reads_batch(formula()); }
  void advantages(const Group& group, double* out) const {
    calls().advantages(formula(), group, out);
  }
};

}  // namespace tether
