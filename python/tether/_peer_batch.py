"""A batch as trainers hand it to a policy loss, and what they say of it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tether.policy import policy_loss

Metrics = dict[str, float]


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
