#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "../../core/parallel.h"
#include "../../logits/rows.h"
#include "gated_mask.h"
#include "policy_loss.h"

namespace tether {

// The policy loss of a batch whose logits exist for some of its tokens at a time: each chunk of
// logits becomes log-probabilities, their part of the loss, and its gradient in place of the
// logits. For objectives at the level of tokens: those of sequences need all log-probabilities
// first.
class ChunkedPolicyLoss {
 public:
  // The batch has no logps and no entropies: they are made here. `arithmetic`: float64 or float32.
  // Throws Error in words that begin with `function` for what policy_loss refuses, and for another
  // level. Refers to the arrays of the batch.
  ChunkedPolicyLoss(std::string_view function, const PolicyArrays& batch, DType arithmetic,
                    const PolicyObjective& objective, const Normalizer& normalizer,
                    const Executor& executor = {});

  // logits [N, V] are those of the tokens at `places`: ascending, i columns + t in a padded batch,
  // the index of the token in a packed one; tokens of weight 0 are left out. With a gradient the
  // logits become it. logps, entropies: [N], what was found; entropies may be null if the objective
  // has no bonus for them.
  void add(const MutableLogits& logits, const int64_t* targets, const int64_t* places,
           const RowOptions& options, bool with_gradient, double* logps, double* entropies);

  // Of the chunks so far.
  const PolicyTotals& totals() const { return totals_; }

 private:
  struct Piece;
  template <class T>
  void add_piece(const Piece& piece, const int64_t* places, const double* logps,
                 const double* entropies, double* dlogps, double* dentropies);

  GatedMask gated_;
  PolicyArrays batch_;
  DType arithmetic_;
  PolicyObjective objective_;
  bool by_row_;
  Normalizer normalizer_;
  Executor executor_;
  PolicyTotals totals_;
};

}  // namespace tether
