#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "categorical_kl.h"
#include "linear_types.h"
#include "token_logps_types.h"

namespace tether {

// The sets of ids that a sampler kept at each token: top-k, top-p, min-p. An engine draws from the
// softmax over these ids; the log-probability over the whole vocabulary is another number, off by
// the mass that was cut away.
struct Support {
  at::Tensor ids;       // [..., K] int64, in descending order, padded with -1
  at::Tensor position;  // like targets: where the target is among them; -100: nothing to find there
  at::Tensor whole;     // like targets, bool: no set was given, the whole vocabulary counts
  at::Tensor added;     // like targets, bool: the set lacked the target

  // [..., K]: the logits of the kept ids, -inf behind them. Differentiable.
  at::Tensor gather(const at::Tensor& logits) const;
};

// targets [...]: int32 or int64, the sampled ids, or ignore_index. token_ids: int32 or int64, in
// any order, of which one that is there twice counts once: [..., K] padded with -1; or, with
// offsets [N + 1] from 0 to M, [M]: the ids of one token after the other, as vLLM returns them.
//
// A target that its set lacks, by rounding at the engine's edge, is added to it. A token without
// any id has the whole vocabulary. All sets are padded to the longest of the batch. On any device;
// the ids are looked at, which waits for it.
Support support(const at::Tensor& targets, const at::Tensor& token_ids,
                const at::Tensor& offsets = {}, int64_t ignore_index = -100);

// token_logps and linear_token_logps with the softmax over the kept ids, and so with what is
// returned beside; others are not read and get no gradient. Of the head only the kept rows are
// multiplied while the sets are small, up to V / 128 ids, unless rows_per_chunk is given; of larger
// ones all logits of a chunk, and without kernels for their device of all tokens at once. The
// support is of these targets, of which more may be ignored; kernels for CUDA (docs/cuda.md) do not
// wait to look: a set of another target gives NaN for its row.
TokenLogps token_logps(const at::Tensor& logits, const at::Tensor& targets,
                       const TokenLogpsOptions& options, const Support& support);
TokenLogps linear_token_logps(const at::Tensor& hidden, const LinearHead& head,
                              const at::Tensor& targets, const LinearOptions& options,
                              const Support& support);

// categorical_kl of the softmaxes over the kept ids, the added ones too; others are not read and
// get no gradient. Positions whose target was ignored count as masked.
CategoricalKl categorical_kl(const at::Tensor& q_logits, const at::Tensor& p_logits,
                             const CategoricalKlOptions& options, const Support& support);

namespace detail {

// The path of devices without a kernel; every position has a mask, and ids below V.
CategoricalKl categorical_kl_any_device(const at::Tensor& q_logits, const at::Tensor& p_logits,
                                        const CategoricalKlOptions& options,
                                        const Support& support);

}  // namespace detail

}  // namespace tether
