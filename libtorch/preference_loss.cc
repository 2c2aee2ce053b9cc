#include "libtorch/preference_loss.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/repeat_interleave.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cmath>
#include <cstring>

#include "libtorch/arrays.h"
#include "libtorch/executor.h"
#include "libtorch/stored_gradient.h"
#include "rl/kernels/preference_loss.h"

namespace tether {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Computed {
  at::Tensor loss, dlogps, sums;
};

// Of answers [2 B] every one counts where there is no mask.
PreferenceBatch as_rows(const PreferenceBatch& batch) {
  PreferenceBatch out = detail::answers_as_rows(batch);
  const bool answers = batch.logps.defined() && batch.logps.dim() == 1 && !batch.offsets.defined();
  if (answers && !out.response_mask.defined()) {
    out.response_mask =
        at::ones(out.logps.sizes(), at::dtype(at::kBool).device(out.logps.device()));
  }
  return out;
}

Computed compute_on_cpu(const PreferenceBatch& batch, const PreferenceObjective& objective,
                        const PairNormalizer& normalizer, bool with_gradient) {
  Computed out;
  MutableArray dlogps;
  if (with_gradient) {
    out.dlogps = at::empty(batch.logps.sizes(), at::dtype(detail::stored_type(batch.logps)));
    dlogps = face::mutable_token_array(out.dlogps);
  }
  const PreferenceTotals totals = preference_loss(face::arrays_of("preference_loss", batch),
                                                  objective, normalizer, dlogps, torch_executor());
  out.loss = detail::result_scalar(totals.loss, batch.logps);
  out.sums = at::empty({PreferenceMetrics::kSums, 2}, at::dtype(at::kDouble));
  std::memcpy(out.sums.data_ptr(), totals.metrics.sums.data(), sizeof(totals.metrics.sums));
  return out;
}

// ---- any device ---------------------------------------------------------------------------------

// Sums over the tokens of each row, [rows].
class RowSums {
 public:
  explicit RowSums(const PreferenceBatch& batch)
      : padded_(!batch.offsets.defined()), rows_(face::count_rows(batch)) {
    if (padded_) return;
    const auto options = at::dtype(at::kLong).device(batch.logps.device());
    row_ = at::repeat_interleave(at::arange(rows_, options),
                                 batch.offsets.diff().to(at::kLong).to(batch.logps.device()));
  }
  at::Tensor operator()(const at::Tensor& tokens) const {
    if (padded_) return tokens.sum(1);
    return at::zeros({rows_}, tokens.options()).index_add(0, row_, tokens);
  }
  int64_t rows() const { return rows_; }

 private:
  bool padded_;
  int64_t rows_ = 0;
  at::Tensor row_;
};

// A column of the batch in the type of the arithmetic, with 0 in masked slots; a constant.
at::Tensor selected(const PreferenceBatch& batch, const at::Tensor& tensor) {
  const at::Tensor values = tensor.detach().to(detail::result_type(batch.logps));
  return at::where(batch.response_mask != 0, values, at::zeros_like(values));
}

// What every pair has, side by side [pairs].
struct PairTerms {
  at::Tensor chosen, rejected;  // scores
  at::Tensor logps;             // of the answers, the chosen ones first
  at::Tensor loss;
  at::Tensor present;  // not padding
  at::Tensor finite;
};

PairTerms terms_of(const PreferenceBatch& batch, const PreferenceObjective& objective,
                   const at::Tensor& logp) {
  const RowSums sum_rows(batch);
  const int64_t half = sum_rows.rows() / 2;
  const at::Tensor weight = batch.response_mask.to(logp.scalar_type());
  const at::Tensor n = sum_rows(weight).to(at::kDouble);
  const at::Tensor over =
      objective.score == PairScore::mean ? at::where(n > 0, n, at::ones_like(n)) : at::ones_like(n);
  const at::Tensor logps = sum_rows((weight * logp).to(at::kDouble));
  at::Tensor score = logps / over;
  if (objective.reference) {
    const at::Tensor gap = logp - selected(batch, batch.ref_logps);
    score = sum_rows((weight * gap).to(at::kDouble)) / over;
  }
  const at::Tensor chosen = score.narrow(0, 0, half), rejected = score.narrow(0, half, half);
  const auto linked = [&](const at::Tensor& each) {
    return TensorNumber{detail::on_tensors(objective.link, TensorNumber{each})};
  };
  const TensorPair pair{linked(chosen), linked(rejected), objective.beta};
  const at::Tensor loss = detail::on_tensors(objective.loss, pair);
  const auto finite = [](const at::Tensor& tensor) { return at::isfinite(tensor.detach()); };
  return {.chosen = chosen,
          .rejected = rejected,
          .logps = logps,
          .loss = loss,
          .present = (n.narrow(0, 0, half) > 0).logical_or(n.narrow(0, half, half) > 0),
          .finite = finite(chosen).logical_and(finite(rejected)).logical_and(finite(loss))};
}

// The blocks of PreferenceMetrics. loss: of each pair, 0 for padding.
at::Tensor sums_of(double beta, const PairTerms& pairs, const at::Tensor& loss,
                   const at::Tensor& count) {
  using M = PreferenceMetrics;
  std::vector<at::Tensor> sums(M::kSums);
  const auto sum = [&](const at::Tensor& values) {
    return at::where(pairs.present, values.to(at::kDouble), at::zeros({}, count.options())).sum();
  };
  const int64_t half = pairs.loss.size(0);
  const at::Tensor margin = beta * (pairs.chosen - pairs.rejected);
  sums[M::kLoss] = loss.sum();
  sums[M::kRewardChosen] = sum(beta * pairs.chosen);
  sums[M::kRewardRejected] = sum(beta * pairs.rejected);
  sums[M::kMargin] = sum(margin);
  sums[M::kAccuracy] = sum(margin > 0);
  sums[M::kLogpChosen] = sum(pairs.logps.narrow(0, 0, half));
  sums[M::kLogpRejected] = sum(pairs.logps.narrow(0, half, half));
  sums[M::kNonfinite] = sum(pairs.finite.logical_not());
  const at::Tensor values = at::stack(sums);
  return at::stack({values, count.expand_as(values)}, 1).detach();
}

Computed compute_on_tensors(const PreferenceBatch& batch, const PreferenceObjective& objective,
                            const PairNormalizer& normalizer, bool with_gradient) {
  const c10::InferenceMode normal(false);
  at::AutoGradMode enabled(true);
  const at::Tensor logp = selected(batch, batch.logps).requires_grad_(true);
  const PairTerms pairs = terms_of(batch, objective, logp);
  const at::Tensor spoil = at::where(pairs.finite, at::ones_like(pairs.loss.detach()), NAN);
  const at::Tensor count = pairs.present.sum().to(at::kDouble);
  const at::Tensor of_step =
      normalizer.pairs ? at::scalar_tensor(*normalizer.pairs, count.options()) : count;
  const at::Tensor share =
      at::where(of_step > 0, normalizer.factor() / of_step,
                at::where(count > 0, at::full_like(of_step, NAN), at::zeros_like(of_step)));
  const at::Tensor terms = at::where(pairs.present, pairs.loss * spoil, at::zeros_like(pairs.loss));
  const at::Tensor total = terms.sum() * share;

  Computed out;
  const auto dtype = logp.scalar_type();
  if (with_gradient) out.dlogps = torch::autograd::grad({total}, {logp}, {}, true)[0].to(dtype);
  at::AutoGradMode disabled(false);
  out.loss = total.detach().to(dtype);
  out.sums = sums_of(objective.beta, pairs, terms.detach(), count);
  return out;
}

// ---- autograd -----------------------------------------------------------------------------------

using Compute = Computed (*)(const PreferenceBatch&, const PreferenceObjective&,
                             const PairNormalizer&, bool with_gradient);

class PreferenceLoss : public torch::autograd::Function<PreferenceLoss> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& logps, Compute compute,
                            const PreferenceBatch* batch, const PreferenceObjective* objective,
                            const PairNormalizer* normalizer, at::Tensor* sums) {
    Computed computed = compute(*batch, *objective, *normalizer, logps.requires_grad());
    *sums = computed.sums;
    context->save_for_backward({computed.dlogps, logps.requires_grad() ? logps : at::Tensor()});
    return computed.loss;
  }
  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const variable_list saved = context->get_saved_variables();
    return {
        detail::scaled("preference_loss", gradients[0], saved[0], saved[1]), {}, {}, {}, {}, {}};
  }
};

PreferenceOutput run(const PreferenceBatch& unchecked, const PreferenceObjective& objective,
                     const PairNormalizer& normalizer, Compute compute) {
  return detail::with_public_errors([&] {
    const PreferenceBatch batch = detail::checked("preference_loss", as_rows(unchecked));
    check_objective("preference_loss", objective);
    check_needs("preference_loss", presence_of(batch), face::count_rows(batch), objective);
    PreferenceOutput out;
    out.loss = PreferenceLoss::apply(*detail::input_of_graph(batch.logps), compute, &batch,
                                     &objective, &normalizer, &out.metrics.sums);
    return out;
  });
}

}  // namespace

PreferenceBatch detail::answers_as_rows(const PreferenceBatch& batch) {
  if (!batch.logps.defined() || batch.logps.dim() != 1 || batch.offsets.defined()) return batch;
  const auto column = [](const at::Tensor& tensor) {
    return tensor.defined() && tensor.dim() == 1 ? tensor.unsqueeze(1) : tensor;
  };
  return {.logps = column(batch.logps),
          .ref_logps = column(batch.ref_logps),
          .response_mask = column(batch.response_mask)};
}

PreferenceMetrics PreferenceMetricTensors::to_host() const {
  PreferenceMetrics out;
  detail::check_value(
      sums.defined() && sums.numel() == static_cast<int64_t>(out.sums.size()),
      "preference_loss: metrics must be the block of a loss, got a tensor of another size");
  const at::Tensor host = sums.cpu().to(at::kDouble).contiguous();
  std::memcpy(out.sums.data(), host.const_data_ptr(), sizeof(out.sums));
  return out;
}

std::map<std::string, double> PreferenceMetricTensors::to_map() const { return to_host().to_map(); }

PreferenceOutput preference_loss(const PreferenceBatch& batch, const PreferenceObjective& objective,
                                 const PairNormalizer& normalizer) {
  const bool on_cpu = !batch.logps.defined() || batch.logps.is_cpu();
  return run(batch, objective, normalizer, on_cpu ? compute_on_cpu : compute_on_tensors);
}

PreferenceOutput detail::preference_loss_any_device(const PreferenceBatch& batch,
                                                    const PreferenceObjective& objective,
                                                    const PairNormalizer& normalizer) {
  return run(batch, objective, normalizer, compute_on_tensors);
}

PairNormalizer local_counts(const PreferenceBatch& given) {
  const auto function = "local_counts";
  return detail::with_public_errors([&] {
    const PreferenceBatch batch = detail::on_host(detail::checked(function, as_rows(given)));
    return local_counts(face::arrays_of(function, batch), torch_executor());
  });
}

}  // namespace tether
