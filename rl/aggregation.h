#pragma once

#include <array>
#include <optional>
#include <string>
#include <string_view>

#include "../core/batch.h"
#include "../core/check.h"
#include "../core/fields.h"
#include "../core/macros.h"

namespace tether {

// How token terms x_it with weights w_it (the response mask) become one number.
//
//   n_i = sum_t w_it,  tokens = sum_i n_i,  sequences = number of rows with n_i > 0
//
//   token_mean                   sum_it w x / tokens                        DAPO, PPO
//   sequence_mean_token_mean     sum_i (sum_t w x / n_i) / sequences        GRPO
//   sequence_mean_token_sum      sum_i (sum_t w x) / sequences              RLOO
//   sequence_sum_over_constant   sum_i (sum_t w x) / (sequences constant)   Dr. GRPO
//   token_sum                    sum_it w x                                 scaled by the caller
//
// An empty row is padding: it adds nothing and is not counted as a sequence (TRL counts it).
struct Aggregation {
  enum class Mode {
    token_mean,
    sequence_mean_token_mean,
    sequence_mean_token_sum,
    sequence_sum_over_constant,
    token_sum,
  };
  Mode mode = Mode::token_mean;
  double constant = 1;  // sequence_sum_over_constant only: the longest answer, say
};

constexpr Aggregation token_mean() { return {}; }
constexpr Aggregation sequence_mean_token_mean() {
  return {Aggregation::Mode::sequence_mean_token_mean};
}
constexpr Aggregation sequence_mean_token_sum() {
  return {Aggregation::Mode::sequence_mean_token_sum};
}
constexpr Aggregation sequence_sum_over_constant(double constant) {
  return {Aggregation::Mode::sequence_sum_over_constant, constant};
}

constexpr Aggregation token_sum() { return {Aggregation::Mode::token_sum}; }

inline constexpr std::array<std::string_view, 5> kAggregationNames{
    "token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum",
    "sequence_sum_over_constant", "token_sum"};

// The denominators of a whole optimizer step, from the caller: what `local_counts` gives, summed
// over micro-batches and ranks. With them any split gives the same loss and gradient. They are
// taken as stated, those of another rule than a count too. Absent: of this batch.
struct Normalizer {
  std::optional<double> policy = {};     // tokens under the surrogate
  std::optional<double> kl = {};         // tokens under the KL penalty; absent: as policy
  std::optional<double> sequences = {};  // rows with at least one token
  double world_size = 1;  // multiplies the loss (not the metrics): DDP and FSDP average gradients
  double scale = 1;       // likewise: 1 / micro-batches where each has its own denominators, say

  double factor() const { return world_size * scale; }
};

// Tokens and sequences of one term, in this batch or in the step.
struct TermCounts {
  double tokens = 0;
  double sequences = 0;
};

namespace detail {

// Of the step, where this batch has `local`: 0 counts nothing, and neither does what is smaller
// than the smallest weight of a token.
inline void check_count(std::string_view function, std::string_view name, double count,
                        double local) {
  check_range(function, name, count, Range{0, largest_finite});
  check_range(function, name, count, Range{0, largest_finite, /*above=*/local > 0});
  check_range(function, name, count, Range{count == 0 ? 0 : kSmallestWeight, largest_finite});
}

inline double step_count(std::string_view function, std::string_view name,
                         const std::optional<double>& given, double local) {
  if (given) check_count(function, "normalizer." + std::string(name), *given, local);
  return given.value_or(local);
}

}  // namespace detail

// The counts to divide by, for the surrogate and for the penalty, given those of this batch.
struct StepCounts {
  TermCounts policy;
  TermCounts kl;
};

// Throws where counts are given but not the one that the aggregation divides by: that of this batch
// would be taken for it, and every split would give another loss.
inline void check_denominators(std::string_view function, const Normalizer& normalizer,
                               const Aggregation& aggregation) {
  using Mode = Aggregation::Mode;
  if (!normalizer.policy && !normalizer.kl && !normalizer.sequences) return;
  const auto need = [&](const std::optional<double>& count, std::string_view name) {
    require(count.has_value(), [&] {
      return std::string(function) + ": normalizer." + std::string(name) +
             " must be given where other counts are, for " +
             std::string(kAggregationNames[static_cast<size_t>(aggregation.mode)]) + ", got none";
    });
  };
  if (aggregation.mode == Mode::token_mean) need(normalizer.policy, "policy");
  if (aggregation.mode != Mode::token_mean && aggregation.mode != Mode::token_sum) {
    need(normalizer.sequences, "sequences");
  }
}

inline StepCounts step_counts(std::string_view function, const Normalizer& normalizer,
                              const TermCounts& local, const Aggregation& aggregation) {
  check_denominators(function, normalizer, aggregation);
  const Range positive{0, largest_finite, true};
  check_range(function, "normalizer.world_size", normalizer.world_size, positive);
  check_range(function, "normalizer.scale", normalizer.scale, positive);
  const auto& kl = normalizer.kl ? normalizer.kl : normalizer.policy;
  const double sequences =
      detail::step_count(function, "sequences", normalizer.sequences, local.sequences);
  return {{detail::step_count(function, "policy", normalizer.policy, local.tokens), sequences},
          {detail::step_count(function, "kl", kl, local.tokens), sequences}};
}

// The factor of row i's terms: w x times this is what is summed.
TETHER_INLINE double row_factor(const Aggregation& aggregation, const TermCounts& step,
                                double row_tokens) {
  const auto over = [](double denominator) { return denominator > 0 ? 1 / denominator : 0; };
  switch (aggregation.mode) {
    case Aggregation::Mode::token_mean:
      return over(step.tokens);
    case Aggregation::Mode::sequence_mean_token_mean:
      return over(step.sequences * row_tokens);
    case Aggregation::Mode::sequence_mean_token_sum:
      return over(step.sequences);
    case Aggregation::Mode::sequence_sum_over_constant:
      return over(step.sequences * aggregation.constant);
    case Aggregation::Mode::token_sum:
      return 1;
  }
  return 0;
}

}  // namespace tether
