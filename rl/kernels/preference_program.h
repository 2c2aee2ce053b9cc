#pragma once

#include <cstdint>
#include <type_traits>

#include "../../core/elements.h"
#include "../../core/number.h"
#include "../../core/one_of.h"
#include "../../core/team.h"
#include "../catalogue.h"
#include "../link_catalogue.h"
#include "../preference_objective.h"
#include "answer_program.h"
#include "bounds.h"
#include "preference_loss.h"

// A preference loss as programs of a team, in three passes: what the tokens of each answer add up
// to, the loss of the examples by those sums, the gradients of the tokens by the slopes of their
// answer. As in preference_loss.cc and answer_sums.cc; sums and examples are in double.

namespace tether::cuda {

using CataloguedPreference = OneOf<std::remove_cv_t<decltype(kPreferenceFormulas)>>;
using CataloguedLink = OneOf<decltype(formulas_of(kLinkCatalogue))>;

// ---- examples -----------------------------------------------------------------------------------

// An answer with what its row says of it; NaN where that is no legal number.
struct AnswerSide {
  int64_t row;
  AnswerSums sums;
  double baseline, weight;

  TETHER_TEAM AnswerSide(const PreferenceParameters& in, const AnswerState* answers, int64_t at)
      : row(at), sums(answers[at].sums) {
    const PreferenceArrays& batch = in.batch;
    const auto number = [&](const ConstArray& array, double absent) {
      return array ? load<double>(batch.layout, array, at, 0) : absent;
    };
    baseline = saturated(number(batch.baselines, 0), Largest<double>::kResult);
    weight = number(batch.answer_weights, 1);
    if (!(weight >= 0)) weight = double{kNaN};
  }
  TETHER_TEAM bool is_sound() const { return baseline * 0 + weight * 0 == 0; }

  // d score / d sum: 1, or 1 / n for means.
  TETHER_TEAM double score_weight(PairScore score) const {
    if (score == PairScore::sum) return 1;
    return sums.n > 0 ? 1 / sums.n : 0;
  }
  // That of an answer more likely than a certain one is NaN.
  TETHER_TEAM double score(const PreferenceParameters& in) const {
    const bool illegal = !in.of_log_ratio && sums.score > kLogProbabilityRounding;
    return illegal ? double{kNaN} : sums.score * score_weight(in.score);
  }
};

// A pair, or an answer with a label, which then stands on both sides.
struct PreferenceExample {
  AnswerSide first, second;
  double label;  // 1 of pairs
  bool is_pair;

  TETHER_TEAM PreferenceExample(const PreferenceParameters& in, const AnswerState* answers,
                                int64_t i)
      : first(in, answers, i),
        second(in, answers, in.has_pairs() ? i + in.examples() : i),
        label(1),
        is_pair(in.has_pairs()) {
    if (is_pair) return;
    label = load<double>(in.batch.layout, in.batch.labels, i, 0);
    if (!(label >= 0 && label <= 1)) label = double{kNaN};
  }
  TETHER_TEAM bool is_padding() const { return first.sums.n == 0 && second.sums.n == 0; }
  TETHER_TEAM bool is_good() const { return label > 0.5; }
};

// visit(example, state) for all but padding, by all threads.
template <class Team, class Local, class Visit>
TETHER_TEAM void for_each_example(const Team& team, Local& local, const PreferenceParameters& in,
                                  const AnswerState* answers, Visit visit) {
  team.each(local, [&](int thread, auto& own) {
    for (int64_t i = thread; i < in.examples(); i += Team::kThreads) {
      const PreferenceExample example(in, answers, i);
      if (!example.is_padding()) visit(example, own);
    }
  });
}

// counts[2]: the examples of a batch, the tokens of its NLL.
template <class Team>
TETHER_TEAM void count_examples_program(const Team& team, const PreferenceParameters& in,
                                        const AnswerState* answers, double* counts) {
  struct Own {
    double examples = 0, tokens = 0;
  };
  typename Team::template Local<Own> local;
  for_each_example(team, local, in, answers, [](const PreferenceExample& example, Own& own) {
    own.examples += 1;
    own.tokens += example.is_good() ? example.first.sums.nll_n : 0;
  });
  const auto all = team.template reduce<Sum>(
      local, [](const Own& own) { return Several<double, 2>{own.examples, own.tokens}; });
  team.each(local, [&](int thread, Own&) {
    if (thread != 0) return;
    counts[0] = all.each[0];
    counts[1] = all.each[1];
  });
}

// What the losses of examples and of the NLL are multiplied by: NaN where the count of the step is
// no positive number and this batch, `local`, has some. On a device that cannot be refused.
struct PreferenceShares {
  double loss, nll;

  TETHER_TEAM PreferenceShares(const PreferenceParameters& in, const double* local) {
    const auto share = [&](int i) {
      if (in.counts[i] > 0) return bounded(bounded(in.factor) / in.counts[i]);
      return local[i] > 0 ? double{kNaN} : 0;
    };
    const bool of_tokens = in.nll.mean == NllMean::token;
    loss = share(0);
    nll = in.nll.coefficient == 0 ? 0 : bounded(share(of_tokens ? 1 : 0) * in.nll.coefficient);
  }
};

// v phi, by the scores before the link; NaN where an input is none.
TETHER_TEAM Dual<double, 2> loss_of_example(const CataloguedPreference& formula,
                                            const CataloguedLink& link,
                                            const PreferenceParameters& in,
                                            const PreferenceExample& each) {
  const auto answer = [&](const AnswerSide& side, int index) {
    Dual<double, 2> score{side.score(in)};
    score.grad[index] = 1;
    const auto linked = link([&](const auto& g) { return Dual<double, 2>{g(score)}; });
    return Answer<Dual<double, 2>>{linked, score, {side.baseline}, {side.sums.n}};
  };
  const Example<Dual<double, 2>> seen{{answer(each.first, 0), answer(each.second, 1), in.beta},
                                      {each.label}};
  const auto loss =
      formula([&](const auto& phi) { return Dual<double, 2>{detail::loss_of(phi, seen)}; });
  double weight = bounded(in.loss_weight * each.first.weight);
  if (each.is_pair) weight = bounded(weight * each.second.weight);
  const double trace = each.first.score(in) * 0 + each.second.score(in) * 0 + each.label * 0 +
                       bounded(loss.value) * 0;
  const bool sound = each.first.is_sound() && each.second.is_sound() && trace == 0;
  const auto weighed = [&](double x) {
    return sound ? bounded(weight * bounded(x)) : double{kNaN};
  };
  return {weighed(loss.value), {{weighed(loss.grad[0]), weighed(loss.grad[1])}}};
}

// Of one thread: the loss, and metrics as PreferenceTotals has them.
struct ExampleSums {
  static constexpr int kNumbers = 1 + 2 * PreferenceMetrics::kSums;
  double each[kNumbers] = {};

  TETHER_TEAM void add(PreferenceMetrics::Sum sum, double value, bool counts = true) {
    each[1 + 2 * sum] += counts ? value : 0;
    each[2 + 2 * sum] += counts ? 1 : 0;
  }
  TETHER_TEAM void add_answer(const PreferenceParameters& in, const AnswerSide& side, bool good) {
    using M = PreferenceMetrics;
    const double reward = bounded(in.beta * side.score(in));
    add(M::kRewardChosen, reward, good);
    add(M::kRewardRejected, reward, !good);
    add(M::kLogpChosen, side.sums.logp, good);
    add(M::kLogpRejected, side.sums.logp, !good);
  }
};

TETHER_TEAM void add_example(const CataloguedPreference& formula, const CataloguedLink& link,
                             const PreferenceParameters& in, const PreferenceShares& shares,
                             const PreferenceExample& each, AnswerSlopes* slopes,
                             ExampleSums& own) {
  using M = PreferenceMetrics;
  const AnswerSide& first = each.first;
  Dual<double, 2> loss = loss_of_example(formula, link, in, each);
  const bool with_nll = in.nll.coefficient != 0 && each.is_good();
  const double of_mean = first.sums.nll_n > 0 ? 1 / first.sums.nll_n : 0;
  double by_nll = !with_nll ? 0 : in.nll.mean == NllMean::sequence_mean ? of_mean : 1;
  double nll = with_nll ? bounded(-by_nll * first.sums.nll_logp) : 0;
  const bool sound = loss.value * 0 + (with_nll ? first.sums.nll_logp * 0 : 0) == 0;
  if (!sound) {
    loss = {kNaN, {{kNaN, kNaN}}};
    nll = by_nll = with_nll ? double{kNaN} : 0;
  }
  own.add(M::kLoss, loss.value);
  own.add(M::kNonfinite, sound ? 0 : 1);
  own.each[1 + 2 * M::kNll] += nll;
  own.add_answer(in, first, each.is_good());
  if (each.is_pair) {
    own.add_answer(in, each.second, false);
    const double margin = bounded(in.beta * (first.score(in) - each.second.score(in)));
    own.add(M::kMargin, margin);
    own.add(M::kAccuracy, margin > 0 ? 1 : 0);
  }
  own.each[0] += bounded(shares.loss * loss.value) + bounded(shares.nll * nll);
  const auto slope = [&](const AnswerSide& side, double by_score) {
    return bounded(shares.loss * by_score) * side.score_weight(in.score);
  };
  slopes[first.row] = {slope(first, loss.grad[0]), -bounded(shares.nll * by_nll)};
  if (each.is_pair) slopes[each.second.row] = {slope(each.second, loss.grad[1]), 0};
}

// `local`: the counts of this batch. Padding has no slope.
template <class Team>
TETHER_TEAM void examples_program(const Team& team, const CataloguedPreference& formula,
                                  const CataloguedLink& link, const PreferenceParameters& in,
                                  const AnswerState* answers, const double* local_counts,
                                  AnswerSlopes* slopes, double* totals) {
  using M = PreferenceMetrics;
  const PreferenceShares shares(in, local_counts);
  typename Team::template Local<ExampleSums> local;
  team.each(local, [&](int thread, ExampleSums& own) {
    for (int64_t i = thread; i < in.examples(); i += Team::kThreads) {
      const PreferenceExample example(in, answers, i);
      slopes[example.first.row] = slopes[example.second.row] = {};
      if (example.is_padding()) continue;
      add_example(formula, link, in, shares, example, slopes, own);
    }
  });
  const auto sums = team.template reduce<Sum>(local, [](const ExampleSums& own) {
    Several<double, ExampleSums::kNumbers> out;
    TETHER_UNROLL
    for (int i = 0; i < ExampleSums::kNumbers; ++i) out.each[i] = own.each[i];
    return out;
  });
  team.each(local, [&](int thread, ExampleSums&) {
    if (thread != 0) return;
    for (int i = 0; i < ExampleSums::kNumbers; ++i) totals[i] = sums.each[i];
    const bool of_tokens = in.nll.mean == NllMean::token;
    totals[2 + 2 * M::kNll] = in.nll.coefficient == 0 ? 0 : local_counts[of_tokens ? 1 : 0];
  });
}

// ---- the kernels of a loss, in their order, by a `Launch` that runs each -----------------------

// In the caller's memory, one after the other.
struct PreferenceWorkspace {
  double* local_counts;  // [2]
  AnswerState* answers;  // [rows]
  AnswerSlopes* slopes;  // [rows]

  static int64_t bytes(const RowLayout& layout) {
    constexpr auto kRow = static_cast<int64_t>(sizeof(AnswerState) + sizeof(AnswerSlopes));
    return static_cast<int64_t>(sizeof(double)) * 2 + layout.rows * kRow;
  }
  PreferenceWorkspace(void* memory, const RowLayout& layout)
      : local_counts(static_cast<double*>(memory)),
        answers(reinterpret_cast<AnswerState*>(local_counts + 2)),
        slopes(reinterpret_cast<AnswerSlopes*>(answers + layout.rows)) {}
};

inline PreferenceParameters preference_parameters(const PreferenceArrays& batch,
                                                  const PreferenceObjective& objective,
                                                  const double* counts, double factor,
                                                  const MutableArray& dlogps) {
  return {.batch = batch,
          .dlogps = dlogps,
          .score = objective.score,
          .reference = objective.reference,
          .of_log_ratio = objective.link.traits().of_log_ratio,
          .ld_alpha = objective.ld_alpha,
          .beta = objective.beta,
          .loss_weight = objective.loss_weight,
          .nll = objective.nll,
          .factor = factor,
          .counts = counts,
          .pieces = pieces_of_rows(batch.layout)};
}

template <class Launch>
void run_preference_counts(const PreferenceArrays& batch, const PreferenceWorkspace& workspace,
                           double* counts, const Launch& launch) {
  // Of the NLL, the counts are those of its own mask.
  PreferenceParameters in{};
  in.batch = batch;
  in.ld_alpha = 1;
  in.nll.coefficient = 1;
  in.of_log_ratio = true;
  launch.answers(in, workspace.answers);
  launch.count(in, workspace.answers, counts);
}

template <class Launch>
void run_preference_loss(const PreferenceArrays& batch, const PreferenceObjective& objective,
                         const double* counts, double factor, const MutableArray& dlogps,
                         PreferenceTotals* totals, const PreferenceWorkspace& workspace,
                         const Launch& launch) {
  static_assert(sizeof(PreferenceTotals) == sizeof(double) * ExampleSums::kNumbers);
  if (counts == nullptr) counts = workspace.local_counts;
  const auto in = preference_parameters(batch, objective, counts, factor, dlogps);
  launch.answers(in, workspace.answers);
  launch.count(in, workspace.answers, workspace.local_counts);
  launch.examples(objective, in, workspace, reinterpret_cast<double*>(totals));
  if (dlogps) launch.gradients(in, workspace);
}

}  // namespace tether::cuda
