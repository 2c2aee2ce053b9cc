#pragma once

#include <cstddef>
#include <cstdint>

#include "../policy_objective.h"
#include "arrays.h"
#include "policy_program.h"
#include "turn_program.h"
#include "weight_program.h"

// A policy loss as a list of kernels, and the parts of the workspace that they work in.

namespace tether::cuda {

// Whether a ratio or a weight of the objective is that of a turn.
inline bool looks_at_turns(const PolicyObjective& objective) {
  return rule_of(objective.level).segment == Segment::turn || any_of_turns(objective.weights);
}

// In the caller's memory, one after the other, those of whole doubles first. Without memory it says
// how much there must be.
struct PolicyWorkspace {
  double* counts = nullptr;   // [3]
  RowTotals* rows = nullptr;  // [rows pieces]; the counts of rows before them
  TurnTable turns = {};       // of objectives that look at them
  float* mask = nullptr;      // like the tokens
  float* weights = nullptr;   // like the tokens
  int64_t bytes = 0;          // of all

  static int64_t tokens(const RowLayout& layout) {
    return layout.packed() ? layout.columns : layout.rows * layout.columns;
  }

  PolicyWorkspace(void* memory, const RowLayout& layout, const PolicyObjective& objective) {
    const auto part = [&]<class T>(T*& begin, int64_t count) {
      if (memory != nullptr) begin = reinterpret_cast<T*>(static_cast<std::byte*>(memory) + bytes);
      bytes += count * static_cast<int64_t>(sizeof(T));
    };
    const int64_t n = tokens(layout);
    part(counts, 4);
    part(rows, layout.rows * pieces_of_tokens(layout, Segment::token));  // whatever the objective
    if (looks_at_turns(objective)) {
      part(turns.counts, layout.rows);
      part(turns.begins, n);
      part(turns.ratios, n);
      part(turns.sums, n);
    }
    part(mask, n);
    part(weights, n);
  }
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
                                          const double* counts, const PolicyGradients& gradients,
                                          const TurnTable& turns = {}) {
  const LevelRule& level = rule_of(objective.level);
  PolicyParameters out{};
  static_cast<PolicyArrays&>(out) = batch;
  out.anchor_logps = anchor_of(batch, objective.kl.reference);
  out.dlogps = gradients.logps;
  out.dentropies = gradients.entropies;
  out.segment = level.segment;
  out.is_mean = level.is_mean;
  if (level.segment == Segment::turn) out.turns = turns;
  out.pieces = pieces_of_tokens(batch.layout, level.segment);
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
                                          const ConstArray& before, const MutableArray& out,
                                          const TurnTable& turns) {
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
          .turns = rule.segment == Segment::turn ? turns : TurnTable{},
          .measures = false,
          .reduction = rule.reduction,
          .leaves = weight.formula.traits().leaves};
}

// The kernels of a loss, in their order, by a `Launch` that runs each: on a device, or in the
// tests on the host.

template <class Launch>
void run_weight(const TokenWeight& weight, const WeightParameters& in, const Launch& launch) {
  if (in.turns) {
    WeightParameters of_tokens = in;
    of_tokens.measures = true;
    launch.weight(weight, of_tokens);
    launch.turn_statistics(in);
  }
  launch.weight(weight, in);
}

// The batch with what weights make of it: those that leave, or the others.
template <class Launch>
PolicyArrays run_weights(bool leave, const PolicyArrays& batch, const PolicyObjective& objective,
                         const PolicyWorkspace& workspace, const Launch& launch) {
  PolicyArrays out = batch;
  ConstArray& made = leave ? out.response_mask : out.token_weights;
  float* const memory = leave ? workspace.mask : workspace.weights;
  const auto own = tokens_of<MutableArray>(batch.layout, memory);
  for (const TokenWeight& weight : weights_that(leave, objective.weights)) {
    run_weight(weight, weight_parameters(batch, weight, made, own, workspace.turns), launch);
    made = tokens_of<ConstArray, const void>(batch.layout, memory);
  }
  return out;
}

// Turns are those of the caller's mask.
template <class Launch>
PolicyArrays run_gates(const PolicyArrays& batch, const PolicyObjective& objective,
                       const PolicyWorkspace& workspace, const Launch& launch) {
  if (workspace.turns) {
    launch.turns({batch.layout, batch.turn_ids, batch.response_mask, workspace.turns.begins});
  }
  return run_weights(true, batch, objective, workspace, launch);
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
  const PolicyArrays weighed = run_weights(false, gated, objective, workspace, launch);
  const auto in = policy_parameters(weighed, objective, factor, counts, gradients, workspace.turns);
  if (in.turns) launch.turn_ratios(in);
  launch.rows(objective.surrogate, in, workspace.rows);
  if (in.turns && in.is_shared && in.dlogps) launch.turn_gradients(in);
  launch.add_rows(workspace.rows, in, totals);
}

}  // namespace tether::cuda
