#include "libtorch/preference_loss.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/minimum.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>

#include "libtorch/arrays.h"
#include "libtorch/cuda/kernels.h"
#include "libtorch/executor.h"
#include "libtorch/flat_batch.h"
#include "libtorch/fused_loss.h"
#include "rl/kernels/preference_loss.h"
#include "rl/kernels/token_block.h"

namespace tether {
namespace {

struct Names {
  static constexpr const char* kFunction = "preference_loss";
};
using PreferenceLoss =
    detail::FusedLoss<Names, PreferenceBatch, PreferenceObjective, PairNormalizer>;

// Of whole answers every one counts where there is no mask.
PreferenceBatch as_rows(const PreferenceBatch& batch) {
  PreferenceBatch out = detail::answers_as_rows(batch);
  const bool answers = batch.logps.defined() && batch.logps.dim() == 1 && !batch.offsets.defined();
  if (answers && !out.response_mask.defined()) {
    out.response_mask =
        at::ones(out.logps.sizes(), at::dtype(at::kBool).device(out.logps.device()));
  }
  return out;
}

detail::FusedResult compute_on_cpu(const PreferenceBatch& batch,
                                   const PreferenceObjective& objective,
                                   const PairNormalizer& normalizer, bool with_gradient) {
  detail::FusedResult out =
      detail::fused_on_cpu(batch.logps, with_gradient, [&](const MutableArray& gradient) {
        return preference_loss(face::arrays_of(Names::kFunction, batch), objective, normalizer,
                               gradient, torch_executor());
      });
  out.sums = out.sums.view({PreferenceMetrics::kSums, 2});
  return out;
}

constexpr double kLargestResult = Largest<double>::kResult;

// ---- any device ---------------------------------------------------------------------------------

// Sums over the tokens of each row, [rows].
class RowSums {
 public:
  explicit RowSums(const PreferenceBatch& batch)
      : padded_(!batch.offsets.defined()), rows_(face::count_rows(batch)) {
    if (padded_) return;
    row_ = detail::row_of_tokens(batch.logps, batch.offsets, rows_);
  }
  at::Tensor operator()(const at::Tensor& tokens) const {
    if (padded_) return tokens.sum(1);
    return at::zeros({rows_}, tokens.options()).index_add(0, row_, tokens);
  }
  // One number a row, at each of its tokens.
  at::Tensor spread(const at::Tensor& numbers) const {
    return padded_ ? numbers.unsqueeze(1) : numbers.index_select(0, row_);
  }
  // How many of the tokens that count come before each, in its row.
  at::Tensor before(const at::Tensor& counts) const {
    const at::Tensor ones = counts.to(at::kLong);
    if (padded_) return ones.cumsum(1) - ones;
    const at::Tensor of_rows = (*this)(ones);
    return ones.cumsum(0) - ones - spread(of_rows.cumsum(0) - of_rows);
  }
  int64_t rows() const { return rows_; }

 private:
  bool padded_;
  int64_t rows_ = 0;
  at::Tensor row_;
};

// A column of the batch in the type of the arithmetic, with 0 where the mask is 0; a constant. Sums
// of float do not overflow in double.
at::Tensor selected(const PreferenceBatch& batch, const at::Tensor& mask,
                    const at::Tensor& tensor) {
  const at::Tensor values = tensor.detach().to(detail::result_type(batch.logps));
  const at::Tensor each = at::where(mask != 0, values, at::zeros_like(values));
  const bool wide = each.scalar_type() == at::kDouble;
  return wide ? detail::saturated(each, detail::largest_input(wide)) : each;
}

// What an answer's row says of it, [rows] in float64; `absent` without it.
at::Tensor of_rows(const at::Tensor& given, const at::Tensor& n, double absent) {
  return given.defined() ? given.detach().to(at::kDouble) : at::full_like(n, absent);
}

// Of every row, [rows].
struct AnswerTerms {
  at::Tensor n, logp, score, nll;
  at::Tensor nll_n;
};

// The weights of the score: ld_alpha w from the end of the shorter answer on.
at::Tensor score_weights(const RowSums& sum_rows, const at::Tensor& weight, double ld_alpha) {
  if (ld_alpha == 1) return weight;
  const at::Tensor active = weight != 0;
  const at::Tensor lengths = sum_rows(active.to(at::kLong));
  const int64_t half = sum_rows.rows() / 2;
  const at::Tensor shorter =
      at::minimum(lengths.narrow(0, 0, half), lengths.narrow(0, half, half)).repeat({2});
  const at::Tensor tail = sum_rows.before(active) >= sum_rows.spread(shorter);
  return at::where(tail, weight * ld_alpha, weight);
}

// Of log-probabilities in float64.
AnswerTerms answers_of(const PreferenceBatch& batch, const PreferenceObjective& objective,
                       const at::Tensor& logps) {
  const RowSums sum_rows(batch);
  const auto zeros = at::zeros_like(logps);
  const at::Tensor weight = batch.response_mask.to(at::kDouble);
  const at::Tensor logp = at::where(weight != 0, logps, zeros);
  AnswerTerms out;
  out.n = sum_rows(weight);
  const at::Tensor one = at::ones_like(out.n);
  const at::Tensor over =
      objective.score == PairScore::mean ? at::where(out.n > 0, out.n, one) : one;
  out.logp = sum_rows(weight * logp);
  const at::Tensor of_score = score_weights(sum_rows, weight, objective.ld_alpha);
  at::Tensor score = logp;
  if (objective.reference) score = logp - selected(batch, weight, batch.ref_logps);
  const at::Tensor terms = of_score * score;
  // What ld_alpha = 0 takes out has no slope, in a broken answer too.
  out.score = sum_rows(at::where(of_score != 0, terms, terms.detach())) / over;
  out.nll_n = out.n;
  out.nll = -out.logp;
  if (objective.nll.coefficient == 0) return out;
  if (batch.nll_mask.defined()) {
    const at::Tensor of_nll = batch.nll_mask.to(at::kDouble);
    out.nll_n = sum_rows(of_nll);
    out.nll = -sum_rows(at::where(of_nll != 0, of_nll * logps, zeros));
  }
  if (objective.nll.mean == NllMean::sequence_mean) {
    out.nll = at::where(out.nll_n > 0, out.nll / at::where(out.nll_n > 0, out.nll_n, one),
                        at::zeros_like(one));
  }
  return out;
}

// What every example has, side by side [examples].
struct ExampleTerms {
  at::Tensor phi, weight;  // of which the loss is the product
  at::Tensor loss, nll, nll_n;
  at::Tensor good;     // whether the first answer is one of the chosen
  at::Tensor present;  // not padding
  at::Tensor finite;
};

// Of numbers side by side.
at::Tensor all_finite(const std::vector<at::Tensor>& numbers) {
  return at::isfinite(at::stack(numbers).detach()).all(0);
}

ExampleTerms examples_of(const PreferenceBatch& batch, const PreferenceObjective& objective,
                         const AnswerTerms& answers) {
  const bool labelled = batch.labels.defined();
  const int64_t rows = answers.n.size(0), count = labelled ? rows : rows / 2;
  const int64_t second = labelled ? 0 : count;  // of single answers there is none
  const at::Tensor baselines =
      detail::saturated(of_rows(batch.baselines, answers.n, 0), kLargestResult);
  const at::Tensor weights = of_rows(batch.answer_weights, answers.n, 1);
  const at::Tensor label = of_rows(batch.labels, answers.n, 1).narrow(0, 0, count);
  const auto part = [&](const at::Tensor& each, int64_t from) {
    return each.narrow(0, from, count);
  };
  const auto answer = [&](int64_t from) {
    const TensorNumber score{part(answers.score, from)};
    return Answer<TensorNumber>{{detail::on_tensors(objective.link, score)},
                                score,
                                {part(baselines, from)},
                                {part(answers.n, from)}};
  };
  const TensorExample example{{answer(0), answer(second), objective.beta}, {label}};
  ExampleTerms out;
  out.good = label > 0.5;
  const at::Tensor none = at::zeros_like(label);
  out.nll = at::where(out.good, part(answers.nll, 0), none);
  out.nll_n = at::where(out.good, part(answers.nll_n, 0), none);
  at::Tensor weight = part(weights, 0);
  if (!labelled) weight = (weight * part(weights, second)).clamp_max(kLargestResult);
  out.phi = detail::bounded(detail::on_tensors(objective.loss, example));
  out.weight = (weight * objective.loss_weight).clamp_max(kLargestResult);
  out.loss = detail::bounded(out.phi * out.weight).detach();
  out.present = (part(answers.n, 0) > 0).logical_or(part(answers.n, second) > 0);
  out.finite = all_finite({part(answers.score, 0), part(answers.score, second), part(baselines, 0),
                           part(baselines, second), weight, label, out.phi,
                           objective.nll.coefficient != 0 ? out.nll : none});
  if (!objective.link.traits().of_log_ratio) {  // but for rounding, a log-probability
    const at::Tensor legal = (answers.score <= kLogProbabilityRounding).logical_or(answers.n == 0);
    out.finite = out.finite.logical_and(part(legal, 0)).logical_and(part(legal, second));
  }
  return out;
}

// [value, count] of what the chosen or the rejected answers have.
at::Tensor block_of(const at::Tensor& values, const at::Tensor& chosen) {
  const at::Tensor sum = at::where(chosen, values, at::zeros_like(values)).sum();
  return at::stack({sum, chosen.sum().to(at::kDouble)});
}

// The blocks of PreferenceMetrics.
at::Tensor sums_of(const PreferenceObjective& objective, bool pairs, const AnswerTerms& answers,
                   const ExampleTerms& examples, const at::Tensor& losses, const at::Tensor& nll) {
  using M = PreferenceMetrics;
  std::vector<at::Tensor> out(M::kSums);
  const int64_t count = losses.size(0);
  const at::Tensor& present = examples.present;
  const auto first = [&](const at::Tensor& each) { return each.narrow(0, 0, count); };
  const auto other = [&](const at::Tensor& each) {
    return each.narrow(0, pairs ? count : 0, count);
  };
  const at::Tensor good = present.logical_and(examples.good);
  const at::Tensor bad = pairs ? present : present.logical_and(examples.good.logical_not());
  const at::Tensor rewards = detail::bounded(objective.beta * answers.score);
  const at::Tensor gap = first(answers.score) - other(answers.score);
  const at::Tensor margin = detail::bounded(objective.beta * gap);
  const at::Tensor compared = pairs ? present : at::zeros_like(present);
  out[M::kLoss] = block_of(losses, present);
  out[M::kRewardChosen] = block_of(first(rewards), good);
  out[M::kRewardRejected] = block_of(other(rewards), bad);
  out[M::kMargin] = block_of(margin, compared);
  out[M::kAccuracy] = block_of((margin > 0).to(at::kDouble), compared);
  out[M::kLogpChosen] = block_of(first(answers.logp), good);
  out[M::kLogpRejected] = block_of(other(answers.logp), bad);
  out[M::kNll] = nll;
  out[M::kNonfinite] = block_of(examples.finite.logical_not().to(at::kDouble), present);
  return at::stack(out).detach();
}

// 1 / the count of the step; 0 without examples, NaN where it is no number that divides them.
at::Tensor share_of(const std::optional<double>& of_step, const at::Tensor& local, double factor) {
  const at::Tensor count = of_step ? at::full_like(local, *of_step) : local;
  return at::where(count > 0, (factor / count).clamp_max(kLargestResult),
                   at::where(local > 0, at::full_like(count, NAN), at::zeros_like(count)));
}

// d loss / d score of each row. What multiplies the loss of an example is multiplied with known
// slopes: on its way the product may overflow beside a 0.
at::Tensor score_slopes(const ExampleTerms& examples, const at::Tensor& phi,
                        const at::Tensor& score, const at::Tensor& share) {
  const at::Tensor slope = detail::bounded(detail::derivative(phi.sum(), score));
  const bool pairs = score.size(0) > examples.weight.size(0);
  const at::Tensor weight = pairs ? examples.weight.repeat({2}) : examples.weight;
  return detail::bounded(detail::bounded(slope * weight) * share);
}

detail::FusedResult compute_on_tensors(const PreferenceBatch& batch,
                                       const PreferenceObjective& objective,
                                       const PairNormalizer& normalizer, bool with_gradient) {
  const c10::InferenceMode normal(false);
  at::AutoGradMode enabled(true);
  const at::Tensor read =
      batch.nll_mask.defined() ? batch.response_mask + batch.nll_mask : batch.response_mask;
  // In float64, as the slopes of answers are: those of score and likelihood meet before they are
  // narrowed.
  const at::Tensor logp = selected(batch, read, batch.logps).to(at::kDouble).requires_grad_(true);
  const AnswerTerms answers = answers_of(batch, objective, logp);
  const ExampleTerms examples = examples_of(batch, objective, answers);
  const at::Tensor none = at::zeros_like(examples.loss);
  const at::Tensor spoil = at::where(examples.finite, at::ones_like(none), NAN);
  const auto seen = [&](const at::Tensor& each) {
    return at::where(examples.present, each * spoil, none);
  };
  const at::Tensor losses = seen(examples.loss);
  const at::Tensor count = examples.present.sum().to(at::kDouble);
  const at::Tensor share = share_of(normalizer.pairs, count, bounded(normalizer.factor()));
  at::Tensor total = detail::bounded(losses * share).sum();
  std::vector<at::Tensor> of_rows{answers.score};
  std::vector<at::Tensor> slopes{score_slopes(examples, seen(examples.phi), answers.score, share)};
  at::Tensor nll = at::zeros({2}, count.options());
  if (objective.nll.coefficient != 0) {
    const bool of_tokens = objective.nll.mean == NllMean::token;
    const at::Tensor tokens = at::where(examples.present, examples.nll_n, none).sum().detach();
    const at::Tensor over = of_tokens ? tokens : count;
    const at::Tensor each = at::where(examples.good, seen(examples.nll), none), sum = each.sum();
    const auto& of_step = of_tokens ? normalizer.tokens : normalizer.pairs;
    const at::Tensor nll_share =
        share_of(of_step, over, bounded(normalizer.factor() * objective.nll.coefficient));
    total = total + detail::bounded(each.detach() * nll_share).sum();
    of_rows.push_back(answers.nll);
    slopes.push_back(detail::bounded(detail::derivative(sum, answers.nll) * nll_share));
    nll = at::stack({sum.detach(), over});
  }

  detail::FusedResult out;
  if (with_gradient) {
    const at::Tensor slope = torch::autograd::grad(of_rows, {logp}, slopes, true)[0];
    out.gradient = detail::bounded(slope.to(detail::result_type(batch.logps)));
  }
  at::AutoGradMode disabled(false);
  out.loss = detail::narrowed(total, batch.logps);
  const bool pairs = !batch.labels.defined();
  out.sums = sums_of(objective, pairs, answers, examples, losses.detach(), nll);
  return out;
}

// ---- the function -------------------------------------------------------------------------------

// By the kernels for CUDA; what they have none for by torch's operations.
detail::FusedResult compute_on_cuda(const PreferenceBatch& batch,
                                    const PreferenceObjective& objective,
                                    const PairNormalizer& normalizer, bool with_gradient) {
  const detail::CudaKernels* kernels = detail::cuda_kernels(batch.logps);
  auto found = kernels->preference_loss(batch, objective, normalizer, with_gradient);
  if (found) return *found;
  return compute_on_tensors(detail::looked_at(Names::kFunction, batch), objective, normalizer,
                            with_gradient);
}

PreferenceOutput run(const PreferenceBatch& unchecked, const PreferenceObjective& objective,
                     const PairNormalizer& normalizer, PreferenceLoss::Compute compute,
                     detail::Offsets offsets = detail::Offsets::looked_at) {
  return detail::with_public_errors([&] {
    const PreferenceBatch batch = detail::checked(Names::kFunction, as_rows(unchecked), offsets);
    check_objective(Names::kFunction, objective);
    check_needs(Names::kFunction, presence_of(batch), face::count_rows(batch), objective);
    check_denominators(Names::kFunction, normalizer, objective);
    PreferenceOutput out;
    out.loss = PreferenceLoss::apply(*detail::input_of_graph(batch.logps), compute, &batch,
                                     &objective, &normalizer, &out.metrics.sums);
    return out;
  });
}

}  // namespace

PreferenceBatch detail::answers_as_rows(const PreferenceBatch& batch) {
  if (!batch.logps.defined() || batch.logps.dim() != 1 || batch.offsets.defined()) return batch;
  const auto as_column = [](at::Tensor& tensor) {
    if (tensor.defined() && tensor.dim() == 1) tensor = tensor.unsqueeze(1);
  };
  PreferenceBatch out = batch;
  as_column(out.logps);
  as_column(out.ref_logps);
  as_column(out.response_mask);
  as_column(out.nll_mask);
  return out;
}

PreferenceMetrics PreferenceMetricTensors::to_host() const {
  PreferenceMetrics out;
  detail::copy_block(Names::kFunction, sums, out.sums.data(), out.sums.size());
  return out;
}

std::map<std::string, double> PreferenceMetricTensors::to_map() const { return to_host().to_map(); }

PreferenceOutput preference_loss(const PreferenceBatch& batch, const PreferenceObjective& objective,
                                 const PairNormalizer& normalizer) {
  if (detail::cuda_kernels(batch.logps)) {
    return run(batch, objective, normalizer, compute_on_cuda, detail::Offsets::as_they_are);
  }
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
  return detail::with_public_errors([&]() -> PairNormalizer {
    if (const auto* kernels = detail::cuda_kernels(given.logps)) {
      const auto batch = detail::checked(function, as_rows(given), detail::Offsets::as_they_are);
      check_rows(function, batch.labels.defined(), face::count_rows(batch));
      if (const auto found = kernels->pair_counts(batch)) {
        const at::Tensor counts = found->cpu();
        const double* each = counts.const_data_ptr<double>();
        return {.pairs = each[0], .tokens = each[1]};
      }
    }
    const PreferenceBatch batch = detail::on_host(detail::checked(function, as_rows(given)));
    return local_counts(face::arrays_of(function, batch), torch_executor());
  });
}

}  // namespace tether
