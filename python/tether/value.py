"""The loss of a value head: value, gradient and metrics in one pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tether import _cuda, reference
from tether._checks import check_merged
from tether._lists import Numbers, Value
from tether._objectives import objective_call
from tether._ops import has_kernel, ops
from tether.objective import ValueObjective
from tether.policy import Normalizer, denominators, of_denominators


class ValueMetrics(NamedTuple):
    """What a training loop logs, as one block: add over micro-batches, all-reduce over ranks."""

    sums: Tensor  # [9] float64

    def merge(self, other: ValueMetrics) -> ValueMetrics:
        """Of the micro-batches of both. `sums` added up instead are the same but where a mean is
        a million times larger than what varies: what means of batches vary by is lost there."""
        check_merged(self, other)
        both = torch.stack([self.sums, other.sums])
        n, total = both[:, 0], both.sum(0)
        gap = (both[1] / n[1] - both[0] / n[0])[3:6:2]  # of the means of returns and errors
        between = torch.where((n > 0).all(), gap.square() * n[0] * (n[1] / total[0]), 0.0)
        return ValueMetrics(torch.cat([total[:-2], total[-2:] + between]))

    def __add__(self, other: ValueMetrics) -> ValueMetrics:
        return self.merge(other) if isinstance(other, ValueMetrics) else NotImplemented

    def __radd__(self, other: int):
        """So that sum() works, which starts at 0."""
        return self if other == 0 else NotImplemented

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
    objective: str | ValueObjective = "clipped_squared",
    old_values: Tensor | None = None,
    offsets: Numbers | None = None,
    normalizer: Normalizer | None = None,
    **options: Value,
) -> ValueLoss:
    """The loss of a value head, by default
    Agg[ 1/2 max((V - R)^2, (clip(V, V_old - clip_range, V_old + clip_range) - R)^2) ].

    values         [B, T], or packed [N] with offsets; float32, float64, bfloat16 or float16, of any
                   strides; differentiable once
    returns        like values: what `tether.advantage` gives
    response_mask  like values: bool, or weights in [0, 1]; slots of weight 0 may hold anything
    objective      a row of `objectives("value")`, which also lists options and defaults, or one of
                   `tether.objective`
    old_values     like values, at the start of the step; None: nothing is clipped
    offsets        [B + 1] int32 or int64, from 0 to N
    normalizer     counts of the optimizer step; None: of this batch
    options        as clip_range=0.5, inf is off; aggregation="token_mean",
                   "sequence_mean_token_mean", "sequence_mean_token_sum", "token_sum" or
                   "sequence_sum_over_constant", with `constant`

    On the CPU a fused kernel, and on CUDA where the package has one (docs/cuda.md), else
    `tether.reference`. Raises ValueError or TypeError before any work is done.
    """
    function = "value_loss"
    tensors = {
        "values": values,
        "returns": returns,
        "response_mask": response_mask,
        "old_values": old_values,
        "offsets": offsets,
    }
    counts = denominators(function, normalizer)
    call = objective_call(function, tensors, objective, options, counts, family="value")
    ready = call if has_kernel(values) else _cuda.call_on_cuda(call)
    if ready is None:
        step = of_denominators(counts)
        out = call.on_tensors(reference.value_loss, normalizer=step)
        return ValueLoss(out.loss, ValueMetrics(out.sums))
    loss, _, sums = ready.run_with_gradient()
    return ValueLoss(loss, ValueMetrics(sums))
