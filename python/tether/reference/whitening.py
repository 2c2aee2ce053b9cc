"""Moments of the values at active slots, and values of variance 1. Nothing waits for a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tether.reference.numbers import LARGEST_INPUT, Number, first_of, saturated


def _counted(values: Tensor) -> Tensor:
    """A finite value beyond 1e140 counts as that, whose square is a number."""
    return saturated(values.double(), LARGEST_INPUT[torch.float64])


def moments(values: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and sum of squared deviations, in float64; weights count."""
    weight = response_mask.double().reshape(-1)
    active = weight != 0
    # Deviations from the first active value: those of equal ones are exactly 0.
    x = torch.where(active, _counted(values).reshape(-1), 0.0)
    first = first_of(x, active)
    gap = torch.where(active, x - first, 0.0)
    count = weight.sum()
    shift = (weight * gap).sum() / torch.where(count == 0, 1.0, count)
    squares = (weight * (gap - shift).square()).sum()
    return count, torch.where(count == 0, 0.0, first[0] + shift), squares


def whiten(
    values: Tensor,
    response_mask: Tensor,
    *,
    step: Sequence[Number] | None = None,
    epsilon: Number = 1e-8,
    shift_mean: bool = True,
) -> Tensor:
    """(x - mean) / sqrt(variance + epsilon) at active slots [+ mean], variance with N - 1. With the
    moments of a step, or those of the values; equal ones give exactly 0."""
    active = response_mask != 0
    if step is None:
        step = moments(values, response_mask)
    wide = torch.zeros((), dtype=torch.float64, device=values.device)
    count, mean, squares = (wide + each for each in step)
    variance = torch.where(count > 1, squares / (count - 1).clamp_min(0), 0.0)
    gap = torch.where(active, _counted(values), 0.0) - mean
    out = torch.where(variance == 0, 0 * gap, gap / torch.sqrt(variance + epsilon))
    return torch.where(active, out if shift_mean else out + mean, 0.0).to(values.dtype)
