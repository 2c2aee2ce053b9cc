#pragma once

#include <algorithm>
#include <cstdint>

#include "../policy_objective.h"
#include "arrays.h"
#include "policy_program.h"
#include "weight_program.h"

// A policy loss as a list of kernels, and the parts of the workspace that they work in.

namespace tether::cuda {

// In the caller's memory, one after the other.
struct PolicyWorkspace {
  double* counts;   // [3]
  RowTotals* rows;  // [rows pieces]; the counts of rows before them
  float* mask;      // like the tokens
  float* weights;   // like the tokens

  static int64_t tokens(const RowLayout& layout) {
    return layout.packed() ? layout.columns : layout.rows * layout.columns;
  }
  // Whatever the objective.
  static int64_t totals(const RowLayout& layout) {
    return layout.rows * pieces_of_tokens(layout, /*by_row=*/false);
  }
  static int64_t bytes(const RowLayout& layout) {
    return static_cast<int64_t>(sizeof(double)) * 4 +
           totals(layout) * static_cast<int64_t>(sizeof(RowTotals)) +
           2 * tokens(layout) * static_cast<int64_t>(sizeof(float));
  }
  PolicyWorkspace(void* memory, const RowLayout& layout)
      : counts(static_cast<double*>(memory)),
        rows(reinterpret_cast<RowTotals*>(counts + 4)),
        mask(reinterpret_cast<float*>(rows + totals(layout))),
        weights(mask + tokens(layout)) {}
};

template <class Array, class Byte>
Array tokens_of(const RowLayout& layout, Byte* data) {
  return {.data = data, .dtype = DType::float32, .row_stride = layout.columns, .column_stride = 1};
}

inline const ConstArray& anchor_of(const PolicyArrays& batch, KlReference reference) {
  switch (reference) {
    case KlReference::reference:
      return batch.ref_logps;
    case KlReference::old:
      return batch.old_logps;
    case KlReference::rollout:
      return batch.rollout_logps;
  }
  return batch.ref_logps;
}

// Of the loss of a batch, whose mask and weights are W where `weighted`.
inline PolicyParameters policy_parameters(const PolicyArrays& batch,
                                          const PolicyObjective& objective, double factor,
                                          const double* counts, const PolicyGradients& gradients) {
  const LevelRule& level = rule_of(objective.level);
  PolicyParameters out{};
  static_cast<PolicyArrays&>(out) = batch;
  out.anchor_logps = anchor_of(batch, objective.kl.reference);
  out.dlogps = gradients.logps;
  out.dentropies = gradients.entropies;
  out.by_row = level.segment == Segment::row;
  out.is_mean = level.is_mean;
  out.pieces = pieces_of_tokens(batch.layout, out.by_row);
  out.is_shared = level.shared;
  if (clips_log_ratios(objective)) out.clip = objective.log_ratio_clip;
  out.truncation = objective.surrogate.truncation();
  out.beta = objective.kl.beta;
  out.estimator = static_cast<int>(chosen(objective.kl.estimator));
  out.gradient = static_cast<int>(chosen(objective.kl.gradient));
  out.correction = objective.kl.correction;
  out.bounds = weight_bounds(kWeightSaturation<float>, objective.kl.ratio_high);
  out.entropy_coefficient = objective.entropy.coefficient;
  out.aggregation = objective.aggregation;
  out.factor = factor;
  out.counts = counts;
  return out;
}

inline WeightParameters weight_parameters(const PolicyArrays& batch, const TokenWeight& weight,
                                          const ConstArray& before, const MutableArray& out) {
  const WeightLevelRule& rule = rule_of(weight.level);
  return {.layout = batch.layout,
          .mask = batch.response_mask,
          .logps = batch.logps,
          .old_logps = batch.old_logps ? batch.old_logps : batch.logps,
          .ref_logps = batch.ref_logps,
          .rollout_logps = batch.rollout_logps,
          .advantages = batch.advantages,
          .before = before,
          .out = out,
          .segment = rule.segment,
          .reduction = rule.reduction,
          .leaves = weight.formula.traits().leaves};
}

// Calls run(weight, parameters) for the weights that leave, or for the others, and returns the
// batch with what they made.
template <class Run>
PolicyArrays with_weights(bool leave, const PolicyArrays& batch, const PolicyObjective& objective,
                          float* memory, Run run) {
  PolicyArrays out = batch;
  ConstArray& made = leave ? out.response_mask : out.token_weights;
  const auto own = tokens_of<MutableArray>(batch.layout, memory);
  for (const TokenWeight& weight : weights_that(leave, objective.weights)) {
    run(weight, weight_parameters(batch, weight, made, own));
    made = tokens_of<ConstArray, const void>(batch.layout, memory);
  }
  return out;
}

// The kernels of a loss, in their order, by a `Launch` that runs each: on a device, or in the
// tests on the host.
template <class Launch>
PolicyArrays run_gates(const PolicyArrays& batch, const PolicyObjective& objective,
                       const PolicyWorkspace& workspace, const Launch& launch) {
  return with_weights(true, batch, objective, workspace.mask,
                      [&](const auto&... each) { launch.weight(each...); });
}

template <class Launch>
void run_counts(const PolicyArrays& gated, const PolicyWorkspace& workspace, double* counts,
                const Launch& launch) {
  PolicyParameters in{};
  static_cast<PolicyArrays&>(in) = gated;
  auto* rows = reinterpret_cast<double*>(workspace.rows);
  launch.count_rows(in, rows);
  launch.add_counts(rows, counts);
}

template <class Launch>
void run_policy_loss(const PolicyArrays& batch, const PolicyObjective& objective,
                     const double* counts, double factor, const PolicyGradients& gradients,
                     FlatTotals* totals, const PolicyWorkspace& workspace, const Launch& launch) {
  const PolicyArrays gated = run_gates(batch, objective, workspace, launch);
  if (counts == nullptr) {
    run_counts(gated, workspace, workspace.counts, launch);
    counts = workspace.counts;
  }
  const PolicyArrays weighed = with_weights(false, gated, objective, workspace.weights,
                                            [&](const auto&... each) { launch.weight(each...); });
  const auto in = policy_parameters(weighed, objective, factor, counts, gradients);
  launch.rows(objective.surrogate, in, workspace.rows);
  launch.add_rows(workspace.rows, in, totals);
}

}  // namespace tether::cuda
