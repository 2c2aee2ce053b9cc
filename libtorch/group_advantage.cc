#include "libtorch/group_advantage.h"

#include <ATen/ops/empty_like.h>

#include "libtorch/arrays.h"

namespace tether {
namespace {

// By ids, or of `group_size` where there are none.
at::Tensor advantages_of(const at::Tensor& rewards, const at::Tensor& group_ids, int64_t group_size,
                         const GroupAdvantage& options) {
  const auto function = "group_advantage";
  return detail::with_public_errors([&] {
    const auto batch = detail::on_host(detail::checked(
        function, GroupInputs<at::Tensor>{.rewards = rewards, .group_ids = group_ids}));
    const auto type = detail::result_type(rewards);
    const at::Tensor in = batch.rewards.to(type).contiguous();
    const at::Tensor out = at::empty_like(in);
    const auto run = [&]<class T>(T) {
      const T* values = in.const_data_ptr<T>();
      if (batch.group_ids.defined()) {
        const at::Tensor ids = batch.group_ids.to(at::kLong).contiguous();
        group_advantage(values, ids.const_data_ptr<int64_t>(), in.size(0), options,
                        out.data_ptr<T>());
      } else {
        group_advantage(values, in.size(0), group_size, options, out.data_ptr<T>());
      }
    };
    type == at::kDouble ? run(double{}) : run(float{});
    return out.to(rewards.options());
  });
}

}  // namespace

at::Tensor group_advantage(const at::Tensor& rewards, int64_t group_size,
                           const GroupAdvantage& options) {
  return advantages_of(rewards, {}, group_size, options);
}

at::Tensor group_advantage(const at::Tensor& rewards, const at::Tensor& group_ids,
                           const GroupAdvantage& options) {
  detail::check_value(group_ids.defined(), "group_advantage: group_ids must be given, got none");
  return advantages_of(rewards, group_ids, 0, options);
}

}  // namespace tether
