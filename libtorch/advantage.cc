#include "libtorch/advantage.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "estimators/advantage/groups.h"
#include "estimators/advantage/row_scan.h"
#include "libtorch/arrays.h"
#include "libtorch/cuda/kernels.h"
#include "libtorch/executor.h"

namespace tether {
namespace {

AdvantagesAndReturns scanned(std::string_view function, const AdvantageBatch& given,
                             const Recursion& recursion) {
  return detail::with_public_errors([&] {
    if (const auto* kernels = detail::cuda_kernels(given.rewards)) {
      const AdvantageBatch batch = detail::checked(function, given, detail::Offsets::as_they_are);
      if (const auto found = kernels->advantage(function, batch, recursion)) return *found;
    }
    const AdvantageBatch batch = detail::on_host(detail::checked(function, given));
    const auto like = [&] {
      return at::empty(batch.rewards.sizes(), at::dtype(batch.rewards.scalar_type()));
    };
    const AdvantagesAndReturns out{like(), like()};
    scan_rows(function, face::arrays_of(function, batch), recursion,
              face::mutable_token_array(out.advantages), face::mutable_token_array(out.returns),
              torch_executor());
    const at::Device device = given.rewards.device();
    return AdvantagesAndReturns{out.advantages.to(device), out.returns.to(device)};
  });
}

at::Tensor grouped(std::string_view function, const GroupBatch& given, const GroupRule& rule) {
  return detail::with_public_errors([&] {
    const GroupBatch checked = detail::checked(function, given);
    if (const auto* kernels = detail::cuda_kernels(given.rewards)) {
      if (const auto found = kernels->group_advantage(function, checked, rule)) return *found;
    }
    const GroupBatch batch = detail::on_host(checked);
    const auto contiguous = [](const at::Tensor& tensor, at::ScalarType type) {
      return tensor.defined() ? tensor.to(type).contiguous() : tensor;
    };
    const at::Tensor rewards = contiguous(batch.rewards, at::kDouble);
    const at::Tensor ids = contiguous(batch.group_ids, at::kLong);
    const at::Tensor lengths = contiguous(batch.lengths, at::kDouble);
    const at::Tensor out = at::empty_like(rewards);
    advantages_of_groups(function,
                         {.rewards = rewards.const_data_ptr<double>(),
                          .group_ids = ids.defined() ? ids.const_data_ptr<int64_t>() : nullptr,
                          .lengths = lengths.defined() ? lengths.const_data_ptr<double>() : nullptr,
                          .group_size = batch.group_size,
                          .count = rewards.numel()},
                         rule, out.data_ptr<double>());
    return out.to(given.rewards.options());
  });
}

}  // namespace

AdvantagesAndReturns advantage(const AdvantageBatch& batch, const Recursion& recursion) {
  return scanned("advantage", batch, recursion);
}

at::Tensor advantage(const GroupBatch& batch, const GroupRule& rule) {
  return grouped("advantage", batch, rule);
}

AdvantagesAndReturns generalized_advantage_estimation(const GaeBatch& batch, const Gae& options) {
  return scanned("generalized_advantage_estimation", batch, options);
}

at::Tensor discounted_returns(const ReturnsBatch& batch, const DiscountedReturns& options) {
  return scanned("discounted_returns",
                 {.rewards = batch.rewards,
                  .response_mask = batch.response_mask,
                  .bootstrap = batch.bootstrap,
                  .offsets = batch.offsets},
                 options)
      .returns;
}

at::Tensor group_advantage(const at::Tensor& rewards, int64_t group_size,
                           const GroupAdvantage& options) {
  return grouped("group_advantage", {.rewards = rewards, .group_size = group_size}, options);
}

at::Tensor group_advantage(const at::Tensor& rewards, const at::Tensor& group_ids,
                           const GroupAdvantage& options) {
  detail::check_value(group_ids.defined(), "group_advantage: group_ids must be given, got none");
  return grouped("group_advantage", {.rewards = rewards, .group_ids = group_ids}, options);
}

}  // namespace tether
