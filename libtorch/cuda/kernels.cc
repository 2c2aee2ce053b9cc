#include "libtorch/cuda/kernels.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

#include "core/cuda_doors.h"
#include "estimators/advantage/groups_cuda.h"
#include "estimators/advantage/row_scan_cuda.h"
#include "estimators/advantage/whitening_cuda.h"
#include "face/device_arrays.h"
#include "face/loss_on_device.h"
#include "libtorch/arrays.h"
#include "libtorch/cuda/on_device.h"
#include "libtorch/logits_rows.h"
#include "libtorch/stored_gradient.h"
#include "logits/pair_kl_cuda.h"
#include "logits/rows_cuda.h"
#include "logits/support_cuda.h"
#include "rl/kernels/logits_policy_loss_cuda.h"

namespace tether::detail {
namespace {

at::Tensor doubles_beside(const at::Tensor& tensor, int64_t count) {
  return at::empty({count}, at::dtype(at::kDouble).device(tensor.device()));
}

float* memory_of(const at::Tensor& numbers) {
  return numbers.defined() ? numbers.data_ptr<float>() : nullptr;
}

// ---- losses -------------------------------------------------------------------------------------

// The float64 numbers that a loss of `input` leaves, the loss first.
template <class Objective>
at::Tensor totals_of(const face::LossOnDevice<Objective>& loss, const at::Tensor& input,
                     const std::vector<MutableArray>& gradients) {
  const OnDevice device(face::LossKernels<Objective>::kFunction, input);
  const at::Tensor totals = doubles_beside(input, loss.kNumbers);
  const at::Tensor memory = doubles_beside(input, loss.memory());
  loss.run(nullptr, gradients, totals.data_ptr<double>(), memory.data_ptr<double>(), device.stream);
  return totals;
}

at::Tensor loss_in(const at::Tensor& totals) { return totals.select(0, 0).to(at::kFloat); }

std::optional<ComputedLoss> policy_loss_on_cuda(const PolicyBatch& batch,
                                                const PolicyObjective& objective,
                                                const Normalizer& normalizer,
                                                WantedGradients wanted) {
  const PolicyArrays arrays = face::device_arrays(batch);
  using Kernels = face::LossKernels<PolicyObjective>;
  if (!Kernels::has(arrays, objective, normalizer)) return std::nullopt;
  const face::LossOnDevice loss(arrays, objective, normalizer);
  ComputedLoss out;
  std::vector<MutableArray> gradients(2);
  out.dlogps = gradient_memory(wanted.logps, batch.logps, gradients[0]);
  out.dentropies = gradient_memory(wanted.entropies, batch.entropies, gradients[1]);
  const at::Tensor totals = totals_of(loss, batch.logps, gradients);
  constexpr int64_t kSums = 2 * PolicyMetrics::kSums;
  out.loss = loss_in(totals);
  out.metrics.sums = totals.narrow(0, 1, kSums).view({PolicyMetrics::kSums, 2});
  out.metrics.maxima = totals.narrow(0, 1 + kSums, PolicyMetrics::kMaxima);
  return out;
}

template <class Batch, class Objective, class Denominators>
bool has_loss(const Batch& batch, const Objective& objective, const Denominators& normalizer) {
  return face::LossKernels<Objective>::has(face::device_arrays(batch), objective, normalizer);
}

void policy_gradient_of_logits_on_cuda(const PolicyBatch& batch, const PolicyObjective& objective,
                                       const Normalizer& normalizer, const LogitsOfTokens& chunk) {
  constexpr const char* kFunction = "linear_policy_loss";
  PolicyArrays arrays = face::device_arrays(batch);
  arrays.logps = arrays.entropies = {};
  const OnDevice device(kFunction, chunk.logits);
  const std::vector<double> step = face::LossKernels<PolicyObjective>::step(objective, normalizer);
  const auto stated = static_cast<int64_t>(step.size());
  const int64_t bytes = cuda::policy_workspace_bytes(arrays, objective);
  const at::Tensor memory = doubles_beside(chunk.logits, stated + (bytes + 7) / 8);
  auto* const numbers = memory.data_ptr<double>();
  if (stated > 0) cuda::set_numbers(kFunction, step, numbers, device.stream);
  cuda::policy_loss_of_logits(
      rows_of(chunk.logits), chunk.targets.const_data_ptr<int64_t>() + chunk.first, chunk.row,
      arrays, objective, stated > 0 ? numbers : nullptr, normalizer.factor(),
      {memory_of(chunk.logps), memory_of(chunk.entropies), chunk.first}, writable(chunk.logits),
      /*totals=*/nullptr, numbers + stated, device.stream);
}

// Of a loss with one gradient, in a block of metrics.
template <class Arrays, class Objective, class Denominators>
std::optional<FusedResult> fused_on_cuda(const at::Tensor& input, const Arrays& arrays,
                                         const Objective& objective, const Denominators& normalizer,
                                         bool with_gradient) {
  if (!face::LossKernels<Objective>::has(arrays, objective, normalizer)) return std::nullopt;
  const face::LossOnDevice loss(arrays, objective, normalizer);
  FusedResult out;
  std::vector<MutableArray> gradients(1);
  out.gradient = gradient_memory(with_gradient, input, gradients[0]);
  const at::Tensor totals = totals_of(loss, input, gradients);
  out.loss = loss_in(totals);
  out.sums = totals.narrow(0, 1, loss.kNumbers - 1);
  return out;
}

std::optional<FusedResult> preference_loss_on_cuda(const PreferenceBatch& batch,
                                                   const PreferenceObjective& objective,
                                                   const PairNormalizer& normalizer,
                                                   bool with_gradient) {
  auto out =
      fused_on_cuda(batch.logps, face::device_arrays(batch), objective, normalizer, with_gradient);
  if (out) out->sums = out->sums.view({PreferenceMetrics::kSums, 2});
  return out;
}

std::optional<FusedResult> value_loss_on_cuda(const ValueBatch& batch,
                                              const ValueObjective& objective,
                                              const Normalizer& normalizer, bool with_gradient) {
  return fused_on_cuda(batch.values, face::device_arrays(batch), objective, normalizer,
                       with_gradient);
}

std::optional<at::Tensor> local_counts_on_cuda(const PolicyBatch& batch,
                                               const PolicyObjective& objective) {
  const PolicyArrays arrays = face::device_arrays(batch);
  if (!cuda::is_supported(arrays, objective)) return std::nullopt;
  const OnDevice device("local_counts", batch.logps);
  const at::Tensor counts = doubles_beside(batch.logps, 3);
  const int64_t bytes = cuda::policy_workspace_bytes(arrays, objective);
  const at::Tensor memory = doubles_beside(batch.logps, (bytes + 7) / 8);
  cuda::local_counts(arrays, objective, counts.data_ptr<double>(), memory.data_ptr(),
                     device.stream);
  return counts;
}

std::optional<at::Tensor> pair_counts_on_cuda(const PreferenceBatch& batch) {
  const PreferenceArrays arrays = face::device_arrays(batch);
  if (cuda::lacks_types(arrays, cuda::Numbers::narrow)) return std::nullopt;
  const OnDevice device("local_counts", batch.logps);
  const at::Tensor counts = doubles_beside(batch.logps, 2);
  const int64_t bytes = cuda::preference_workspace_bytes(arrays);
  const at::Tensor memory = doubles_beside(batch.logps, (bytes + 7) / 8);
  cuda::preference_counts(arrays, counts.data_ptr<double>(), memory.data_ptr(), device.stream);
  return counts;
}

// ---- rows of logits -----------------------------------------------------------------------------

constexpr const char* kRows = "token_logps";

at::Tensor floats_beside(const at::Tensor& tensor, at::IntArrayRef sizes) {
  return at::empty(sizes, at::dtype(at::kFloat).device(tensor.device()));
}

// [N] float32 side by side; undefined if it was not used.
at::Tensor floats(const Upstream& upstream) {
  return upstream ? upstream->reshape({-1}).to(at::kFloat).contiguous() : at::Tensor();
}
const float* data_of(const at::Tensor& numbers) {
  return numbers.defined() ? numbers.const_data_ptr<float>() : nullptr;
}

cuda::RowState* states_in(const at::Tensor& states) {
  static_assert(sizeof(cuda::RowState) == kRowState * sizeof(float));
  return reinterpret_cast<cuda::RowState*>(states.data_ptr<float>());
}

// So many floats for each kept id, where there are any.
at::Tensor memory_of_kept(const at::Tensor& support, int64_t each) {
  return support.defined() ? floats_beside(support, {each * support.numel()}) : at::Tensor();
}

void row_statistics_on_cuda(const at::Tensor& logits, const at::Tensor& targets,
                            const at::Tensor& support, const RowOptions& options,
                            const RowsOnDevice& out) {
  const OnDevice device(kRows, logits);
  const int64_t* ids = targets.const_data_ptr<int64_t>();
  const cuda::RowResults results{.states = states_in(out.states),
                                 .logps = memory_of(out.logps),
                                 .entropies = memory_of(out.entropies)};
  if (support.defined()) {
    cuda::support_statistics(rows_of(logits), ids, kept_ids(support), options, results,
                             device.stream);
  } else {
    cuda::row_statistics(rows_of(logits), ids, options, results, device.stream);
  }
}

void row_gradients_on_cuda(const at::Tensor& logits, const at::Tensor& targets,
                           const at::Tensor& support, const RowOptions& options,
                           const at::Tensor& states, const RowUpstreams& upstreams,
                           const at::Tensor& dlogits) {
  const OnDevice device(kRows, logits);
  const int64_t* ids = targets.const_data_ptr<int64_t>();
  const float *dlogps = data_of(upstreams.dlogps), *dentropies = data_of(upstreams.dentropies);
  const at::Tensor kept = memory_of_kept(support, 1);
  if (support.defined()) {
    cuda::support_gradients(rows_of(logits), ids, kept_ids(support), options, states_in(states),
                            dlogps, dentropies, memory_of(kept), writable(dlogits), device.stream);
  } else {
    cuda::row_gradients(rows_of(logits), ids, options, states_in(states), dlogps, dentropies,
                        writable(dlogits), device.stream);
  }
}

// ---- the KL of two rows -------------------------------------------------------------------------

constexpr const char* kPairs = "categorical_kl";

std::vector<at::Tensor> categorical_kl_on_cuda(const at::Tensor& q, const at::Tensor& p,
                                               const at::Tensor& support, double temperature,
                                               const at::Tensor& mask) {
  const OnDevice device(kPairs, q);
  std::vector<at::Tensor> out(3);
  for (at::Tensor& each : out) each = floats_beside(q, positions_of(q));
  const auto* active =
      mask.defined() ? static_cast<const uint8_t*>(mask.const_data_ptr()) : nullptr;
  const cuda::PairKlArrays<float> values{memory_of(out[0]), memory_of(out[1]), memory_of(out[2])};
  if (support.defined()) {
    cuda::support_kl(rows_of(q), rows_of(p), kept_ids(support), temperature, active, {}, values,
                     nullptr, {}, {}, device.stream);
  } else {
    cuda::logits_kl(rows_of(q), rows_of(p), temperature, active, values, device.stream);
  }
  return out;
}

void categorical_kl_gradients_on_cuda(const at::Tensor& q, const at::Tensor& p,
                                      const at::Tensor& support, double temperature,
                                      const std::vector<Upstream>& upstreams, const at::Tensor& dq,
                                      const at::Tensor& dp) {
  const OnDevice device(kPairs, q);
  const at::Tensor kl = floats(upstreams[0]), reverse_kl = floats(upstreams[1]),
                   entropies = floats(upstreams[2]);
  const auto rows_in = [](const at::Tensor& wanted) {
    return wanted.defined() ? writable(wanted) : MutableLogits{};
  };
  const cuda::PairKlArrays<const float> arriving{data_of(kl), data_of(reverse_kl),
                                                 data_of(entropies)};
  const at::Tensor kept = memory_of_kept(support, 2);
  if (support.defined()) {
    cuda::support_kl(rows_of(q), rows_of(p), kept_ids(support), temperature, /*active=*/nullptr,
                     arriving, {}, memory_of(kept), rows_in(dq), rows_in(dp), device.stream);
  } else {
    cuda::logits_kl_gradients(rows_of(q), rows_of(p), temperature, /*active=*/nullptr, arriving, {},
                              rows_in(dq), rows_in(dp), device.stream);
  }
}

// ---- advantages ---------------------------------------------------------------------------------

at::Tensor like(const at::Tensor& tensor) {
  return at::empty(tensor.sizes(), at::dtype(tensor.scalar_type()).device(tensor.device()));
}

std::optional<AdvantagesAndReturns> advantage_on_cuda(std::string_view function,
                                                      const AdvantageBatch& batch,
                                                      const Recursion& recursion) {
  if (chosen(recursion) == kRecursionNames.size()) return std::nullopt;
  const OnDevice device(function, batch.rewards);
  const AdvantagesAndReturns out{like(batch.rewards), like(batch.rewards)};
  cuda::scan_rows(function, face::device_arrays(batch), recursion,
                  face::mutable_token_array(out.advantages), face::mutable_token_array(out.returns),
                  device.stream);
  return out;
}

std::optional<at::Tensor> group_advantage_on_cuda(std::string_view function,
                                                  const GroupBatch& batch, const GroupRule& rule) {
  const at::ScalarType dtype = batch.rewards.scalar_type();
  if (chosen(rule) == kGroupRuleNames.size() || dtype == at::kDouble) return std::nullopt;
  const OnDevice device(function, batch.rewards);
  const auto contiguous = [](const at::Tensor& tensor, at::ScalarType type) {
    return tensor.defined() ? tensor.detach().to(type).contiguous() : tensor;
  };
  const at::Tensor rewards = contiguous(batch.rewards, at::kFloat);
  const at::Tensor ids = contiguous(batch.group_ids, at::kLong);
  const at::Tensor lengths = contiguous(batch.lengths, at::kFloat);
  const at::Tensor out = like(rewards), of_batch = doubles_beside(rewards, 1);
  cuda::advantages_of_groups(function,
                             {.rewards = rewards.const_data_ptr<float>(),
                              .group_ids = ids.defined() ? ids.const_data_ptr<int64_t>() : nullptr,
                              .lengths = data_of(lengths),
                              .group_size = batch.group_size,
                              .count = rewards.numel(),
                              .batch_std = of_batch.data_ptr<double>()},
                             rule, out.data_ptr<float>(), device.stream);
  return out.to(dtype);
}

at::Tensor whiten_on_cuda(const WhiteningInputs<at::Tensor>& batch, const Whitening& options) {
  const OnDevice device("whiten", batch.values);
  const WhiteningArrays arrays = face::device_arrays(batch);
  static_assert(sizeof(Moments) == 3 * sizeof(double));
  const int64_t parts = std::max<int64_t>(cuda::moments_workspace(arrays.layout), 1);
  const at::Tensor memory = doubles_beside(batch.values, 3 * parts), out = like(batch.values);
  auto* const step = reinterpret_cast<Moments*>(memory.data_ptr<double>());
  cuda::moments(arrays, step, /*out=*/step, device.stream);
  cuda::whiten(arrays, step, options, face::mutable_token_array(out), device.stream);
  return out;
}

}  // namespace

const CudaKernels kCudaKernels{
    .policy_loss = policy_loss_on_cuda,
    .has_policy_loss = has_loss<PolicyBatch, PolicyObjective, Normalizer>,
    .policy_gradient_of_logits = policy_gradient_of_logits_on_cuda,
    .local_counts = local_counts_on_cuda,
    .pair_counts = pair_counts_on_cuda,
    .preference_loss = preference_loss_on_cuda,
    .has_preference_loss = has_loss<PreferenceBatch, PreferenceObjective, PairNormalizer>,
    .value_loss = value_loss_on_cuda,
    .row_statistics = row_statistics_on_cuda,
    .row_gradients = row_gradients_on_cuda,
    .categorical_kl = categorical_kl_on_cuda,
    .categorical_kl_gradients = categorical_kl_gradients_on_cuda,
    .advantage = advantage_on_cuda,
    .group_advantage = group_advantage_on_cuda,
    .whiten = whiten_on_cuda,
};

}  // namespace tether::detail
