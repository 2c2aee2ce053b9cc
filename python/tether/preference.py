"""Preference losses: value, gradient and metrics of pairs of answers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tether import reference
from tether._checks import (
    Number,
    Pairs,
    check_no_tangents,
    check_number,
    check_positive,
    checked_pairs,
)
from tether._objectives import ABSENT, check_options, checked_objective, packed
from tether._ops import ops


class PreferenceMetrics(NamedTuple):
    """What a training loop logs, as one block: all-reduce `sums` by sum."""

    sums: Tensor  # [8, 2] float64: value and count

    def merge(self, other: PreferenceMetrics) -> PreferenceMetrics:
        """Of the micro-batches of both."""
        return PreferenceMetrics(self.sums + other.sums)

    def to_dict(self) -> dict[str, float]:
        """Means over pairs by name, ready for a logger. The one synchronisation with a device."""
        values = ops.preference_metrics(self.sums.cpu())
        return dict(zip(_METRIC_NAMES, values.tolist(), strict=True))


_METRIC_NAMES = tuple(ops.preference_metric_names())


class PreferenceLoss(NamedTuple):
    loss: Tensor  # scalar: float32, or float64 with logps
    metrics: PreferenceMetrics  # constants


def preference_loss(
    logps: Tensor,
    ref_logps: Tensor | None = None,
    response_mask: Tensor | None = None,
    *,
    objective: str = "dpo",
    offsets: Tensor | None = None,
    pairs: Number | None = None,
    world_size: Number = 1,
    loss_scale: Number = 1,
    **options: Number | str | bool,
) -> PreferenceLoss:
    """The loss of a preference objective and its metrics, differentiable once in logps.

    All chosen answers come first, then the rejected ones in the same order.

    logps            [2 B, T], packed [N] with offsets, or of whole answers [2 B], in nats; float32,
                     float64, bfloat16 or float16, of any strides
    ref_logps        like logps, under the reference policy; needed unless reference=False
    response_mask    like logps: bool, or weights in [0, 1]; slots of weight 0 may hold anything;
                     None with answers [2 B]
    objective        a row of `objectives("preference")`, which also lists options and defaults
    offsets          [2 B + 1] int32 or int64, from 0 to N
    pairs            the pairs of the optimizer step, over micro-batches and ranks; None: of this
                     batch
    world_size       multiplies the loss, not the metrics: DDP and FSDP average gradients
    loss_scale       likewise: 1 / micro-batches where each has its own pairs, say
    options          as beta=0.1, and choices: score="mean", link="js", reference=False

    On the CPU: a fused kernel, the same bits for any number of threads. On other devices:
    `tether.reference`, at torch's speed. Raises ValueError or TypeError before any work is done.
    """
    function = "preference_loss"
    batch = checked_pairs(function, Pairs(logps, response_mask, ref_logps, offsets))
    wanted = checked_objective("preference", function, objective, options)
    if pairs is not None:
        check_number(function, "pairs", pairs)
    check_positive(function, "world_size", world_size)
    check_positive(function, "loss_scale", loss_scale)
    if logps.device.type != "cpu":
        check_options("preference", function, wanted)
        if pairs is not None:
            check_positive(function, "pairs", pairs, zero=True)
        out = reference.preference_loss(
            *batch,
            objective=objective,
            pairs=pairs,
            world_size=world_size,
            loss_scale=loss_scale,
            **wanted.numbers,
            **wanted.choices,
        )
        return PreferenceLoss(out.loss, PreferenceMetrics(out.sums))
    check_no_tangents(function, logps=logps)
    try:
        loss, _, sums = ops.preference_loss_forward(
            *batch,
            *wanted.arguments(),
            packed([ABSENT if pairs is None else pairs, world_size, loss_scale]),
            torch.is_grad_enabled() and logps.requires_grad,
        )
    except ValueError as error:
        words = str(error).replace("normalizer.scale", "loss_scale").replace("normalizer.", "")
        raise ValueError(words) from None
    return PreferenceLoss(loss, PreferenceMetrics(sums))


def dpo_loss(
    logps: Tensor,
    ref_logps: Tensor,
    response_mask: Tensor | None = None,
    *,
    beta: Number = 0.1,
    label_smoothing: Number = 0.0,
    **settings,
) -> PreferenceLoss:
    """DPO, arXiv:2305.18290, eq. 7: `preference_loss` with objective="dpo"."""
    return preference_loss(
        logps, ref_logps, response_mask, beta=beta, label_smoothing=label_smoothing, **settings
    )
