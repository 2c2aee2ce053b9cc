"""The loss of a value head."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tether.reference.numbers import maximum, minimum, saturated, spoil_of, wide_dtype
from tether.reference.rows import Rows, row_factors


class ValueTotals(NamedTuple):
    loss: Tensor
    sums: Tensor  # [7], in the order of ValueMetrics (rl/value_metrics.h)


def value_loss(
    values: Tensor,
    returns: Tensor,
    response_mask: Tensor,
    *,
    old_values: Tensor | None = None,
    offsets: Tensor | None = None,
    clip_range: float = 0.2,
    aggregation: str = "token_mean",
    constant: float = 1,
    normalizer: Any = None,
) -> ValueTotals:
    """Agg[ 1/2 max((V - R)^2, (clip(V, V_old - clip_range, V_old + clip_range) - R)^2) ]."""
    rows, wide = Rows.of("value_loss", "values", values, offsets), wide_dtype(values.dtype)
    weight = rows.weights(response_mask, wide)
    active = weight != 0

    def selected(tensor):
        return saturated(torch.where(active, tensor.to(wide), 0.0), largest)

    largest = 1e140 if wide == torch.float64 else 1e18  # its square stays finite
    value, target = selected(values), selected(returns)
    old = value.detach() if old_values is None else selected(old_values)
    inside = minimum(maximum(value, old - clip_range), old + clip_range)
    plain, clipped = (value - target).square(), (inside - target).square()
    each = 0.5 * maximum(plain, clipped)
    each = each + spoil_of(value.isfinite() & target.isfinite() & old.isfinite(), value)
    n = rows.sum(weight.double())
    tokens, sequences, world_size = None, None, 1
    if normalizer is not None:
        tokens, sequences = normalizer.policy, normalizer.sequences
        world_size = normalizer.factor
    factors = row_factors(aggregation, n, constant=constant, tokens=tokens, sequences=sequences)
    loss = world_size * (rows.spread(factors.to(wide)) * weight * each).sum()
    with torch.no_grad():
        parts = (
            torch.ones_like(each),
            each,
            (clipped > plain).to(wide),
            target,
            target.square(),
            target - value,
            (target - value).square(),
        )
        sums = torch.stack([(weight * part).double().sum() for part in parts])
    return ValueTotals(loss, sums)
