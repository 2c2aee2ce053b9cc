#include "rl/kernels/preference_loss.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/sum.h"
#include "rl/kernels/level_block.h"
#include "rl/kernels/token_block.h"

namespace tether {
namespace {

// What a row adds up to: weights, and w logp and w (logp - ref_logp).
struct Answer {
  double n = 0, logp = 0, log_ratio = 0;
};

// visit(column, count) for every block of the row, with its tokens and the reference loaded.
template <class T, class Visit>
void for_each_block(const PreferenceArrays& batch, int64_t row, TokenBlock<T>& block, Visit visit) {
  const auto load = [&](const ConstArray& array, int64_t column, int count, const T* weights,
                        T* out) {
    load_block(batch.layout, array, row, column, count, weights, out);
  };
  const int64_t length = batch.layout.length(row);
  for (int64_t column = 0; column < length; column += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, length - column));
    block.size = whole_lanes(count);
    load(batch.response_mask, column, count, nullptr, block.weight);
    load(batch.logps, column, count, block.weight, block.logp);
    if (batch.ref_logps) {
      load(batch.ref_logps, column, count, block.weight, block.old_logp);
    } else {
      std::fill_n(block.old_logp, kBlock, T(0));
    }
    visit(column, count);
  }
}

template <class T>
Answer answer_of(const PreferenceArrays& batch, int64_t row, TokenBlock<T>& block) {
  LaneSum tokens, logps, log_ratios;
  for_each_block(batch, row, block, [&](int64_t, int) {
    sum_weights(block.weight, block.size, tokens);
    sum_level(block, logps, log_ratios);
  });
  return {tokens.total(), logps.total(), log_ratios.total()};
}

template <class T>
std::vector<Answer> answers_of(const PreferenceArrays& batch, const Executor& executor) {
  std::vector<Answer> out(static_cast<size_t>(batch.layout.rows));
  const Chunks chunks = Chunks::of(batch.layout.rows, batch.layout.elements());
  parallel_for(executor, chunks.count, [&](int64_t chunk) {
    TokenBlock<T> block;
    for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row) {
      out[static_cast<size_t>(row)] = answer_of(batch, row, block);
    }
  });
  return out;
}

// Chosen and rejected answers of pair i.
struct Sides {
  const Answer& chosen;
  const Answer& rejected;

  bool is_padding() const { return chosen.n == 0 && rejected.n == 0; }
};

Sides sides(const std::vector<Answer>& answers, size_t i) {
  return {answers[i], answers[i + answers.size() / 2]};
}

double count_pairs(const std::vector<Answer>& answers) {
  double out = 0;
  for (size_t i = 0; i < answers.size() / 2; ++i) out += sides(answers, i).is_padding() ? 0 : 1;
  return out;
}

// d score / d sum: 1, or 1 / n for means.
double score_weight(PairScore score, const Answer& answer) {
  if (score == PairScore::sum) return 1;
  return answer.n > 0 ? 1 / answer.n : 0;
}

// Loss of a pair, by the scores before the link.
Dual<double, 2> pair_loss(const PreferenceObjective& objective, const Sides& pair,
                          PreferenceMetrics& metrics) {
  using M = PreferenceMetrics;
  const auto score = [&](const Answer& answer, int side) {
    const double sum = objective.reference ? answer.log_ratio : answer.logp;
    Dual<double, 2> out{sum * score_weight(objective.score, answer)};
    out.grad[side] = 1;
    return out;
  };
  const Dual<double, 2> chosen = score(pair.chosen, 0), rejected = score(pair.rejected, 1);
  Dual<double, 2> loss =
      objective.loss({objective.link(chosen), objective.link(rejected), objective.beta});
  loss = {bounded(loss.value), {{bounded(loss.grad[0]), bounded(loss.grad[1])}}};
  const double trace = chosen.value * 0 + rejected.value * 0 + loss.value * 0;  // 0, or NaN
  const double nan = std::numeric_limits<double>::quiet_NaN();
  if (trace != 0) loss = {nan, {{nan, nan}}};
  const double margin = bounded(objective.beta * (chosen.value - rejected.value));
  const auto add = [&](M::Sum sum, double value) { metrics.sums[2 * size_t(sum)] += value; };
  add(M::kLoss, loss.value);
  add(M::kRewardChosen, bounded(objective.beta * chosen.value));
  add(M::kRewardRejected, bounded(objective.beta * rejected.value));
  add(M::kMargin, margin);
  add(M::kAccuracy, margin > 0);
  add(M::kLogpChosen, pair.chosen.logp);
  add(M::kLogpRejected, pair.rejected.logp);
  add(M::kNonfinite, trace != 0);
  return loss;
}

// The loss times `share`, the factor of a pair, and its derivative by the sum of each row.
PreferenceTotals loss_of_pairs(const PreferenceObjective& objective,
                               const std::vector<Answer>& answers, double share,
                               std::vector<double>& slopes) {
  PreferenceTotals out;
  const size_t half = answers.size() / 2;
  for (size_t i = 0; i < half; ++i) {
    const Sides pair = sides(answers, i);
    if (pair.is_padding()) continue;
    const Dual<double, 2> loss = pair_loss(objective, pair, out.metrics);
    out.loss += bounded(share * loss.value);
    slopes[i] = bounded(share * loss.grad[0]) * score_weight(objective.score, pair.chosen);
    slopes[i + half] = bounded(share * loss.grad[1]) * score_weight(objective.score, pair.rejected);
  }
  const double pairs = count_pairs(answers);
  for (size_t i = 0; i < PreferenceMetrics::kSums; ++i) out.metrics.sums[2 * i + 1] = pairs;
  return out;
}

template <class T>
void store_gradients(const PreferenceArrays& batch, const std::vector<double>& slopes,
                     const MutableArray& dlogps, const Executor& executor) {
  const Chunks chunks = Chunks::of(batch.layout.rows, batch.layout.elements());
  parallel_for(executor, chunks.count, [&](int64_t chunk) {
    TokenBlock<T> block;
    for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row) {
      for_each_block(batch, row, block, [&](int64_t column, int count) {
        const T slope = narrow<T>(slopes[static_cast<size_t>(row)]);
        fill_shared_gradient<false>(slope, T(0), 0, block.size, block);
        store_block(batch.layout, dlogps, row, column, count, block.dlogp);
      });
    }
  });
}

void check_pairs(std::string_view function, int64_t rows) {
  require(rows % 2 == 0, [&] {
    return named(function, "logps") +
           " must have an even number of rows, chosen answers before rejected ones, got " +
           text(rows);
  });
}

template <class T>
std::vector<Answer> checked_answers(std::string_view function, const PreferenceArrays& batch,
                                    const Executor& executor) {
  std::vector<Answer> answers = answers_of<T>(batch, executor);
  for (const Answer& answer : answers) {
    if (std::isnan(answer.n)) check_weights(function, batch.layout, batch.response_mask);
  }
  return answers;
}

template <class T>
PreferenceTotals total_loss(const PreferenceArrays& batch, const PreferenceObjective& objective,
                            const PairNormalizer& normalizer, const MutableArray& dlogps,
                            const Executor& executor) {
  const std::vector<Answer> answers = checked_answers<T>("preference_loss", batch, executor);
  const double local = count_pairs(answers);
  if (normalizer.pairs) {
    const auto check = [&](bool above) {
      check_range("preference_loss", "normalizer.pairs", *normalizer.pairs,
                  Range{0, largest_finite, above});
    };
    check(false);
    check(local > 0);
  }
  const double count = normalizer.pairs.value_or(local);
  std::vector<double> slopes(answers.size());
  const double share = count > 0 ? bounded(normalizer.factor() / count) : 0;
  const PreferenceTotals out = loss_of_pairs(objective, answers, share, slopes);
  if (dlogps) store_gradients<T>(batch, slopes, dlogps, executor);
  return out;
}

}  // namespace

void check_needs(std::string_view function, const PreferenceInputs<bool>& given, int64_t rows,
                 const PreferenceObjective& objective) {
  check_pairs(function, rows);
  require(!objective.reference || given.ref_logps, [&] {
    return named(function, "ref_logps") +
           " must be given, got none. Pass them or reference = false";
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
  const Range positive{0, largest_finite, true};
  check_range(function, "normalizer.world_size", normalizer.world_size, positive);
  check_range(function, "normalizer.scale", normalizer.scale, positive);
  const auto total = batch.logps.dtype == DType::float64 ? total_loss<double> : total_loss<float>;
  return total(batch, objective, normalizer, dlogps, executor);
}

PairNormalizer local_counts(const PreferenceArrays& batch, const Executor& executor) {
  const auto function = "local_counts";
  check_inputs(function, batch);
  check_pairs(function, batch.layout.rows);
  const bool wide = batch.logps.dtype == DType::float64;
  const std::vector<Answer> answers = wide ? checked_answers<double>(function, batch, executor)
                                           : checked_answers<float>(function, batch, executor);
  return {.pairs = count_pairs(answers)};
}

}  // namespace tether
