"""The loss of a value head: value, gradient and metrics in one pass."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from tether import reference
from tether._functions import FUNCTIONS
from tether._ops import has_kernel, ops
from tether.policy import Normalizer, denominators, of_denominators


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


_METRIC_NAMES = tuple(ops.metric_names("value"))


class ValueLoss(NamedTuple):
    loss: Tensor  # scalar: float32, or float64 with values
    metrics: ValueMetrics  # constants


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
    returns        like values: what `tether.advantage` gives
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
    tensors = {
        "values": values,
        "returns": returns,
        "response_mask": response_mask,
        "old_values": old_values,
        "offsets": offsets,
    }
    settings = {"clip_range": clip_range, "aggregation": aggregation, "constant": constant}
    call = FUNCTIONS[function].call(tensors, settings)
    counts = denominators(function, normalizer)
    if not has_kernel(values):
        out = reference.value_loss(
            **call.once_differentiable(function),
            normalizer=of_denominators(counts),
            **call.named_settings(),
        )
        return ValueLoss(out.loss, ValueMetrics(out.sums))
    loss, _, sums = call.with_numbers(counts).run_with_gradient()
    return ValueLoss(loss, ValueMetrics(sums))
