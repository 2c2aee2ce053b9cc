#include "libtorch/group_advantage.h"

#include <ATen/ops/empty_like.h>

#include "libtorch/arrays.h"

namespace tether {
namespace {

// body(rewards, advantages) on contiguous rewards of float or double.
template <class Body>
at::Tensor on_rewards(const at::Tensor& rewards, Body body) {
  if (!rewards.defined()) {
    detail::check_value(false, "group_advantage: rewards must be given, got none");
  }
  detail::check_floating("group_advantage", "rewards", rewards);
  detail::check_constant("group_advantage", "rewards", rewards);
  if (rewards.dim() != 1) {
    detail::check_value(
        false, "group_advantage: rewards must be [B], got " + detail::shape_text(rewards.sizes()));
  }
  const bool wide = rewards.scalar_type() == at::kDouble;
  const at::Tensor in = rewards.cpu().to(wide ? at::kDouble : at::kFloat).contiguous();
  const at::Tensor out = at::empty_like(in);
  detail::with_value_errors([&] {
    if (wide) {
      body(in.const_data_ptr<double>(), out.data_ptr<double>());
    } else {
      body(in.const_data_ptr<float>(), out.data_ptr<float>());
    }
  });
  return out.to(rewards.options());
}

}  // namespace

at::Tensor group_advantage(const at::Tensor& rewards, int64_t group_size,
                           const GroupAdvantage& options) {
  return on_rewards(rewards, [&](const auto* in, auto* out) {
    group_advantage(in, rewards.size(0), group_size, options, out);
  });
}

at::Tensor group_advantage(const at::Tensor& rewards, const at::Tensor& group_ids,
                           const GroupAdvantage& options) {
  return on_rewards(rewards, [&](const auto* in, auto* out) {
    const at::ScalarType type = group_ids.scalar_type();
    if (type != at::kInt && type != at::kLong) {
      detail::check_type(false, "group_advantage: group_ids must be int32 or int64, got " +
                                    detail::dtype_text(type));
    }
    if (group_ids.sizes() != rewards.sizes()) {
      detail::check_value(false, "group_advantage: group_ids must be " +
                                     detail::shape_text(rewards.sizes()) + " like rewards, got " +
                                     detail::shape_text(group_ids.sizes()));
    }
    detail::check_device("group_advantage", "group_ids", group_ids, "rewards", rewards);
    const at::Tensor ids = group_ids.cpu().to(at::kLong).contiguous();
    group_advantage(in, ids.const_data_ptr<int64_t>(), rewards.size(0), options, out);
  });
}

}  // namespace tether
