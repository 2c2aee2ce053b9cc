#pragma once

#include <cstdint>

#include "../../logits/logits.h"
#include "../../logits/statistics.h"
#include "policy_loss_cuda.h"

// The policy loss of tokens from their logits [N, V] and its gradient there, on a CUDA device: one
// read and one write of the logits, where row_statistics, policy_loss and row_gradients
// (rows_cuda.h) read them twice. Calls return at once, as there.
//
// A row of logits has a cluster of blocks (core/cluster.h), which holds up to 163840 columns on
// devices that have clusters, those of sm_90, and 20480 elsewhere; under a cap 65536 and 8192,
// of float32 half of these two. What is longer is read again as far as it was not held.
//
// These kernels have been compiled, and their programs executed on the host; none has run on a GPU
// yet (docs/cuda.md).

namespace tether::cuda {

// What is found of the tokens, [N] each, 0 where the mask is 0 or a weight takes the token out.
struct TokensOfLogits {
  float* logps;
  float* entropies;   // null: not wanted, for objectives without a bonus for them
  int64_t first = 0;  // the token of the first row of the logits
};

// The rows of the logits are the tokens of the batch in their order, padding too, or a chunk of
// them from found.first on, with totals null: the log-probabilities of all chunks are then for
// policy_loss. Tokens of weight 0 are not read and get gradient 0. The batch has neither logps nor
// entropies; old_logps absent: those of the logits, as constants. dlogits as in row_gradients.
// Throws Error, before anything is launched, for what policy_loss and row_statistics refuse, for
// levels other than that of the token, and for weights that look at the policy. The workspace is
// that of policy_loss.
void policy_loss_of_logits(const ConstLogits& logits, const int64_t* targets,
                           const RowOptions& options, const PolicyArrays& batch,
                           const PolicyObjective& objective, const double* counts, double factor,
                           const TokensOfLogits& found, const MutableLogits& dlogits,
                           PolicyTotals* totals, void* workspace, Stream stream);

}  // namespace tether::cuda
