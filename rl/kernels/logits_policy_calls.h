#pragma once

#include "logits_policy_program.h"
#include "policy_calls.h"

// A policy loss from logits as a list of kernels (policy_calls.h).

namespace tether::cuda {

// Whether the gradient of a token is known from its row of logits and constants.
inline bool is_of_own_logits(const PolicyObjective& objective) {
  bool out = objective.level == RatioLevel::token;
  for (const TokenWeight& weight : objective.weights) out &= !weight.formula.traits().reads_policy;
  return out;
}

// batch.logps and entropies are where the log-probabilities and entropies go. launch.tokens runs
// token_of_logits_program for every row of the logits. Without totals that is all.
template <class Launch>
void run_logits_policy_loss(const PolicyArrays& batch, const PolicyObjective& objective,
                            const double* counts, double factor, FlatTotals* totals,
                            const PolicyWorkspace& workspace, const Launch& launch) {
  const PolicyArrays gated = run_gates(batch, objective, workspace, launch);
  auto* lengths = reinterpret_cast<double*>(workspace.rows);
  launch.count_rows(policy_parameters(gated, objective, factor, counts, {}), lengths);
  if (counts == nullptr) {
    launch.add_counts(lengths, workspace.counts);
    counts = workspace.counts;
  }
  const PolicyArrays weighed = run_weights(false, gated, objective, workspace, launch);
  const auto in = policy_parameters(weighed, objective, factor, counts, {});
  PolicyParameters of_tokens = in;
  if (!in.row_tokens) {
    of_tokens.row_tokens = {
        .data = lengths, .dtype = DType::float64, .row_stride = 1, .per_row = true};
  }
  launch.tokens(objective.surrogate, of_tokens);
  if (totals == nullptr) return;
  launch.rows(objective.surrogate, in, workspace.rows);
  launch.add_rows(workspace.rows, in, totals);
}

}  // namespace tether::cuda
