// The code of docs/cuda.md.

#include <gtest/gtest.h>

#include "estimators/advantage/gae.h"
#include "estimators/advantage/group.h"
#include "estimators/advantage/groups_cuda.h"
#include "estimators/advantage/row_scan_cuda.h"
#include "estimators/advantage/whitening_cuda.h"
#include "logits/pair_kl_cuda.h"
#include "logits/rows_cuda.h"
#include "logits/support_cuda.h"
#include "rl/kernels/logits_policy_loss_cuda.h"
#include "rl/kernels/policy_loss_cuda.h"
#include "rl/kernels/preference_loss_cuda.h"
#include "rl/kernels/value_loss_cuda.h"
#include "rl/policy/dapo.h"
#include "rl/preference/dpo.h"

namespace tether {
namespace {

// All pointers are the device's.
struct Rows {
  void* logits;  // [rows, vocabulary], bfloat16
  const int64_t* targets;
  cuda::RowState* states;
  float *logps, *entropies, *dlogps, *dentropies;
  int64_t rows, vocabulary;
};

void forward(const Rows& in, cuda::Stream stream) {
  const ConstLogits logits{in.logits, DType::bfloat16, in.rows, in.vocabulary, in.vocabulary};
  cuda::row_statistics(logits, in.targets, {.temperature = 0.7},
                       {.states = in.states, .logps = in.logps, .entropies = in.entropies}, stream);
}

// Into the logits themselves.
void backward(const Rows& in, cuda::Stream stream) {
  const ConstLogits logits{in.logits, DType::bfloat16, in.rows, in.vocabulary, in.vocabulary};
  const MutableLogits dlogits{in.logits, DType::bfloat16, in.rows, in.vocabulary, in.vocabulary};
  cuda::row_gradients(logits, in.targets, {.temperature = 0.7}, in.states, in.dlogps, in.dentropies,
                      dlogits, stream);
}

// counts: the denominators of the step, on the device, summed over its micro-batches and ranks.
void loss(const PolicyArrays& batch, const double* counts, const PolicyGradients& gradients,
          PolicyTotals* totals, void* workspace, cuda::Stream stream) {
  cuda::policy_loss(batch, presets::dapo(), counts, /*factor=*/1, gradients, totals, workspace,
                    stream);
}

// Into the logits themselves; the batch has no logps.
void loss_of_logits(const Rows& in, const PolicyArrays& batch, const double* counts,
                    PolicyTotals* totals, void* workspace, cuda::Stream stream) {
  const ConstLogits logits{in.logits, DType::bfloat16, in.rows, in.vocabulary, in.vocabulary};
  const MutableLogits dlogits{in.logits, DType::bfloat16, in.rows, in.vocabulary, in.vocabulary};
  cuda::policy_loss_of_logits(logits, in.targets, {.temperature = 0.7}, batch, presets::dapo(),
                              counts, /*factor=*/1, {in.logps, in.entropies}, dlogits, totals,
                              workspace, stream);
}

// counts: as of the policy loss, by cuda::preference_counts.
void dpo(const PreferenceArrays& batch, const double* counts, const MutableArray& dlogps,
         PreferenceTotals* totals, void* workspace, cuda::Stream stream) {
  cuda::preference_loss(batch, presets::dpo(), counts, /*factor=*/1, dlogps, totals, workspace,
                        stream);
}

void critic(const ValueArrays& batch, const double* counts, const MutableArray& dvalues,
            ValueTotals* totals, void* workspace, cuda::Stream stream) {
  cuda::value_loss(batch, {.loss = ClippedSquaredError{.clip_range = 0.5}}, counts, /*factor=*/1,
                   dvalues, totals, workspace, stream);
}

// dkl: of the loss by each row's KL(q || p); into the logits of q themselves.
void distillation(const Rows& q, const Rows& p, const float* dkl, float* kl, cuda::Stream stream) {
  const ConstLogits student{q.logits, DType::bfloat16, q.rows, q.vocabulary, q.vocabulary};
  const ConstLogits teacher{p.logits, DType::bfloat16, p.rows, p.vocabulary, p.vocabulary};
  const MutableLogits dstudent{q.logits, DType::bfloat16, q.rows, q.vocabulary, q.vocabulary};
  cuda::logits_kl_gradients(student, teacher, /*temperature=*/1, /*active=*/nullptr, {.kl = dkl},
                            {.kl = kl}, dstudent, /*dp=*/{}, stream);
}

void advantage(const AdvantageArrays& batch, const MutableArray& advantages,
               const MutableArray& returns, cuda::Stream stream) {
  cuda::scan_rows("advantage", batch, Gae{.lambda = 0.95}, advantages, returns, stream);
}

void group_advantage(const float* rewards, int64_t answers, float* advantages,
                     cuda::Stream stream) {
  const cuda::GroupBatch batch{.rewards = rewards, .group_size = 8, .count = answers};
  cuda::advantages_of_groups("advantage", batch, GroupAdvantage{}, advantages, stream);
}

// ids: [rows, 50], -1 for none. kept_logits: a float for each.
void of_kept_ids(const Rows& in, const int32_t* ids, float* kept_logits, cuda::Stream stream) {
  const ConstLogits logits{in.logits, DType::bfloat16, in.rows, in.vocabulary, in.vocabulary};
  const MutableLogits dlogits{in.logits, DType::bfloat16, in.rows, in.vocabulary, in.vocabulary};
  const KeptIds kept{{.rows = in.rows, .columns = 50}, {ids, DType::int32, 50, 1}};
  cuda::support_statistics(logits, in.targets, kept, {.temperature = 0.7},
                           {.states = in.states, .logps = in.logps}, stream);
  cuda::support_gradients(logits, in.targets, kept, {.temperature = 0.7}, in.states, in.dlogps,
                          in.dentropies, kept_logits, dlogits, stream);
}

// gathered: the moments of every rank, [ranks] on each; workspace: moments_workspace(layout).
void whiten(const WhiteningArrays& batch, Moments* workspace, Moments* gathered, int64_t ranks,
            const MutableArray& out, cuda::Stream stream) {
  cuda::moments(batch, workspace, /*out=*/workspace, stream);
  // ... an all_gather of workspace[0] into `gathered` ...
  cuda::merge_moments(gathered, ranks, workspace, stream);
  cuda::whiten(batch, workspace, Whitening{}, out, stream);
}

TEST(CudaExample, Links) {
  EXPECT_NE(&forward, nullptr);
  EXPECT_NE(&backward, nullptr);
  EXPECT_NE(&loss, nullptr);
  EXPECT_NE(&loss_of_logits, nullptr);
  EXPECT_NE(&dpo, nullptr);
  EXPECT_NE(&critic, nullptr);
  EXPECT_NE(&distillation, nullptr);
  EXPECT_NE(&of_kept_ids, nullptr);
  EXPECT_NE(&advantage, nullptr);
  EXPECT_NE(&group_advantage, nullptr);
  EXPECT_NE(&whiten, nullptr);
}

}  // namespace
}  // namespace tether
