#include "rl/kernels/policy_checks.h"

#include <array>
#include <cmath>
#include <string>

#include "core/check.h"
#include "rl/kernels/token_rows.h"

namespace tether {
namespace {

// Throws where a row with tokens would be divided by what is no length.
template <class T>
void check_row_tokens(std::string_view function, const PolicyArrays& batch) {
  const Range length{0, largest_finite, true};
  for (int64_t row = 0; batch.row_tokens && row < batch.layout.rows; ++row) {
    const double given = length_of(batch, row, 0);
    require(length.contains(given) || row_tokens<T>(batch, row) == 0, [&] {
      return named(function, "row_tokens") + " must be " + text(length) +
             " where a row has tokens, got " + text(given) + " at " + in_brackets(text(row));
    });
  }
}

template <class T>
TermCounts count_tokens(std::string_view function, const PolicyArrays& batch,
                        const Executor& executor) {
  const Chunks chunks = Chunks::of(batch.layout.rows, batch.layout.elements());
  std::array<TermCounts, kMaxChunks> counts;
  parallel_for(executor, chunks.count, [&](int64_t chunk) {
    TermCounts local;
    for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row) {
      const double tokens = row_tokens<T>(batch, row);
      local.tokens += tokens;
      local.sequences += tokens > 0 ? 1 : 0;
    }
    counts[static_cast<size_t>(chunk)] = local;
  });
  TermCounts total;
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    total.tokens += counts[static_cast<size_t>(chunk)].tokens;
    total.sequences += counts[static_cast<size_t>(chunk)].sequences;
  }
  if (std::isnan(total.tokens)) check_weights(function, batch.layout, batch.response_mask);
  check_row_tokens<T>(function, batch);
  return total;
}

}  // namespace

void check_weight_needs(std::string_view function, const PolicyInputs<bool>& given,
                        const std::vector<TokenWeight>& weights) {
  for (const TokenWeight& weight : weights) {
    const auto check = [&](bool needed, bool is_given, std::string_view array) {
      require(!needed || is_given, [&] {
        return named(function, array) + " must be given for the weight " +
               std::string(name_of(weight)) + ", got none";
      });
    };
    const Traits& traits = weight.formula.traits();
    check(traits.leaves, given.old_logps, "old_logps");
    check(traits.needs_ref_logps, given.ref_logps, "ref_logps");
    check(traits.needs_rollout_logps, given.rollout_logps, "rollout_logps");
  }
}

void check_needs(std::string_view function, const PolicyInputs<bool>& given,
                 const PolicyObjective& objective) {
  require(!objective.kl.needs(KlReference::reference) || given.ref_logps, [&] {
    return named(function, "ref_logps") + " must be given when beta is greater than 0, got beta " +
           text(objective.kl.beta) + " and none. Pass ref_logps or beta = 0";
  });
  require(!objective.kl.needs(KlReference::rollout) || given.rollout_logps, [&] {
    return named(function, "rollout_logps") +
           " must be given when beta is greater than 0 and kl_reference is rollout or "
           "kl_correction a rollout_ratio, got none";
  });
  require(objective.entropy.coefficient == 0 || given.entropies, [&] {
    return named(function, "entropies") +
           " must be given when entropy_coef is not 0, got entropy_coef " +
           text(objective.entropy.coefficient) + " and none. Pass entropies or entropy_coef = 0";
  });
  check_weight_needs(function, given, objective.weights);
}

void check_call(std::string_view function, const PolicyArrays& batch,
                const PolicyObjective& objective, const PolicyGradients& gradients) {
  check_objective(function, objective);
  check_inputs(function, batch);
  check_needs(function, presence_of(batch), objective);
  check_array(function, "dlogps", batch.layout, gradients.logps);
  check_array(function, "dentropies", batch.layout, gradients.entropies);
  require(!gradients.entropies || bool(batch.entropies), [&] {
    return named(function, "dentropies") + " must be none without entropies, got an array";
  });
}

TermCounts checked_counts(std::string_view function, const PolicyArrays& batch,
                          const Executor& executor) {
  return batch.logps.dtype == DType::float64 ? count_tokens<double>(function, batch, executor)
                                             : count_tokens<float>(function, batch, executor);
}

}  // namespace tether
