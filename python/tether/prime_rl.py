"""tether's losses as prime-rl 0.8.0 calls a custom one.

    [trainer.loss]
    type = "custom"
    import_path = "tether.prime_rl.default_loss"  # or ipo_loss, policy_loss
    kwargs = { kl_tau = 1e-3 }

`default_loss` and `ipo_loss` are prime-rl's own by their settings; `policy_loss` is any objective
of `tether.objectives()`. Each is given one sequence and gives the sum over its tokens, which
prime-rl divides by those of the step. `import tether` alone never imports prime-rl.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tether import policy, reference
from tether._peer_batch import check_denominators
from tether._trainers import check_version, module_of

__all__ = ["default_loss", "ipo_loss", "policy_loss"]

_prime_rl = module_of("prime_rl", "prime_rl.trainer.rl.loss")
LossInputs, LossOutputs = _prime_rl.LossInputs, _prime_rl.LossOutputs
_METRICS = (
    "approx_kl_k1",
    "approx_kl_k3",
    "clip_fraction_dual",
    "clip_fraction_high",
    "clip_fraction_low",
    "ratio_mean",
    "weight_mean",
    "weight_zero_fraction",
)


def policy_loss(inputs: LossInputs, *, objective: str, **options: Any) -> LossOutputs:
    """An objective of tether with its options, choices and `weights`, as of tether.policy_loss.

    The engine's log-probabilities are old_logps and rollout_logps. The metrics are tether's, means
    over the sequence. Raises ValueError or TypeError for what policy_loss refuses, and for
    denominators, which are prime-rl's.
    """
    check_version("prime_rl")
    check_denominators("tether.prime_rl.policy_loss", "prime-rl", options)
    out = _loss(inputs, inputs.advantages, objective=objective, **options)
    values, like = out.metrics.to_dict(), out.loss.detach()
    return LossOutputs(out.loss, {name: like.new_tensor(values[name]) for name in _METRICS})


def default_loss(
    inputs: LossInputs,
    *,
    dppo_mask_low: float = 0.2,
    dppo_mask_high: float = 0.2,
    adv_tau: float = 1.0,
    kl_tau: float = 1e-3,
) -> LossOutputs:
    """prime-rl's loss of type "default", and its metrics."""
    check_version("prime_rl")
    bounds = {"low": dppo_mask_low, "high": dppo_mask_high}
    out = _loss(
        inputs,
        adv_tau * inputs.advantages,
        objective="prime_rl.default",
        weights={"tv_mask": bounds},
        beta=2 * kl_tau,
    )
    moved, good = _moved(inputs), inputs.advantages > 0
    above, below = moved > dppo_mask_high, moved < -dppo_mask_low
    masked = torch.where(good, above, below)
    bad, dropped = inputs.advantages < 0, inputs.loss_mask & masked
    shown = {
        "is_masked_low": _mean(bad & below, inputs.loss_mask),
        "is_masked_high": _mean(good & above, inputs.loss_mask),
        "masked_advantage_positive": _mean(good, dropped),
        "masked_advantage_negative": _mean(bad, dropped),
    }
    return LossOutputs(out.loss, {**_shown(inputs, masked), **shown})


def ipo_loss(
    inputs: LossInputs, *, ipo_threshold: float = 0.1, adv_tau: float = 1.0, kl_tau: float = 1e-3
) -> LossOutputs:
    """prime-rl's loss of type "ipo", and its metrics."""
    check_version("prime_rl")
    out = _loss(
        inputs,
        adv_tau * inputs.advantages,
        objective="prime_rl.ipo",
        weights={"tv_band": {"high": ipo_threshold}},
        beta=2 * kl_tau,
    )
    return LossOutputs(out.loss, _shown(inputs, _moved(inputs).abs() > ipo_threshold))


def _loss(inputs: LossInputs, advantages: Tensor, **settings: Any) -> policy.PolicyLoss:
    """The sum over tokens of one sequence, [T]; its weights are of surrogate and penalty."""
    rows = {
        "logps": inputs.trainer_logprobs,
        "advantages": advantages,
        "response_mask": inputs.loss_mask,
        "old_logps": inputs.inference_logprobs,
        "rollout_logps": inputs.inference_logprobs,
        "ref_logps": inputs.ref_logprobs,
        "token_weights": inputs.loss_weights,
        "kl_weights": inputs.loss_weights,
    }
    rows = {name: None if row is None else row[None] for name, row in rows.items()}
    return policy.policy_loss(**rows, aggregation="token_sum", **settings)


# ---- prime-rl's metrics --------------------------------------------------------------------------


def _moved(inputs: LossInputs) -> Tensor:
    return inputs.trainer_logprobs.detach().exp() - inputs.inference_logprobs.exp()


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """0 without a token."""
    return torch.where(mask, values, 0).sum() / mask.sum().clamp_min(1)


def _shown(inputs: LossInputs, masked: Tensor) -> dict[str, Tensor]:
    mask = inputs.loss_mask
    mismatch = reference.k3(inputs.trainer_logprobs.detach() - inputs.inference_logprobs)
    return {
        "masked_mismatch_kl": _mean(mismatch, mask & masked),
        "unmasked_mismatch_kl": _mean(mismatch, mask & ~masked),
        "is_masked": _mean(masked, mask),
    }
