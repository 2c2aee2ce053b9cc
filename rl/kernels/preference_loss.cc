#include "rl/kernels/preference_loss.h"

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "core/check.h"
#include "rl/aggregation.h"
#include "rl/kernels/answer_sums.h"
#include "rl/kernels/token_rows.h"
#include "rl/preference/dpo.h"

namespace tether {
namespace {

using M = PreferenceMetrics;
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// An answer with what its row says of it.
struct Side {
  size_t row;
  const AnswerSums& sums;
  double baseline, weight;

  bool is_sound() const { return baseline * 0 + weight * 0 == 0; }
};

// A pair, or an answer with a label, which then stands on both sides.
struct ExampleOfSums {
  Side first, second;
  double label;  // 1 of pairs
  bool is_pair;

  bool is_padding() const { return first.sums.n == 0 && second.sums.n == 0; }
  bool is_good() const { return label > 0.5; }
};

// The examples of a batch.
class Examples {
 public:
  Examples(const PreferenceArrays& batch, const std::vector<AnswerSums>& answers)
      : batch_(batch), answers_(answers) {}

  // visit(example) for all but padding.
  template <class Visit>
  void for_each(Visit visit) const {
    const bool pairs = !batch_.labels;
    const size_t count = pairs ? answers_.size() / 2 : answers_.size();
    for (size_t i = 0; i < count; ++i) {
      const double label = number_of_row(batch_.layout, batch_.labels, static_cast<int64_t>(i), 1);
      const ExampleOfSums example{side(i), side(pairs ? i + count : i), label, pairs};
      if (!example.is_padding()) visit(example);
    }
  }
  double count() const {
    double out = 0;
    for_each([&](const ExampleOfSums&) { ++out; });
    return out;
  }
  // The tokens of the NLL.
  double nll_tokens() const {
    double out = 0;
    for_each([&](const ExampleOfSums& each) { out += each.is_good() ? each.first.sums.nll_n : 0; });
    return out;
  }

  void check(std::string_view function) const {
    const auto check = [&](std::string_view name, size_t row, double value, const Range& range) {
      require(range.contains(value), [&] {
        return named(function, name) + " must be " + text(range) + ", got " + text(value) + " at " +
               in_brackets(text(row));
      });
    };
    for_each([&](const ExampleOfSums& each) {
      for (const Side& side : {each.first, each.second}) {
        check("answer_weights", side.row, side.weight, {0, largest_finite});
      }
      check("labels", each.first.row, each.label, {0, 1});
    });
  }

 private:
  Side side(size_t row) const {
    const auto i = static_cast<int64_t>(row);
    const double baseline = number_of_row(batch_.layout, batch_.baselines, i, 0);
    return {row, answers_[row], saturated(baseline, Largest<double>::kResult),
            number_of_row(batch_.layout, batch_.answer_weights, i, 1)};
  }

  const PreferenceArrays& batch_;
  const std::vector<AnswerSums>& answers_;
};

// d score / d sum: 1, or 1 / n for means.
double score_weight(PairScore score, const AnswerSums& answer) {
  if (score == PairScore::sum) return 1;
  return answer.n > 0 ? 1 / answer.n : 0;
}

// What the NLL of an answer is multiplied by before it is divided by its count: 1, or 1 / n.
double nll_weight(NllMean mean, const AnswerSums& answer) {
  if (mean != NllMean::sequence_mean) return 1;
  return answer.nll_n > 0 ? 1 / answer.nll_n : 0;
}

// The loss of a batch from the sums of its answers.
class LossOfExamples {
 public:
  LossOfExamples(const PreferenceObjective& objective, const Examples& examples,
                 const PairNormalizer& normalizer)
      : objective_(objective), examples_(examples) {
    const auto share = [&](const std::optional<double>& of_step, double local) {
      const double count = of_step.value_or(local);
      return count > 0 ? bounded(bounded(normalizer.factor()) / count) : 0;
    };
    share_ = share(normalizer.pairs, examples.count());
    if (objective.nll.coefficient == 0) return;
    const bool of_tokens = objective.nll.mean == NllMean::token;
    nll_count_ = of_tokens ? examples.nll_tokens() : examples.count();
    nll_share_ = bounded(share(of_tokens ? normalizer.tokens : normalizer.pairs, nll_count_) *
                         objective.nll.coefficient);
  }

  // The slopes of each row beside it.
  PreferenceTotals total(std::vector<AnswerSlopes>& slopes) const {
    PreferenceTotals out;
    examples_.for_each([&](const ExampleOfSums& each) { add(each, out, slopes); });
    out.metrics.sums[2 * M::kNll + 1] = nll_count_;
    return out;
  }

 private:
  void add(const ExampleOfSums& each, PreferenceTotals& out,
           std::vector<AnswerSlopes>& slopes) const {
    const Side& first = each.first;
    Dual<double, 2> loss = loss_of(each);
    const bool with_nll = objective_.nll.coefficient != 0 && each.is_good();
    double by_nll = with_nll ? nll_weight(objective_.nll.mean, first.sums) : 0;
    double nll = with_nll ? bounded(-by_nll * first.sums.nll_logp) : 0;
    const bool sound = loss.value * 0 + (with_nll ? first.sums.nll_logp * 0 : 0) == 0;
    if (!sound) {
      loss = {kNaN, {{kNaN, kNaN}}};
      nll = by_nll = with_nll ? kNaN : 0;
    }
    const auto add_metric = [&](M::Sum sum, double value) {
      out.metrics.sums[2 * size_t(sum)] += value;
      ++out.metrics.sums[2 * size_t(sum) + 1];
    };
    add_metric(M::kLoss, loss.value);
    add_metric(M::kNonfinite, !sound);
    out.metrics.sums[2 * M::kNll] += nll;
    add_answers(each, add_metric);

    out.loss += bounded(share_ * loss.value) + bounded(nll_share_ * nll);
    const auto slope = [&](const Side& side, double by_score) {
      return bounded(share_ * by_score) * score_weight(objective_.score, side.sums);
    };
    slopes[first.row] = {slope(first, loss.grad[0]), -bounded(nll_share_ * by_nll)};
    if (each.is_pair) slopes[each.second.row].score = slope(each.second, loss.grad[1]);
  }

  // v phi, by the scores before the link; NaN where an input is none.
  Dual<double, 2> loss_of(const ExampleOfSums& each) const {
    const auto& [first, second, label, is_pair] = each;
    const auto answer = [&](const Side& side, int index) {
      Dual<double, 2> score{score_of(side)};
      score.grad[index] = 1;
      return Answer<Dual<double, 2>>{objective_.link(score), score, {side.baseline}, {side.sums.n}};
    };
    Dual<double, 2> loss =
        objective_.loss({{answer(first, 0), answer(second, 1), objective_.beta}, {label}});
    loss = {bounded(loss.value), {{bounded(loss.grad[0]), bounded(loss.grad[1])}}};
    double weight = bounded(objective_.loss_weight * first.weight);
    if (is_pair) weight = bounded(weight * second.weight);
    const bool sound = first.is_sound() && second.is_sound() && label * 0 == 0 &&
                       score_of(first) * 0 + score_of(second) * 0 + loss.value * 0 == 0;
    if (!sound) return {kNaN, {{kNaN, kNaN}}};
    const auto weighed = [&](double x) { return bounded(weight * x); };
    return {weighed(loss.value), {{weighed(loss.grad[0]), weighed(loss.grad[1])}}};
  }

  double score_of(const Side& side) const {
    return side.sums.score * score_weight(objective_.score, side.sums);
  }
  double reward_of(const Side& side) const { return bounded(objective_.beta * score_of(side)); }

  template <class AddMetric>
  void add_answers(const ExampleOfSums& each, AddMetric add_metric) const {
    const auto add_answer = [&](const Side& side, bool good) {
      add_metric(good ? M::kRewardChosen : M::kRewardRejected, reward_of(side));
      add_metric(good ? M::kLogpChosen : M::kLogpRejected, side.sums.logp);
    };
    add_answer(each.first, each.is_good());
    if (!each.is_pair) return;
    add_answer(each.second, false);
    const double gap = score_of(each.first) - score_of(each.second);
    const double margin = bounded(objective_.beta * gap);
    add_metric(M::kMargin, margin);
    add_metric(M::kAccuracy, margin > 0);
  }

  const PreferenceObjective& objective_;
  const Examples& examples_;
  double share_, nll_share_ = 0, nll_count_ = 0;
};

// Of a link that takes log-probabilities.
void check_scores(std::string_view function, const std::vector<AnswerSums>& answers) {
  for (size_t row = 0; row < answers.size(); ++row) {
    require(!(answers[row].score > kLogProbabilityRounding), [&] {
      return named(function, "logps") +
             " must be log-probabilities with this link, at most 0, got a sum of " +
             text(answers[row].score) + " at " + in_brackets(text(row));
    });
  }
}

void check_normalizer(const PairNormalizer& normalizer, const PreferenceObjective& objective,
                      const Examples& examples) {
  const auto check = [&](std::string_view name, const std::optional<double>& count, double local) {
    if (count) detail::check_count("preference_loss", name, *count, local);
  };
  check("normalizer.pairs", normalizer.pairs, examples.count());
  const bool divides = objective.nll.coefficient != 0 && objective.nll.mean == NllMean::token;
  check("normalizer.tokens", normalizer.tokens, divides ? examples.nll_tokens() : 0);
}

}  // namespace

void check_rows(std::string_view function, bool has_labels, int64_t rows) {
  require(has_labels || rows % 2 == 0, [&] {
    return named(function, "logps") +
           " must have an even number of rows, chosen answers before rejected ones, got " +
           text(rows);
  });
}

void check_denominators(std::string_view function, const PairNormalizer& normalizer,
                        const PreferenceObjective& objective) {
  const Range positive{0, largest_finite, true};
  check_range(function, "normalizer.world_size", normalizer.world_size, positive);
  check_range(function, "normalizer.scale", normalizer.scale, positive);
  const auto check = [&](std::string_view name, const std::optional<double>& count) {
    if (count) detail::check_count(function, name, *count, /*local=*/0);
  };
  check("normalizer.pairs", normalizer.pairs);
  check("normalizer.tokens", normalizer.tokens);
  const bool divides = objective.nll.coefficient != 0 && objective.nll.mean == NllMean::token;
  require(!divides || !normalizer.pairs || normalizer.tokens, [&] {
    return named(function, "normalizer.tokens") +
           " must be given where normalizer.pairs is, for a likelihood by tokens, got none";
  });
}

void check_needs(std::string_view function, const PreferenceInputs<bool>& given, int64_t rows,
                 const PreferenceObjective& objective) {
  check_rows(function, given.labels, rows);
  require(!objective.reference || given.ref_logps, [&] {
    return named(function, "ref_logps") +
           " must be given, got none. Pass them or reference = false";
  });
  require(!objective.reference || objective.link.traits().of_log_ratio, [&] {
    return named(function, "reference") +
           " must be false with this link, got true. It takes log-probabilities, not log-ratios";
  });
  const bool of_answers = objective.loss.takes_labels();
  require(!of_answers || given.labels, [&] {
    return named(function, "labels") +
           " must be given, got none. The loss is one of single answers";
  });
  require(of_answers || !given.labels, [&] {
    return named(function, "labels") + " must be absent, got an array. The loss is one of pairs";
  });
  require(!of_answers || objective.ld_alpha == 1, [&] {
    return named(function, "ld_alpha") + " must be 1 for single answers, got " +
           text(objective.ld_alpha) + ". It compares the lengths of a pair";
  });
}

PreferenceTotals preference_loss(const PreferenceArrays& batch,
                                 const PreferenceObjective& objective,
                                 const PairNormalizer& normalizer, const MutableArray& dlogps,
                                 const Executor& executor) {
  const auto function = "preference_loss";
  check_objective(function, objective);
  check_inputs(function, batch);
  check_array(function, "dlogps", batch.layout, dlogps);
  check_needs(function, presence_of(batch), batch.layout.rows, objective);
  check_denominators(function, normalizer, objective);
  const std::vector<AnswerSums> answers = answer_sums(function, batch, objective, executor);
  const Examples examples(batch, answers);
  examples.check(function);
  if (!objective.link.traits().of_log_ratio) check_scores(function, answers);
  check_normalizer(normalizer, objective, examples);
  std::vector<AnswerSlopes> slopes(answers.size());
  const PreferenceTotals out = LossOfExamples(objective, examples, normalizer).total(slopes);
  if (dlogps) store_gradients(batch, objective, slopes, dlogps, executor);
  return out;
}

PairNormalizer local_counts(const PreferenceArrays& batch, const Executor& executor) {
  const auto function = "local_counts";
  check_inputs(function, batch);
  check_rows(function, bool(batch.labels), batch.layout.rows);
  // Of the NLL, the counts are those of its own mask.
  const PreferenceObjective counted{.reference = false, .loss = LogisticPair{}, .nll = {1}};
  const std::vector<AnswerSums> answers = answer_sums(function, batch, counted, executor);
  const Examples examples(batch, answers);
  examples.check(function);
  return {.pairs = examples.count(), .tokens = examples.nll_tokens()};
}

}  // namespace tether
