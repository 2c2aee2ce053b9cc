// The operators of python/tether/estimators.py and value.py (see ops.cc about the ABI). Python has
// checked shapes and dtypes.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "core/options.h"
#include "estimators/advantage/gae.h"
#include "estimators/advantage/group.h"
#include "estimators/advantage/returns.h"
#include "estimators/advantage/whitening.h"
#include "estimators/kl/report.h"
#include "python/stable.h"
#include "rl/kernels/value_loss.h"

namespace tether {
namespace {

using python::contiguous;
using python::layout_of;
using python::Name;
using python::numbers_of;
using python::token_array;
using python::token_view;
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

// The arrays of one call. `like` is the tensor of tokens that the others are like.
struct Call {
  std::string_view function, like_name;
  const Tensor& like;

  RowLayout layout(const Maybe& offsets) const {
    return layout_of(function, like_name, like, offsets);
  }
  ConstArray tokens(std::string_view name, const Maybe& tensor) const {
    return tensor ? token_array(function, name, *tensor, like_name, like) : ConstArray{};
  }
  ConstArray per_row(std::string_view name, const Maybe& tensor, int64_t rows) const {
    if (!tensor) return {};
    require(tensor->dim() == 1 && tensor->size(0) == rows, [&] {
      return std::string(function) + ": " + std::string(name) + " must be [" + text(rows) + "]";
    });
    return {.data = tensor->const_data_ptr(),
            .dtype = python::dtype_of(function, name, *tensor),
            .row_stride = tensor->stride(0),
            .column_stride = 0,
            .per_row = true};
  }
  MutableArray output(const Tensor& tensor) const {
    return token_view<MutableArray>(function, like_name, tensor, tensor.mutable_data_ptr());
  }
};

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

ValueObjective value_objective(double clip_range, const Name& aggregation, double constant) {
  const auto mode =
      choice<Aggregation::Mode>("value_loss", "aggregation", aggregation, kAggregationNames);
  return {.loss = {.clip_range = clip_range}, .aggregation = {mode, constant}};
}

// Throws unless the options are legal: for devices without a kernel.
bool value_check(double clip_range, const Name& aggregation, double constant) {
  return with_public_errors([&] {
    check_objective("value_loss", value_objective(clip_range, aggregation, constant));
    return true;
  });
}

// normalizer: [policy, sequences, world_size, scale], -inf: absent.
std::tuple<Tensor, Tensor, Tensor> value_loss_forward(const Tensor& values, const Tensor& returns,
                                                      const Tensor& response_mask,
                                                      const Maybe& old_values, const Maybe& offsets,
                                                      double clip_range, const Name& aggregation,
                                                      double constant, const Tensor& normalizer,
                                                      bool with_gradient) {
  return with_public_errors([&] {
    const auto function = "value_loss";
    const Call call{function, "values", values};
    const Maybe ends = contiguous(offsets);
    const ValueArrays arrays{.layout = call.layout(ends),
                             .values = call.tokens("values", values),
                             .returns = call.tokens("returns", returns),
                             .response_mask = call.tokens("response_mask", response_mask),
                             .old_values = call.tokens("old_values", old_values)};
    const ValueObjective objective = value_objective(clip_range, aggregation, constant);
    const auto* given = numbers_of<const double>(function, "normalizer", normalizer, 4);
    Normalizer step{.world_size = given[2], .scale = given[3]};
    if (given[0] != -infinity) step.policy = given[0];
    if (given[1] != -infinity) step.sequences = given[1];
    const Tensor dvalues =
        with_gradient ? new_like(values, true) : torch::stable::new_empty(values, {0});
    const ValueTotals totals =
        value_loss(arrays, objective, step, with_gradient ? call.output(dvalues) : MutableArray{},
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

// ValueMetrics::to_map: the values, in the order of value_metric_names.
Tensor value_metrics(const Tensor& sums) {
  return with_public_errors([&] {
    ValueMetrics metrics;
    python::fill("value_metrics", "sums", sums, metrics.sums);
    return python::values_of(metrics.to_map());
  });
}

std::vector<std::string> value_metric_names() { return python::names_of(ValueMetrics{}.to_map()); }

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
    const Call call{function, "rewards", rewards};
    const Maybe ends = contiguous(offsets);
    const RowLayout layout = call.layout(ends);
    const GaeArrays arrays{.layout = layout,
                           .rewards = call.tokens("rewards", rewards),
                           .values = call.tokens("values", values),
                           .response_mask = call.tokens("response_mask", response_mask),
                           .bootstrap = call.per_row("bootstrap", bootstrap, layout.rows),
                           .done = call.tokens("done", done),
                           .truncated = call.tokens("truncated", truncated),
                           .truncation_values = call.tokens("truncation_values", truncation_values),
                           .lambdas = shared ? call.per_row("lambdas", lambdas, layout.rows)
                                             : call.tokens("lambdas", lambdas)};
    const Gae options{gamma, lambda, choice<MaskGap>(function, "gap", gap, kMaskGapNames)};
    const Tensor advantages = new_like(rewards), returns = new_like(rewards);
    generalized_advantage_estimation(arrays, options, call.output(advantages), call.output(returns),
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
    const Call call{function, "rewards", rewards};
    const Maybe ends = contiguous(offsets);
    const RowLayout layout = call.layout(ends);
    discounted_returns(
        layout, call.tokens("rewards", rewards), call.tokens("response_mask", response_mask),
        call.per_row("bootstrap", bootstrap, layout.rows), options, call.output(out));
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
    const bool wide = rewards.scalar_type() == ScalarType::Double;
    require((wide || rewards.scalar_type() == ScalarType::Float) && rewards.is_contiguous(), [&] {
      return std::string(function) + ": rewards must be contiguous float32 or float64";
    });
    const Tensor out = new_like(rewards);
    const auto run = [&]<class T>(T) {
      const T* in = static_cast<const T*>(rewards.const_data_ptr());
      T* values = static_cast<T*>(out.mutable_data_ptr());
      if (group_ids) {
        const auto* ids =
            numbers_of<const int64_t>(function, "groups", *group_ids, rewards.numel());
        group_advantage(in, ids, rewards.numel(), options, values);
      } else {
        group_advantage(in, rewards.numel(), group_size, options, values);
      }
    };
    wide ? run(double{}) : run(float{});
    return out;
  });
}

// ---- whitening and KL estimates -----------------------------------------------------------------

// [count, mean, squares]
Tensor moments_of(const Tensor& values, const Tensor& response_mask) {
  return with_public_errors([&] {
    const Call call{"moments", "values", values};
    const Moments out = moments(call.layout(std::nullopt), call.tokens("values", values),
                                call.tokens("response_mask", response_mask));
    return doubles({out.count, out.mean, out.squares});
  });
}

Tensor whitened(const Tensor& values, const Tensor& response_mask, const Tensor& step,
                double epsilon, bool shift_mean) {
  return with_public_errors([&] {
    const Call call{"whiten", "values", values};
    const auto* sums = numbers_of<const double>("whiten", "step", step, 3);
    const Tensor out = new_like(values);
    whiten(call.layout(std::nullopt), call.tokens("values", values),
           call.tokens("response_mask", response_mask), {sums[0], sums[1], sums[2]},
           {epsilon, shift_mean}, call.output(out));
    return out;
  });
}

// The fields of KlReport, in their order.
Tensor report_of(const Tensor& log_ratios, const Tensor& response_mask, const Maybe& offsets,
                 const Name& estimator, double lambda) {
  return with_public_errors([&] {
    const auto function = "kl_report";
    const KlReportOptions options{
        choice<KlEstimator>(function, "estimator", estimator, kKlEstimatorNames), lambda};
    const Call call{function, "log_ratios", log_ratios};
    const Maybe ends = contiguous(offsets);
    const KlReport out = kl_report(call.layout(ends), call.tokens("log_ratios", log_ratios),
                                   call.tokens("response_mask", response_mask), options);
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
  library.def("value_check(float clip_range, str aggregation, float constant) -> bool");
  library.def("value_metrics(Tensor sums) -> Tensor");
  library.def("value_metric_names() -> str[]");
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
      "kl_report(Tensor log_ratios, Tensor response_mask, Tensor? offsets, str estimator, "
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
  library.impl("kl_report", TORCH_BOX(&tether::report_of));
}

STABLE_TORCH_LIBRARY_IMPL(tether, CompositeExplicitAutograd, library) {
  library.impl("value_check", TORCH_BOX(&tether::value_check));
  library.impl("value_metric_names", TORCH_BOX(&tether::value_metric_names));
}
