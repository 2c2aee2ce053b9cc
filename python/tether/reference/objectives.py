"""Policy objectives: the loss of a token and whether it was clipped, its gradient or its weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tether.reference.numbers import bounded, clamp, exp, minimum, saturate, with_slope
from tether.reference.surrogate import Formula


def ppo_clip(
    logp: Tensor,
    log_ratio: Tensor,
    advantage: Tensor,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    dual_clip: float = math.inf,
) -> tuple[Tensor, Tensor]:
    """-min(ratio A, clip(ratio, 1 - epsilon_low, 1 + epsilon_high) A); A < 0: at most -dual_clip A.

    Schulman et al. 2017, arXiv:1707.06347, eq. 7. Two epsilons: arXiv:2503.14476, eq. 10.
    Dual clip: Ye et al. 2020, arXiv:1912.09729, eq. 5.
    """
    ratio = exp(log_ratio)
    low, high = 1 - epsilon_low, 1 + epsilon_high
    loss = -minimum(ratio * advantage, clamp(ratio, low, high) * advantage)
    loss = torch.where(advantage < 0, minimum(loss, -dual_clip * advantage), loss)
    punished = (advantage < 0) & ((ratio < low) | (ratio > dual_clip))
    return loss, ((advantage > 0) & (ratio > high)) | punished


def reinforce(logp: Tensor, log_ratio: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
    """-A logp. Williams 1992, eq. 4."""
    return -advantage * logp, torch.zeros_like(logp, dtype=torch.bool)


def is_reinforce(
    logp: Tensor,
    log_ratio: Tensor,
    advantage: Tensor,
    *,
    ratio_low: float = 0,
    ratio_high: float = 5,
) -> tuple[Tensor, Tensor]:
    """-sg(clip(ratio, ratio_low, ratio_high)) A logp. CISPO, arXiv:2506.13585, eq. 4."""
    ratio = exp(log_ratio)
    weight = clamp(ratio, ratio_low, ratio_high).detach()
    return -weight * advantage * logp, (ratio < ratio_low) | (ratio > ratio_high) | (weight == 0)


def soft_gate(
    logp: Tensor,
    log_ratio: Tensor,
    advantage: Tensor,
    *,
    tau_pos: float = 1,
    tau_neg: float = 1.05,
) -> tuple[Tensor, Tensor]:
    """-(4 / tau) sigmoid(tau (ratio - 1)) A, tau_pos where A > 0. SAPO, arXiv:2511.20347, eq. 5.

    The gate by its logarithm: torch's derivative of sigmoid cancels where the gate is near 1.
    """
    zeros = torch.zeros_like(advantage)  # where() takes numbers as float32
    tau = torch.where(advantage > 0, zeros + tau_pos, zeros + tau_neg)
    x = tau * (exp(log_ratio) - 1)
    gate = torch.exp(torch.nn.functional.logsigmoid(x))
    return -4 / tau * gate * advantage, gate.detach() * torch.sigmoid(-x.detach()) == 0


def quadratic_bound(
    logp: Tensor,
    log_ratio: Tensor,
    advantage: Tensor,
    *,
    epsilon: float = 0.2,
    power: float = 0,
) -> tuple[Tensor, Tensor]:
    """-ratio A + w (ratio - 1)^2 / (2 epsilon), w = |A| times the old probability to the power.

    CFPO, arXiv:2601.22801, eq. 7; with power 1 DRPO, arXiv:2606.09821, eq. 8.
    """
    w = bounded(advantage.abs() * exp(power * (logp - log_ratio).detach().clamp_max(0)))
    ratio, away = exp(log_ratio.detach()), torch.expm1(saturate(log_ratio.detach(), below=False))
    loss = w * away * away / (2 * epsilon) - ratio * advantage
    # By hand: torch has expm1 + 1 for the slope of expm1, which loses the digits of small ratios,
    # and a square that overflows is bounded before a weight of 0 meets its slope.
    slope = bounded(ratio * (w * away / epsilon - advantage))
    return with_slope(loss, slope, log_ratio), torch.zeros_like(logp, dtype=torch.bool)


def linear_ratio(logp: Tensor, log_ratio: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
    """-ratio A. arXiv:1707.06347, eq. 6."""
    return -exp(log_ratio) * advantage, torch.zeros_like(logp, dtype=torch.bool)


def band_clip(
    logp: Tensor,
    log_ratio: Tensor,
    advantage: Tensor,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
) -> tuple[Tensor, Tensor]:
    """-clip(ratio, 1 - epsilon_low, 1 + epsilon_high) A. torchrl's CISPOLoss."""
    ratio = exp(log_ratio)
    low, high = 1 - epsilon_low, 1 + epsilon_high
    return -clamp(ratio, low, high) * advantage, (ratio < low) | (ratio > high)


def quadratic_pull(
    logp: Tensor, log_ratio: Tensor, advantage: Tensor, *, tau: float = 0.1
) -> tuple[Tensor, Tensor]:
    """-(A logp - tau/2 u^2), u = logp - old_logp. DRO, arXiv:2405.19107, eq. 8."""
    loss = log_ratio * log_ratio * (tau / 2) - advantage * logp
    return loss, -advantage + tau * log_ratio.detach() == 0


def squared_regression(
    logp: Tensor, log_ratio: Tensor, advantage: Tensor, *, scale: float = 1, eta: float = 1
) -> tuple[Tensor, Tensor]:
    """(scale u - eta A)^2, u = logp - old_logp. SPPO, arXiv:2405.00675; A*-PO, arXiv:2505.20686."""
    error = log_ratio * scale - advantage * eta
    return error * error, (scale * error.detach()) == 0


def tapered_reinforce(
    logp: Tensor,
    log_ratio: Tensor,
    advantage: Tensor,
    *,
    weight_pos: float = 1,
    weight_neg: float = 1,
    ratio_high: float = 1,
) -> tuple[Tensor, Tensor]:
    """-A logp, for A < 0 of weight sg(min(ratio, ratio_high)). TOPR, arXiv:2503.14286."""
    tapered = clamp(exp(log_ratio), -math.inf, ratio_high).detach() * weight_neg
    weight = torch.where(advantage < 0, tapered, 0 * tapered + weight_pos)
    return -(weight * logp) * advantage, weight == 0


class Row(NamedTuple):
    surrogate: Callable[..., tuple[Tensor, Tensor]] | Formula
    surrogate_options: dict[str, float]
    beta: float
    aggregation: str
    level: str = "token"
    log_ratio_clip: float = math.inf
    weights: dict[str, float | str] | None = None  # as on the wire, as is the penalty
    kl: dict[str, float | str] | None = None


_PPO = {"epsilon_low": 0.2, "epsilon_high": 0.2, "dual_clip": math.inf}

_OFF = _PPO | {"epsilon_low": 1.0, "epsilon_high": math.inf}

_TIGHT = _PPO | {"epsilon_low": 3e-4, "epsilon_high": 4e-4}

_CUT = {"ratio_low": 0, "ratio_high": 20}

_ANSWERS = ("sequence_mean_token_mean", "sequence_sum")

OBJECTIVES = {
    # arXiv:1707.06347, eq. 7
    "ppo": Row(ppo_clip, _PPO, 0, "token_mean"),
    # arXiv:1912.09729, eq. 5
    "ppo_dual_clip": Row(ppo_clip, _PPO | {"dual_clip": 3}, 0, "token_mean"),
    # arXiv:2402.03300, eq. 3: the clipped surrogate + beta k3 of KL(policy || reference)
    "grpo": Row(ppo_clip, _PPO, 0, "sequence_mean_token_mean"),
    # arXiv:2503.14476, eq. 10 and 12
    "dapo": Row(ppo_clip, _PPO | {"epsilon_high": 0.28}, 0, "token_mean"),
    # TRL's loss_type
    "bnpo": Row(ppo_clip, _PPO, 0, "token_mean"),
    # arXiv:2503.20783, section 3.2
    "dr_grpo": Row(ppo_clip, _PPO, 0, "sequence_sum_over_constant"),
    # arXiv:2507.18071, eq. 5 and 13
    "gspo": Row(ppo_clip, _TIGHT, 0, "sequence_mean_token_mean", "sequence_mean"),
    "gspo_token": Row(ppo_clip, _TIGHT, 0, "sequence_mean_token_mean", "sequence_token"),
    # arXiv:2507.20673, eq. 4
    "gmpo": Row(ppo_clip, _OFF, 0, "sequence_mean_token_mean", "sequence_mean", 0.4),
    # arXiv:2506.13585, eq. 4
    "cispo": Row(is_reinforce, {"ratio_low": 0, "ratio_high": 5}, 0, "token_mean"),
    # arXiv:2402.14740, eq. 6
    "rloo": Row(ppo_clip, _PPO, 0, "sequence_mean_token_mean", "sequence_sum"),
    # Williams 1992, eq. 4
    "reinforce": Row(reinforce, {}, 0, "token_mean"),
    # arXiv:2511.20347, eq. 5
    "sapo": Row(soft_gate, {"tau_pos": 1, "tau_neg": 1.05}, 0, "sequence_mean_token_mean"),
    # arXiv:2601.22801, eq. 7
    "cfpo": Row(quadratic_bound, {"epsilon": 0.2, "power": 0}, 0, "sequence_mean_token_mean"),
    # arXiv:2606.09821, eq. 8
    "drpo": Row(quadratic_bound, {"epsilon": 12.5, "power": 1}, 0, "token_mean"),
    # arXiv:2602.05261, eq. 7
    "luspo": Row(ppo_clip, _TIGHT, 0, "sequence_mean_token_sum", "sequence_mean"),
    # arXiv:2504.02546
    "gpg": Row(reinforce, {}, 0, "token_mean"),
    # arXiv:1707.06347, eq. 6
    "linear": Row(linear_ratio, {}, 0, "token_mean"),
    # torchrl's CISPOLoss
    "band": Row(band_clip, {"epsilon_low": 0.2, "epsilon_high": 0.2}, 0, "token_mean"),
    # arXiv:2405.19107, eq. 8
    "dro": Row(quadratic_pull, {"tau": 0.1}, 0, "token_mean"),
    # arXiv:2501.12599, eq. 3
    "kimi": Row(quadratic_pull, {"tau": 0.1}, 0, "sequence_mean_token_mean", "sequence_sum"),
    # arXiv:2405.00675, eq. 4.6
    "sppo": Row(squared_regression, {"scale": 1, "eta": 1}, 0, *_ANSWERS),
    # arXiv:2505.20686
    "a2po": Row(squared_regression, {"scale": 1e-3, "eta": 1}, 0, *_ANSWERS),
    # arXiv:2503.14286
    "topr": Row(
        tapered_reinforce, {"weight_pos": 1, "weight_neg": 1, "ratio_high": 1}, 0, *_ANSWERS
    ),
    # arXiv:2602.04879, eq. 12
    "dppo_tv": Row(is_reinforce, _CUT, 0, "token_mean", weights={"tv_mask": "token"}),
    "dppo_kl": Row(is_reinforce, _CUT, 0, "token_mean", weights={"kl_mask": "token"}),
    # arXiv:2602.10693, eq. 20
    "vespo": Row(reinforce, {}, 0, "token_mean", weights={"vespo": "sequence_sum"}),
    # arXiv:2110.00641
    "decoupled_ppo": Row(
        ppo_clip,
        _PPO,
        0,
        "token_mean",
        weights={"truncated_importance": "token", "truncated_importance.high": math.inf},
    ),
    # SkyRL's rollout_is
    "rollout_is": Row(reinforce, {}, 0, "token_mean", weights={"masked_ratio": "token"}),
    # arXiv:2505.22617, eq. 14
    "kl_cov": Row(
        linear_ratio,
        {},
        1,
        "token_mean",
        kl={"kl_estimator": "abs", "kl_gradient": "abs", "kl_reference": "old"},
    ),
    # arXiv:2509.24203
    "rec_one_side": Row(reinforce, {}, 0, "token_mean", weights={"clip_mask": "token"}),
    "rec_two_side": Row(
        reinforce,
        {},
        0,
        "token_mean",
        weights={"ring_mask": "token", "ring_mask.far_low": 1, "ring_mask.far_high": math.inf},
    ),
    "rec_ring": Row(reinforce, {}, 0, "token_mean", weights={"ring_mask": "token"}),
}
