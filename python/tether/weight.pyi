# Written by tools/typed_stubs.py.
"""Weights of tokens, `weights=` of the policy losses, as frozen dataclasses."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from tether._checks import Number as Number
from tether._typed import Chosen as Chosen

Level: TypeAlias = Literal[
    "token",
    "sequence_mean",
    "sequence_sum",
    "sequence_min",
    "sequence_max",
    "turn_mean",
    "turn_sum",
    "turn_min",
    "turn_max",
]

@dataclass(frozen=True, kw_only=True)
class TokenWeight(Chosen):
    """What all weights have."""

    level: Level = "token"

@dataclass(frozen=True, kw_only=True)
class TruncatedImportance(TokenWeight):
    """clamp(e^x, low, high), x = old_logp - rollout_logp. doi:10.1198/106186008X320456, eq. 4."""

    low: Number = 0
    high: Number = 2

@dataclass(frozen=True, kw_only=True)
class MaskedImportance(TokenWeight):
    """e^x where low <= e^x <= high, else 0. arXiv:2510.18855, eq. 2."""

    low: Number = 0.5
    high: Number = 5

@dataclass(frozen=True, kw_only=True)
class RatioGate(TokenWeight):
    """1 where low <= e^x <= high, else out of the mask. verl, rollout_rs k1."""

    low: Number = 0.5
    high: Number = 2

@dataclass(frozen=True, kw_only=True)
class TvMask(TokenWeight):
    """1 where e^logp - e^old_logp <= high (A > 0), >= -low (A <= 0). arXiv:2602.04879, eq. 13."""

    low: Number = 0.2
    high: Number = 0.2

@dataclass(frozen=True, kw_only=True)
class KlMask(TokenWeight):
    """1 where KL(Bernoulli(e^old_logp) || Bernoulli(e^logp)) <= low or high by sign of A, or
    moving back. arXiv:2602.04879, eq. 14.
    """

    low: Number = 0.05
    high: Number = 0.05

@dataclass(frozen=True, kw_only=True)
class TvBand(TokenWeight):
    """1 where |e^logp - e^old_logp| <= high. prime-rl, ipo."""

    high: Number = 0.1

@dataclass(frozen=True, kw_only=True)
class ClipMask(TokenWeight):
    """1 where PPO's clip leaves a gradient. arXiv:2509.24203."""

    epsilon_low: Number = 0.2
    epsilon_high: Number = 0.2

@dataclass(frozen=True, kw_only=True)
class RingMask(TokenWeight):
    """1 where the ratio is near 1, or far on the wrong side. arXiv:2509.24203."""

    epsilon_low: Number = 0.2
    epsilon_high: Number = 0.2
    far_low: Number = 0.4
    far_high: Number = 0.4

@dataclass(frozen=True, kw_only=True)
class MaskedRatio(TokenWeight):
    """ratio where low <= ratio <= high, else 0. SkyRL, rollout_is."""

    low: Number = 0.5
    high: Number = 2

@dataclass(frozen=True, kw_only=True)
class Vespo(TokenWeight):
    """rho^k e^(lambda (1 - rho)), rho the answer's ratio. arXiv:2602.10693, eq. 20."""

    level: Level = "sequence_sum"
    k_pos: Number = 2
    lambda_pos: Number = 3
    k_neg: Number = 3
    lambda_neg: Number = 2

@dataclass(frozen=True, kw_only=True)
class Opsm(TokenWeight):
    """0 where A < 0 and mean(old_logp - logp) > high, else 1. arXiv:2512.02556."""

    level: Level = "sequence_mean"
    high: Number = 0.5

@dataclass(frozen=True, kw_only=True)
class Uncertainty(TokenWeight):
    """p (1 - p), p = e^logp. arXiv:2508.11408."""

@dataclass(frozen=True, kw_only=True)
class SelfDistillation(TokenWeight):
    """1 - mix + mix clip(e^(sign(A) x), 1 -+ epsilon), x = ref_logp - logp. arXiv:2604.03128."""

    mix: Number = 0.5
    epsilon: Number = 0.2

@dataclass(frozen=True, kw_only=True)
class K2Gate(TokenWeight):
    """1 where x^2 / 2 <= high, else out of the mask. verl, rollout_rs k2."""

    high: Number = 0.5

@dataclass(frozen=True, kw_only=True)
class K3Gate(TokenWeight):
    """1 where e^x - 1 - x <= high, else out of the mask. verl, rollout_rs k3."""

    high: Number = 0.5

@dataclass(frozen=True, kw_only=True)
class TvGate(TokenWeight):
    """1 where |e^old_logp - e^rollout_logp| <= high, else out of the mask. ROLL, OpenRLHF."""

    high: Number = 0.2

@dataclass(frozen=True, kw_only=True)
class BinaryKlGate(TokenWeight):
    """1 where KL(Bernoulli(e^rollout_logp) || Bernoulli(e^old_logp)) <= high, else out of the
    mask. OpenRLHF.
    """

    high: Number = 0.05

@dataclass(frozen=True, kw_only=True)
class RatioTvGate(TokenWeight):
    """1 where mean |min(e^x, 2) - 1| <= high, else out of the mask. after open-instruct."""

    level: Level = "sequence_mean"
    high: Number = 0.2
