// The estimators of CUDA tensors.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string_view>
#include <vector>

#include "core/cuda_numbers.h"
#include "estimators/advantage/groups_cuda.h"
#include "estimators/advantage/row_scan_cuda.h"
#include "estimators/advantage/whitening_cuda.h"
#include "python/cuda_functions.h"
#include "python/estimator_functions.h"

namespace tether::python {

static std::vector<Tensor> on_cuda(const Call<OnCuda<AdvantageFunction>>& call) {
  const Tensor& rewards = call.tensors.rewards;
  const Tensor advantages = new_like_on(rewards), returns = new_like_on(rewards);
  const OnDevice device(AdvantageFunction::kName, rewards);
  cuda::scan_rows(AdvantageFunction::kName, call.arrays, call.options.estimator,
                  face::mutable_token_array(advantages), face::mutable_token_array(returns),
                  device.stream);
  return {advantages, returns};
}

// Contiguous: rewards and lengths float32, group_ids int64.
static std::vector<Tensor> on_cuda(const Call<OnCuda<GroupFunction>>& call) {
  const auto function = GroupFunction::kName;
  const auto& in = call.tensors;
  const int64_t count = in.rewards.numel();
  const Tensor out = new_like_on(in.rewards), of_batch = new_doubles_on(in.rewards, 1);
  const auto floats = [&](std::string_view name, const Tensor& tensor) -> const float* {
    return tensor.defined() ? numbers_of<const float>(function, name, tensor, count) : nullptr;
  };
  const cuda::GroupBatch batch{
      .rewards = floats("rewards", in.rewards),
      .group_ids = in.group_ids.defined()
                       ? numbers_of<const int64_t>(function, "group_ids", in.group_ids, count)
                       : nullptr,
      .lengths = floats("lengths", in.lengths),
      .group_size = static_cast<int64_t>(call.options.group_size),
      .count = count,
      .batch_std = static_cast<double*>(of_batch.mutable_data_ptr())};
  const OnDevice device(function, in.rewards);
  cuda::advantages_of_groups(function, batch, call.options.estimator,
                             static_cast<float*>(out.mutable_data_ptr()), device.stream);
  return {out};
}

// ---- whitening ----------------------------------------------------------------------------------

namespace {

// [3] on the device: the moments of a batch.
Tensor moments_of(const Tensor& values, const WhiteningArrays& batch, cuda::Stream stream) {
  static_assert(sizeof(Moments) == 3 * sizeof(double));
  const int64_t parts = std::max<int64_t>(cuda::moments_workspace(batch.layout), 1);
  const Tensor memory = new_doubles_on(values, 3 * parts), out = new_doubles_on(values, 3);
  cuda::moments(batch, static_cast<Moments*>(memory.mutable_data_ptr()),
                static_cast<Moments*>(out.mutable_data_ptr()), stream);
  return out;
}

Tensor whitened(const Tensor& values, const WhiteningArrays& batch, const Tensor& step,
                const Whitening& rule, cuda::Stream stream) {
  const Tensor out = new_like_on(values);
  cuda::whiten(batch, static_cast<const Moments*>(step.const_data_ptr()), rule,
               face::mutable_token_array(out), stream);
  return out;
}

}  // namespace

static std::vector<Tensor> on_cuda(const Call<OnCuda<MomentsFunction>>& call) {
  const OnDevice device(MomentsFunction::kName, call.tensors.values);
  return {moments_of(call.tensors.values, call.arrays, device.stream)};
}

static std::vector<Tensor> on_cuda(const Call<OnCuda<WhitenFunction>>& call) {
  const Tensor& values = call.tensors.values;
  const OnDevice device(WhitenFunction::kName, values);
  const Moments& known = call.options.step;
  const Tensor step = new_doubles_on(values, 3);
  cuda::set_numbers(WhitenFunction::kName, {known.count, known.mean, known.squares},
                    static_cast<double*>(step.mutable_data_ptr()), device.stream);
  return {whitened(values, call.arrays, step, call.options.rule, device.stream)};
}

// By moments that are on the device; without, those of the batch.
struct WhitenByMoments : OnCuda<WhitenFunction> {
  static constexpr std::string_view kMore = "step";

  static std::vector<Tensor> run(const Call<WhitenByMoments>& call) {
    const Tensor& values = call.tensors.values;
    const OnDevice device(kName, values);
    if (call.more) numbers_of<const double>(kName, kMore, *call.more, 3);
    const Tensor step = call.more ? *call.more : moments_of(values, call.arrays, device.stream);
    return {whitened(values, call.arrays, step, call.options.rule, device.stream)};
  }
};

}  // namespace tether::python

STABLE_TORCH_LIBRARY_FRAGMENT(tether, library) {
  tether::python::define<tether::python::WhitenByMoments>(library, "whiten_by_moments");
}

STABLE_TORCH_LIBRARY_IMPL(tether, CUDA, library) {
  using namespace tether::python;
  implement<AdvantageFunction, GroupFunction, MomentsFunction, WhitenFunction>(library);
  implement_as<WhitenByMoments>(library, "whiten_by_moments");
}
