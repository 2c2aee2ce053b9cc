"""The loss of a value head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tether._checks import savable
from tether.reference.numbers import (
    LARGEST_INPUT,
    Number,
    clamp,
    maximum,
    minimum,
    narrowed,
    saturated,
    spoil_of,
    wide_dtype,
    with_gradient_of,
    with_slope,
    within,
)
from tether.reference.rows import Rows, of_loss, row_factors

# Of a value, the value at the start of the step and the return: the loss, and its slope by the
# value.


def clipped_squared(
    value: Tensor, old_value: Tensor, target: Tensor, *, clip_range: Number = 0.2
) -> tuple[Tensor, Tensor]:
    """1/2 max((V - R)^2, (clip(V, V_old - clip_range, V_old + clip_range) - R)^2). OpenAI, ppo2."""
    inside = minimum(maximum(value, old_value - clip_range), old_value + clip_range)
    error, clipped = value - target, inside - target
    stuck = (clipped.square() > error.square()) & (inside != value)
    return 0.5 * maximum(error.square(), clipped.square()), torch.where(stuck, 0.0, error)


def huber(
    value: Tensor, old_value: Tensor, target: Tensor, *, delta: Number = 1.0
) -> tuple[Tensor, Tensor]:
    """1/2 e^2, and delta (|e| - delta / 2) beyond delta; e = V - R. Huber 1964."""
    error = value - target
    inside = clamp(error, -delta, delta)
    return inside * (error - 0.5 * inside), inside


class ValueRow(NamedTuple):
    loss: Callable[..., tuple[Tensor, Tensor]]
    options: dict[str, float]


VALUES = {
    "clipped_squared": ValueRow(clipped_squared, {"clip_range": 0.2}),
    "huber": ValueRow(huber, {"delta": 1.0}),
}


class ValueTotals(NamedTuple):
    loss: Tensor
    sums: Tensor  # [9], in the order of ValueMetrics (rl/value_metrics.h)


def value_loss(
    values: Tensor,
    returns: Tensor,
    response_mask: Tensor,
    *,
    objective: str = "clipped_squared",
    old_values: Tensor | None = None,
    offsets: Tensor | None = None,
    aggregation: str = "token_mean",
    constant: Number = 1,
    normalizer: Any = None,
    **options: Number,
) -> ValueTotals:
    """Agg[ loss ], as tether.value_loss."""
    rows, wide = Rows.of("value_loss", "values", values, offsets), wide_dtype(values.dtype)
    weight = rows.weights(response_mask, wide)
    active = weight != 0

    def selected(tensor):
        return saturated(torch.where(active, tensor.to(wide), 0.0), LARGEST_INPUT[wide])

    value, target = selected(values), selected(returns)
    old = value.detach() if old_values is None else selected(old_values)
    row = VALUES[objective]
    options = row.options | {name: savable(each) for name, each in options.items()}
    each, slope = row.loss(value.detach(), old, target, **options)
    sound = value.isfinite() & target.isfinite() & old.isfinite()
    each = with_slope(each, slope, value) + spoil_of(sound, value)
    n = rows.sum(weight.double())
    tokens, sequences, world_size = None, None, 1
    if normalizer is not None:
        tokens, sequences = normalizer.policy, normalizer.sequences
        world_size = normalizer.factor
    factors = row_factors(aggregation, n, constant=constant, tokens=tokens, sequences=sequences)
    factors = rows.spread(of_loss(factors, world_size))
    terms = within(factors * (weight.double() * each.double())).sum()
    slopes = (within(factors, wide) * weight * each).sum()
    loss = narrowed(with_gradient_of(terms, slopes.double()), wide)
    with torch.no_grad():
        weight = weight.double()
        target, error = (x + 0 * x for x in (target.double(), (target - value).double()))
        parts = (
            torch.ones_like(weight),
            each.double(),
            ((slope == 0) & (each > 0)).double(),
            target,
            target.square(),
            error,
            error.square(),
            *(_deviations(each, weight).square() for each in (target, error)),
        )
        sums = torch.stack([(weight * part).sum() for part in parts])
    return ValueTotals(loss, sums)


def _deviations(x: Tensor, weight: Tensor) -> Tensor:
    """From the mean."""
    n = weight.sum()
    return torch.where(n == 0, 0.0, x - (weight * x).sum() / n)
