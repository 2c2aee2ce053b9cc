// The estimators and the KL of two rows of tether::cuda on teams of host threads (see
// host_kernels.cc).

#include "estimators/advantage/catalogue.h"
#include "estimators/advantage/groups.h"
#include "estimators/advantage/groups_cuda.h"
#include "estimators/advantage/groups_program.h"
#include "estimators/advantage/row_scan.h"
#include "estimators/advantage/row_scan_cuda.h"
#include "estimators/advantage/row_scan_program.h"
#include "estimators/advantage/whitening_cuda.h"
#include "estimators/advantage/whitening_program.h"
#include "logits/held_pair_program.h"
#include "logits/pair_kl_cuda.h"
#include "logits/pair_kl_program.h"
#include "tests/host_team.h"

namespace tether::cuda {

void scan_rows(std::string_view function, const AdvantageArrays& batch, const Recursion& recursion,
               const MutableArray& advantages, const MutableArray& returns, Stream) {
  check_formula(function, recursion);
  check_reads(function, presence_of(batch), recursion);
  const auto in = scan_parameters(batch, recursion, advantages, returns);
  for_each_recursion([&]<class Formula>(const FormulaRow<Formula>&) {
    const Formula* formula = recursion.target<Formula>();
    if (formula == nullptr) return;
    HostRun<kScanThreads>{}(batch.layout.rows, [&](const auto& team, int64_t row) {
      row_scan_program(team, *formula, in, row);
    });
  });
}

void advantages_of_groups(std::string_view function, const GroupBatch& batch, const GroupRule& rule,
                          float* advantages, Stream) {
  check_formula(function, rule);
  check_sizes(function, batch.group_ids != nullptr, batch.group_size, batch.count);
  check_reads(function, {.lengths = batch.lengths != nullptr || batch.count == 0}, rule);
  const auto in = group_parameters(batch, rule, advantages);
  for_each_group_rule([&]<class Rule>(const FormulaRow<Rule>&) {
    const Rule* formula = rule.target<Rule>();
    if (formula == nullptr) return;
    if constexpr (requires { formula->reads_batch(); }) {
      batch_std_program(HostTeam<kGroupThreads>{}, in);
    }
    HostRun<kGroupThreads>{}(batch.count, [&](const auto& team, int64_t place) {
      group_program(team, *formula, in, place);
    });
  });
}

// ---- whitening ----------------------------------------------------------------------------------

int64_t moments_workspace(const RowLayout& layout) { return layout.rows * pieces_of_rows(layout); }

void moments(const WhiteningArrays& batch, Moments* workspace, Moments* out, Stream) {
  const HostRun<kWhiteningThreads> run;
  const int64_t parts = moments_workspace(batch.layout), pieces = pieces_of_rows(batch.layout);
  run(parts,
      [&](const auto& team, int64_t i) { moments_program(team, batch, pieces, i, workspace); });
  run(1, [&](const auto& team, int64_t) { merge_moments_program(team, workspace, parts, out); });
}

void whiten(const WhiteningArrays& batch, const Moments* step, const Whitening& options,
            const MutableArray& out, Stream) {
  check_fields("whiten", options);
  const int64_t pieces = pieces_of_rows(batch.layout);
  const WhiteningParameters in{batch, out, options.epsilon, options.shift_mean, pieces};
  HostRun<kWhiteningThreads>{}(batch.layout.rows * pieces, [&](const auto& team, int64_t i) {
    whitening_program(team, in, step, i);
  });
}

// ---- the KL of two rows -------------------------------------------------------------------------

namespace {

template <class Body>
void with_pairs(DType dtype, Body body) {
  if (dtype == DType::float32) body(float{});
  if (dtype == DType::bfloat16) body(BFloat16{});
  if (dtype == DType::float16) body(Float16{});
}

}  // namespace

void logits_kl(const ConstLogits& q, const ConstLogits& p, double temperature,
               const uint8_t* active, const PairKlArrays<float>& values, Stream) {
  const auto in = pair_parameters(q, p, temperature, active);
  with_pairs(q.dtype, [&]<class Stored>(Stored) {
    HostRun<kPairThreads>{}(q.rows, [&](const auto& team, int64_t row) {
      pair_kl_program<Stored>(team, in, row, values);
    });
  });
}

void logits_kl_gradients(const ConstLogits& q, const ConstLogits& p, double temperature,
                         const uint8_t* active, const PairKlArrays<const float>& upstream,
                         const PairKlArrays<float>& values, const MutableLogits& dq,
                         const MutableLogits& dp, Stream) {
  const auto in = pair_parameters(q, p, temperature, active);
  with_pairs(q.dtype, [&]<class Stored>(Stored) {
    const HostCluster<kHeldPairThreads<Stored>> team{
        .blocks = blocks_of_held_pair<Stored>(q.vocabulary, true)};
    for (int64_t row = 0; row < q.rows; ++row) {
      held_pair_program<Stored>(team, in, row, upstream, values, dq, dp);
    }
  });
}

}  // namespace tether::cuda
