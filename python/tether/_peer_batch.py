"""A batch as trainers hand it to a policy loss, what they say of it, and objectives of the user's
choice in their place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tether._catalogue import KNOWN_DIALECTS, Objective
from tether._checks import in_name_of
from tether._functions import FUNCTIONS
from tether._objectives import named, row_of
from tether.policy import policy_loss

Metrics = dict[str, float]


def row_of_choice(function: str, objective: Any) -> Objective:
    """Of an objective by name, of a dialect, or what a Surrogate stands in."""
    dialect = KNOWN_DIALECTS.get(objective) if isinstance(objective, str) else None
    return row_of(function, dialect.objective if dialect else objective, "policy")


def clips(low: Any, high: Any, dual: Any = None) -> dict[str, Any]:
    """A trainer's clips of the ratio, which is never below 0: a low beyond 1 is 1."""
    both = {"epsilon_low": min(low, 1.0), "epsilon_high": high}
    return both if dual is None else {**both, "dual_clip": dual}


def clips_of(row: Objective, clips: dict[str, Any]) -> dict[str, Any]:
    """A trainer's clips, where the objective has such and they are not off."""
    own = row.options
    if "epsilon_low" not in own or own["epsilon_low"].default == 1:
        return {}
    return {name: each for name, each in clips.items() if name in own}


_ARRAYS = {*(each.name for each in FUNCTIONS["policy_loss"].arguments), "offsets", "objective"}


def check_choice(
    function: str, trainer: str, objective: Any, options: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """An objective of the user's choice by name, or a Surrogate, and its options.

    ValueError or TypeError for what policy_loss refuses, and for what is the trainer's.
    """
    objective, options = named(objective, options)
    check_denominators(function, trainer, options)
    for name in options:
        if name in _ARRAYS:
            raise ValueError(f"{function}: {name} must not be given, got it. It is {trainer}'s")
    one = torch.zeros(1, 1)
    arrays = {"old_logps": one, "rollout_logps": one, "token_weights": one}
    tried = {"objective": objective, **arrays, **options}
    in_name_of(function, "policy_loss", lambda: policy_loss(one, one, one.bool(), **tried))
    return objective, dict(options)


def check_denominators(function: str, trainer: str, options: Mapping[str, Any]) -> None:
    for name in ("aggregation", "constant", "normalizer"):
        if name in options:
            raise ValueError(f"{function}: {name} must not be given, got it. It is {trainer}'s")


class Batch(NamedTuple):
    """What a trainer hands to a policy loss, each [B, T]."""

    logps: Tensor
    old_logps: Tensor
    advantages: Tensor
    response_mask: Tensor  # of 0 and 1
    token_weights: Tensor | None = None

    def loss(
        self,
        clamp: tuple[float, float] = (-math.inf, math.inf),
        of_answers: bool = False,
        **settings: Any,
    ) -> tuple[Tensor, Metrics]:
        """policy_loss of it and the metrics by name, where the trainer clamps log-ratios, or their
        means over answers, to these bounds: beyond them its gradient ends."""
        arguments = {**self._asdict(), **settings}
        out = policy_loss(**arguments)
        values = out.metrics.to_dict()
        low, high = (math.exp(each) for each in clamp)
        beyond = values["ratio_min"] < low or values["ratio_max"] > high
        if beyond or (values["nonfinite"] > 0 and (low > 0 or high < math.inf)):
            within = self.within(*clamp, of_answers)
            out = policy_loss(**{**arguments, **within})
            values = out.metrics.to_dict()
        return out.loss, values

    @property
    def log_ratio(self) -> Tensor:
        return self.logps.detach() - self.old_logps

    def mean(self, values: Tensor) -> float:
        """Over tokens; 0 without any."""
        mask = self.response_mask.bool()
        if values.dtype == torch.bool:
            total = (values & mask).sum()
        else:
            total = torch.where(mask, values, 0).sum(dtype=torch.float64)
        return total.item() / max(mask.sum().item(), 1)

    def mean_of_rows(self, values: Tensor) -> Tensor:
        """[B, 1], of each row over its tokens."""
        mask = self.response_mask.bool()
        total = torch.where(mask, values, 0).sum(1, keepdim=True)
        return total / mask.sum(1, keepdim=True).clamp_min(1)

    def within(self, low: float, high: float, of_answers: bool) -> dict[str, Tensor]:
        """Log-ratios beyond the bounds are constants."""
        d = self.log_ratio
        d = self.mean_of_rows(d).expand(d.shape) if of_answers else d
        beyond = (d < low) | (d > high)
        return {
            "logps": torch.where(beyond, d.clamp(low, high), self.logps),
            "old_logps": torch.where(beyond, 0, self.old_logps),
        }
