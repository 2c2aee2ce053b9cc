#include "estimators/advantage/group.h"

#include <algorithm>
#include <vector>

#include "estimators/advantage/groups.h"

namespace tether {
namespace {

template <class T>
void run(const T* rewards, GroupArrays batch, const GroupAdvantage& options, T* advantages) {
  const auto size = static_cast<size_t>(std::max<int64_t>(batch.count, 0));
  const std::vector<double> in(rewards, rewards + size);
  std::vector<double> out(size);
  batch.rewards = in.data();
  advantages_of_groups("group_advantage", batch, options, out.data());
  std::transform(out.begin(), out.end(), advantages, [](double each) { return T(each); });
}

}  // namespace

template <class T>
void group_advantage(const T* rewards, int64_t count, int64_t group_size,
                     const GroupAdvantage& options, T* advantages) {
  run(rewards, {.group_size = group_size, .count = count}, options, advantages);
}

template <class T>
void group_advantage(const T* rewards, const int64_t* group_ids, int64_t count,
                     const GroupAdvantage& options, T* advantages) {
  run(rewards, {.group_ids = group_ids, .count = count}, options, advantages);
}

template void group_advantage(const float*, int64_t, int64_t, const GroupAdvantage&, float*);
template void group_advantage(const double*, int64_t, int64_t, const GroupAdvantage&, double*);
template void group_advantage(const float*, const int64_t*, int64_t, const GroupAdvantage&, float*);
template void group_advantage(const double*, const int64_t*, int64_t, const GroupAdvantage&,
                              double*);

}  // namespace tether
