"""What policy losses are made of, alone: the terms of a penalty, and a mean over terms."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

from tether._checks import Number, check_flags, check_floating, check_given, in_name_of
from tether._lists import Numbers, of_numbers
from tether._ops import once_differentiable
from tether.policy import Normalizer, loss_of, policy_token_losses


def aggregate(
    terms: Tensor,
    response_mask: Tensor,
    aggregation: str = "token_mean",
    *,
    constant: Number = 1.0,
    row_tokens: Numbers | None = None,
    offsets: Numbers | None = None,
    normalizer: Normalizer | None = None,
) -> Tensor:
    """The mean of terms as a policy loss takes it, [].

    terms            [B, T], or packed [N] with offsets: anything of each token, masked slots too
    response_mask    like terms, bool or integers, or weights in [0, 1]
    aggregation      as of policy_loss, with `constant` and `row_tokens`
    normalizer       counts of the optimizer step; None: of this batch

    Differentiable once in terms. A term that is not finite makes the result NaN. It is the loss of
    `reinforce` whose advantages are -1.
    """
    check_given("aggregate: terms", terms)
    check_floating("aggregate: terms", terms)
    terms = once_differentiable("aggregate", terms)
    offsets = of_numbers(offsets, "ids", terms)
    tensors = {
        "logps": terms,
        "advantages": -_of_rows(terms, offsets),
        "response_mask": response_mask,
        "row_tokens": row_tokens,
        "offsets": offsets,
    }
    options = {"aggregation": aggregation, "constant": constant}
    try:
        return loss_of("aggregate", tensors, "reinforce", options, normalizer).loss
    except (ValueError, TypeError, NotImplementedError) as error:
        raise type(error)(re.sub(r"\blogps\b", "terms", str(error))) from None


def kl_terms(
    logps: Tensor,
    ref_logps: Tensor,
    response_mask: Tensor,
    *,
    kl_estimator: str = "k3",
    kl_gradient: str | None = None,
    kl_correction: str = "none",
    kl_ratio_high: Number = math.inf,
    old_logps: Tensor | None = None,
    rollout_logps: Tensor | None = None,
    offsets: Numbers | None = None,
    allow_biased_gradient: bool = False,
) -> Tensor:
    """A one-sample estimate of KL(policy || reference) at each token [nats], like logps.

    logps, ref_logps  [B, T], or packed [N] with offsets [nats]
    response_mask     like logps; 0 in masked slots, whatever they hold
    kl_gradient       whose gradient it has; None: that of kl_estimator. One that follows no KL is
                      refused where logps asks for a gradient, unless allow_biased_gradient
    kl_correction     with the ratio to `old_logps` or `rollout_logps`, as of policy_loss

    float32 (float64 for float64). By torch's operations on every device.
    """
    function = "kl_terms"
    check_given(f"{function}: logps", logps)
    check_given(f"{function}: ref_logps", ref_logps)
    check_floating(f"{function}: logps", logps)
    check_flags(function, allow_biased_gradient=allow_biased_gradient)
    logps = once_differentiable(function, logps)
    offsets = of_numbers(offsets, "ids", logps)
    options = {
        "kl_estimator": kl_estimator,
        "kl_gradient": kl_estimator if kl_gradient is None else kl_gradient,
        "kl_correction": kl_correction,
        "kl_ratio_high": kl_ratio_high,
        "allow_biased_gradient": allow_biased_gradient if logps.requires_grad else True,
    }

    def run():
        return policy_token_losses(
            logps,
            0 * _of_rows(logps, offsets),
            response_mask,
            objective="reinforce",
            beta=1.0,
            old_logps=old_logps,
            ref_logps=ref_logps,
            rollout_logps=rollout_logps,
            offsets=offsets,
            **options,
        )

    return in_name_of(function, "policy_token_losses", run)


def _of_rows(tokens: Tensor, offsets: Tensor | None) -> Tensor:
    """Ones: [rows, 1] of packed ones, which may be as many as tokens."""
    if isinstance(offsets, Tensor) and offsets.dim() == 1 and offsets.numel() > 1:
        return tokens.new_ones(offsets.numel() - 1, 1)
    return torch.ones_like(tokens)
