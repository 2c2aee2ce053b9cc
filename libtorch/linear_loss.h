#pragma once

#include <ATen/core/Tensor.h>

#include "linear_token_logps.h"
#include "policy_loss.h"
#include "preference_loss.h"

namespace tether {

struct LinearPolicyOutput {
  at::Tensor loss;
  PolicyMetricTensors metrics;
  at::Tensor logps;      // like targets, constants; 0 where the mask is 0
  at::Tensor entropies;  // the same, where the objective or the options ask for them
};

// policy_loss(linear_token_logps(hidden, head, targets)), without the logits of all tokens.
//
// hidden [B, T, H], or packed [N, H]; targets [B, T] or [N]. The batch is that of policy_loss but
// for logps and entropies, which are made here and must be absent. Positions with mask 0 are not
// multiplied, whatever they, their targets and their hidden states hold. Gradients: hidden, weight,
// bias.
//
// Where the ratio is that of a token, loss and gradients come in one sweep over chunks of tokens:
// three matrix products, backward is a scaling. Ratios of sequences need the log-probabilities of
// all tokens first: backward makes the logits again, four products, unless they are one chunk.
// Memory, and what is other on CUDA, as linear_token_logps.
LinearPolicyOutput linear_policy_loss(const at::Tensor& hidden, const LinearHead& head,
                                      const at::Tensor& targets, const PolicyBatch& batch,
                                      const PolicyObjective& objective,
                                      const Normalizer& normalizer = {},
                                      const LinearOptions& options = {});

// preference_loss(linear_token_logps(hidden, head, targets)): four matrix products, as a pair needs
// the log-probabilities of both answers first, or three where they are one chunk. hidden [2 B, T,
// H] or [N, H]; logps of the batch must be absent.
PreferenceOutput linear_preference_loss(const at::Tensor& hidden, const LinearHead& head,
                                        const at::Tensor& targets, const PreferenceBatch& batch,
                                        const PreferenceObjective& objective,
                                        const PairNormalizer& normalizer = {},
                                        const LinearOptions& options = {});

}  // namespace tether
