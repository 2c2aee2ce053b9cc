// The operators of python/tether/estimators.py and value.py (see ops.cc about the ABI). Python has
// checked shapes and dtypes; offsets are contiguous.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstring>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "estimators/advantage.h"
#include "estimators/kl_estimate.h"
#include "estimators/whitening.h"
#include "python/stable.h"
#include "rl/kernels/value_loss.h"
#include "rl/options.h"

namespace tether {
namespace {

using python::Name;
using python::torch_executor;
using python::with_public_errors;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

// The choice called `name`; an unknown one lists the known ones.
template <class Enum, size_t kCount>
Enum choice(std::string_view function, std::string_view what, const Name& name,
            const std::array<std::string_view, kCount>& names) {
  std::string known;
  for (size_t i = 0; i < kCount; ++i) {
    if (names[i] == name.text) return static_cast<Enum>(i);
    detail::append(known, names[i]);
  }
  detail::throw_unknown(function, what, known, name.text);
}

RowLayout layout_of(std::string_view function, const Tensor& tokens, const Maybe& offsets) {
  if (!offsets) return {.rows = tokens.size(0), .columns = tokens.size(1)};
  RowLayout layout{.rows = offsets->size(0) - 1};
  if (offsets->scalar_type() == ScalarType::Int) {
    layout.offsets32 = static_cast<const int32_t*>(offsets->const_data_ptr());
  } else {
    layout.offsets64 = static_cast<const int64_t*>(offsets->const_data_ptr());
  }
  const int64_t last = layout.rows >= 0 ? layout.offset(layout.rows) : 0;
  require(layout.offset(0) == 0 && last == tokens.size(0), [&] {
    return std::string(function) + ": offsets must run from 0 to " + text(tokens.size(0)) +
           ", got " + text(layout.offset(0)) + " to " + text(last);
  });
  return layout;
}

template <class Array, class Pointer>
Array view(const Tensor& tensor, Pointer* data) {
  const bool padded = tensor.dim() == 2;
  return {.data = data,
          .dtype = python::dtype_of("tether", "a tensor", tensor),
          .row_stride = padded ? tensor.stride(0) : 0,
          .column_stride = tensor.stride(padded ? 1 : 0)};
}
ConstArray tokens(const Tensor& tensor) {
  return view<ConstArray>(tensor, tensor.const_data_ptr());
}
ConstArray tokens(const Maybe& tensor) { return tensor ? tokens(*tensor) : ConstArray{}; }
MutableArray output(const Tensor& tensor) {
  return view<MutableArray>(tensor, tensor.mutable_data_ptr());
}
ConstArray per_row(const Maybe& tensor) {
  if (!tensor) return {};
  return {.data = tensor->const_data_ptr(),
          .dtype = python::dtype_of("tether", "a tensor", *tensor),
          .row_stride = tensor->stride(0),
          .column_stride = 0,
          .per_row = true};
}

const double* three_of(std::string_view function, std::string_view name, const Tensor& tensor) {
  require(
      tensor.scalar_type() == ScalarType::Double && tensor.numel() == 3 && tensor.is_contiguous(),
      [&] {
        return std::string(function) + ": " + std::string(name) +
               " must be 3 float64 numbers side by side";
      });
  return static_cast<const double*>(tensor.const_data_ptr());
}

Tensor doubles(const std::vector<double>& values) {
  const Tensor out =
      torch::stable::empty({static_cast<int64_t>(values.size())}, ScalarType::Double);
  std::memcpy(out.mutable_data_ptr(), values.data(), values.size() * sizeof(double));
  return out;
}

// Contiguous, like `tensor` in shape; in float32 if that is what waits for an upstream gradient.
Tensor new_like(const Tensor& tensor, bool stored = false) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < tensor.dim(); ++d) sizes.push_back(tensor.size(d));
  const bool half = tensor.scalar_type() == ScalarType::Half;
  return torch::stable::empty(sizes, stored && half ? ScalarType::Float : tensor.scalar_type());
}

// ---- value loss ---------------------------------------------------------------------------------

// normalizer: [policy, sequences, world_size], -inf: absent.
std::tuple<Tensor, Tensor, Tensor> value_loss_forward(const Tensor& values, const Tensor& returns,
                                                      const Tensor& response_mask,
                                                      const Maybe& old_values, const Maybe& offsets,
                                                      double clip_range, const Name& aggregation,
                                                      double constant, const Tensor& normalizer,
                                                      bool with_gradient) {
  return with_public_errors([&] {
    const auto function = "value_loss";
    const ValueArrays arrays{.layout = layout_of(function, values, offsets),
                             .values = tokens(values),
                             .returns = tokens(returns),
                             .response_mask = tokens(response_mask),
                             .old_values = tokens(old_values)};
    ValueObjective objective;
    objective.loss.clip_range = clip_range;
    objective.aggregation = {
        choice<Aggregation::Mode>(function, "aggregation", aggregation, kAggregationNames),
        constant};
    const double* given = three_of(function, "normalizer", normalizer);
    Normalizer step{.world_size = given[2]};
    if (given[0] != -infinity) step.policy = given[0];
    if (given[1] != -infinity) step.sequences = given[1];
    const Tensor dvalues =
        with_gradient ? new_like(values, true) : torch::stable::new_empty(values, {0});
    const ValueTotals totals =
        value_loss(arrays, objective, step, with_gradient ? output(dvalues) : MutableArray{},
                   torch_executor());
    const bool wide = values.scalar_type() == ScalarType::Double;
    const Tensor loss = torch::stable::empty({}, wide ? ScalarType::Double : ScalarType::Float);
    if (wide) {
      *static_cast<double*>(loss.mutable_data_ptr()) = totals.loss;
    } else {
      *static_cast<float*>(loss.mutable_data_ptr()) = static_cast<float>(totals.loss);
    }
    return std::tuple(loss, dvalues,
                      doubles({totals.metrics.sums.begin(), totals.metrics.sums.end()}));
  });
}

std::tuple<std::vector<std::string>, std::vector<double>> value_metrics(const Tensor& sums) {
  return with_public_errors([&] {
    ValueMetrics metrics;
    require(sums.scalar_type() == ScalarType::Double && sums.numel() == ValueMetrics::kSums,
            [] { return std::string("value_metrics: sums must be the float64 block of a loss"); });
    std::memcpy(metrics.sums.data(), torch::stable::contiguous(sums).const_data_ptr(),
                sizeof(metrics.sums));
    std::tuple<std::vector<std::string>, std::vector<double>> out;
    for (const auto& [name, value] : metrics.to_map()) {
      std::get<0>(out).push_back(name);
      std::get<1>(out).push_back(value);
    }
    return out;
  });
}

// ---- advantages ---------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> gae(const Tensor& rewards, const Tensor& values,
                               const Tensor& response_mask, const Maybe& bootstrap,
                               const Maybe& done, const Maybe& truncated,
                               const Maybe& truncation_values, const Maybe& lambdas,
                               const Maybe& offsets, double gamma, double lambda, const Name& gap) {
  return with_public_errors([&] {
    const auto function = "generalized_advantage_estimation";
    const bool shared =
        lambdas && (lambdas->dim() != rewards.dim() || lambdas->size(0) != rewards.size(0));
    const GaeArrays arrays{.layout = layout_of(function, rewards, offsets),
                           .rewards = tokens(rewards),
                           .values = tokens(values),
                           .response_mask = tokens(response_mask),
                           .bootstrap = per_row(bootstrap),
                           .done = tokens(done),
                           .truncated = tokens(truncated),
                           .truncation_values = tokens(truncation_values),
                           .lambdas = shared ? per_row(lambdas) : tokens(lambdas)};
    const Gae options{gamma, lambda, choice<MaskGap>(function, "gap", gap, kMaskGapNames)};
    const Tensor advantages = new_like(rewards), returns = new_like(rewards);
    generalized_advantage_estimation(arrays, options, output(advantages), output(returns),
                                     torch_executor());
    return std::tuple(advantages, returns);
  });
}

Tensor returns_of(const Tensor& rewards, const Tensor& response_mask, const Maybe& bootstrap,
                  const Maybe& offsets, double gamma, const Name& gap) {
  return with_public_errors([&] {
    const auto function = "discounted_returns";
    const DiscountedReturns options{gamma, choice<MaskGap>(function, "gap", gap, kMaskGapNames)};
    const Tensor out = new_like(rewards);
    discounted_returns(layout_of(function, rewards, offsets), tokens(rewards),
                       tokens(response_mask), per_row(bootstrap), options, output(out));
    return out;
  });
}

// rewards: [B], contiguous, float32 or float64. group_ids: [B] int64, contiguous, or none.
Tensor group_advantages(const Tensor& rewards, const Maybe& group_ids, int64_t group_size,
                        const Name& baseline, const Name& scale, double epsilon,
                        const Name& nan_reward) {
  return with_public_errors([&] {
    const auto function = "group_advantage";
    const GroupAdvantage options{
        choice<AdvantageBaseline>(function, "baseline", baseline, kAdvantageBaselineNames),
        choice<AdvantageScale>(function, "scale", scale, kAdvantageScaleNames), epsilon,
        choice<NanReward>(function, "nan_reward", nan_reward, kNanRewardNames)};
    const Tensor out = new_like(rewards);
    const auto run = [&]<class T>(T) {
      const T* in = static_cast<const T*>(rewards.const_data_ptr());
      T* values = static_cast<T*>(out.mutable_data_ptr());
      if (group_ids) {
        const auto* ids = static_cast<const int64_t*>(group_ids->const_data_ptr());
        group_advantage(in, ids, rewards.numel(), options, values);
      } else {
        group_advantage(in, rewards.numel(), group_size, options, values);
      }
    };
    rewards.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
    return out;
  });
}

// ---- whitening and KL estimates -----------------------------------------------------------------

// [count, mean, squares]
Tensor moments_of(const Tensor& values, const Tensor& response_mask) {
  return with_public_errors([&] {
    const Moments out =
        moments(layout_of("moments", values, std::nullopt), tokens(values), tokens(response_mask));
    return doubles({out.count, out.mean, out.squares});
  });
}

Tensor whitened(const Tensor& values, const Tensor& response_mask, const Tensor& step,
                double epsilon, bool shift_mean) {
  return with_public_errors([&] {
    const double* sums = three_of("whiten", "moments", step);
    const Tensor out = new_like(values);
    whiten(layout_of("whiten", values, std::nullopt), tokens(values), tokens(response_mask),
           {sums[0], sums[1], sums[2]}, {epsilon, shift_mean}, output(out));
    return out;
  });
}

// The fields of KlReport, in their order.
Tensor kl_report(const Tensor& log_ratios, const Tensor& response_mask, const Maybe& offsets,
                 const Name& estimator, double lambda) {
  return with_public_errors([&] {
    const auto function = "estimate_kl";
    const KlEstimateOptions options{
        choice<KlEstimate>(function, "estimator", estimator, kKlEstimateNames), lambda};
    const KlReport out = estimate_kl(layout_of(function, log_ratios, offsets), tokens(log_ratios),
                                     tokens(response_mask), options);
    return doubles({out.mean, out.standard_error, out.lambda, out.ratio_excess, out.ess, out.tokens,
                    out.sequences});
  });
}

}  // namespace
}  // namespace tether

STABLE_TORCH_LIBRARY_FRAGMENT(tether, library) {
  library.def(
      "value_loss_forward(Tensor values, Tensor returns, Tensor response_mask, "
      "Tensor? old_values, Tensor? offsets, float clip_range, str aggregation, float constant, "
      "Tensor normalizer, bool with_gradient) -> (Tensor loss, Tensor dvalues, Tensor sums)");
  library.def("value_metrics(Tensor sums) -> (str[] names, float[] values)");
  library.def(
      "gae(Tensor rewards, Tensor values, Tensor response_mask, Tensor? bootstrap, Tensor? done, "
      "Tensor? truncated, Tensor? truncation_values, Tensor? lambdas, Tensor? offsets, "
      "float gamma, float lambda_, str gap) -> (Tensor advantages, Tensor returns)");
  library.def(
      "discounted_returns(Tensor rewards, Tensor response_mask, Tensor? bootstrap, "
      "Tensor? offsets, float gamma, str gap) -> Tensor");
  library.def(
      "group_advantage(Tensor rewards, Tensor? group_ids, int group_size, str baseline, "
      "str scale, float epsilon, str nan_reward) -> Tensor");
  library.def("moments(Tensor values, Tensor response_mask) -> Tensor");
  library.def(
      "whiten(Tensor values, Tensor response_mask, Tensor moments, float epsilon, "
      "bool shift_mean) -> Tensor");
  library.def(
      "estimate_kl(Tensor log_ratios, Tensor response_mask, Tensor? offsets, str estimator, "
      "float lambda_) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tether, CPU, library) {
  library.impl("value_loss_forward", TORCH_BOX(&tether::value_loss_forward));
  library.impl("value_metrics", TORCH_BOX(&tether::value_metrics));
  library.impl("gae", TORCH_BOX(&tether::gae));
  library.impl("discounted_returns", TORCH_BOX(&tether::returns_of));
  library.impl("group_advantage", TORCH_BOX(&tether::group_advantages));
  library.impl("moments", TORCH_BOX(&tether::moments_of));
  library.impl("whiten", TORCH_BOX(&tether::whitened));
  library.impl("estimate_kl", TORCH_BOX(&tether::kl_report));
}
