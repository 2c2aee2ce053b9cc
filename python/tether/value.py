"""The loss of a value head: value, gradient and metrics in one pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tether import reference
from tether._checks import (
    check_constants,
    check_no_tangents,
    check_numbers,
    check_offsets,
    check_rows,
    check_strings,
    checked_mask,
)
from tether._objectives import ABSENT, packed
from tether._ops import ops, register_scaled
from tether.policy import Normalizer, check_counts, checked_normalizer

_SUMS = 7  # ValueMetrics::kSums


class ValueMetrics(NamedTuple):
    """What a training loop logs, as one block: add, or all-reduce, over micro-batches and ranks."""

    sums: Tensor  # [7] float64

    def merge(self, other: ValueMetrics) -> ValueMetrics:
        """Of the micro-batches of both."""
        return ValueMetrics(self.sums + other.sums)

    def to_dict(self) -> dict[str, float]:
        """value_loss, value_clip_fraction, explained_variance: means over tokens."""
        values = ops.value_metrics(self.sums.cpu())
        return dict(zip(_METRIC_NAMES, values.tolist(), strict=True))


_METRIC_NAMES = tuple(ops.value_metric_names())


class ValueLoss(NamedTuple):
    loss: Tensor  # scalar: float32, or float64 with values
    metrics: ValueMetrics  # constants


@torch.library.register_fake("tether::value_loss_forward")
def _(values, *arguments):
    with_gradient = arguments[-1]
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    stored = torch.float32 if values.dtype == torch.float16 else values.dtype
    shape = values.shape if with_gradient else (0,)
    return (
        values.new_empty((), dtype=wide),
        values.new_empty(shape, dtype=stored if with_gradient else values.dtype),
        values.new_empty((_SUMS,), dtype=torch.float64),
    )


register_scaled("value_loss", "value_loss_forward", arguments=10)


def value_loss(
    values: Tensor,
    returns: Tensor,
    response_mask: Tensor,
    *,
    old_values: Tensor | None = None,
    offsets: Tensor | None = None,
    clip_range: float = 0.2,
    aggregation: str = "token_mean",
    constant: float = 1.0,
    normalizer: Normalizer | None = None,
) -> ValueLoss:
    """Agg[ 1/2 max((V - R)^2, (clip(V, V_old - clip_range, V_old + clip_range) - R)^2) ].

    values         [B, T], or packed [N] with offsets; float32, float64, bfloat16 or float16, of any
                   strides; differentiable once
    returns        like values: what generalized_advantage_estimation gives
    response_mask  like values: bool, or weights in [0, 1]; slots of weight 0 may hold anything
    old_values     like values, at the start of the step; None: nothing is clipped
    offsets        [B + 1] int32 or int64, from 0 to N
    clip_range     at least 0; inf: off
    aggregation    token_mean, sequence_mean_token_mean, sequence_mean_token_sum or
                   sequence_sum_over_constant, with `constant`, or token_sum
    normalizer     counts of the optimizer step; None: of this batch

    On the CPU a fused kernel, else `tether.reference`. Raises ValueError or TypeError before any
    work is done.
    """
    function = "value_loss"
    check_rows(function, "values", values, offsets)
    check_offsets(function, offsets, "values", values)
    check_constants(function, "values", values, returns=returns)
    if old_values is not None:
        check_constants(function, "values", values, old_values=old_values)
    response_mask = checked_mask(function, response_mask, values, "values")
    counts = checked_normalizer(function, normalizer) or Normalizer()
    check_numbers(function, clip_range=clip_range, constant=constant)
    check_strings(function, aggregation=aggregation)
    if values.device.type != "cpu":
        if not torch.compiler.is_compiling():
            ops.value_check(float(clip_range), aggregation, float(constant))
        check_counts(function, counts)
        out = reference.value_loss(
            values,
            returns,
            response_mask,
            old_values=old_values,
            offsets=offsets,
            clip_range=clip_range,
            aggregation=aggregation,
            constant=constant,
            normalizer=counts,
        )
        return ValueLoss(out.loss, ValueMetrics(out.sums))
    check_no_tangents(function, values=values)
    given = [ABSENT if each is None else each for each in (counts.policy, counts.sequences)]
    loss, _, sums = ops.value_loss_forward(
        values,
        returns,
        response_mask,
        old_values,
        offsets,
        float(clip_range),
        aggregation,
        float(constant),
        packed([*given, counts.world_size, counts.scale]),
        torch.is_grad_enabled() and values.requires_grad,
    )
    return ValueLoss(loss, ValueMetrics(sums))
