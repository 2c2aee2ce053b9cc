"""Preference losses: value, gradient and metrics of pairs of answers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tether import reference
from tether._checks import Number, check_positive, in_name_of, scalar
from tether._functions import Call
from tether._lists import Value
from tether._objectives import objective_call
from tether._ops import has_kernel, ops


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


_METRIC_NAMES = tuple(ops.metric_names("preference"))


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
    **options: Value,
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
    counts = {"pairs": pairs, "world_size": world_size, "scale": loss_scale}
    call = preference_call(
        function, logps, ref_logps, response_mask, offsets, objective, options, counts
    )
    if not has_kernel(logps):
        tensors = call.tensors
        rows = tensors["logps"].shape[0] if offsets is None else offsets.shape[0] - 1
        call.check_settings(function, rows)
        out = reference.preference_loss(
            **call.once_differentiable(function),
            pairs=scalar(pairs),
            world_size=scalar(world_size),
            loss_scale=scalar(loss_scale),
            **call.named_settings(),
        )
        return PreferenceLoss(out.loss, PreferenceMetrics(out.sums))
    try:
        loss, _, sums = call.run_with_gradient()
    except ValueError as error:
        words = str(error).replace("normalizer.scale", "loss_scale").replace("normalizer.", "")
        raise ValueError(words) from None
    return PreferenceLoss(loss, PreferenceMetrics(sums))


def preference_call(
    function: str,
    logps: Tensor,
    ref_logps: Tensor | None,
    response_mask: Tensor | None,
    offsets: Tensor | None,
    objective: str,
    options: dict[str, Value],
    counts: dict[str, Number | None],
) -> Call:
    """A checked call in the name of `function`: answers [2 B] become rows of one token."""
    for name, value in counts.items():
        if value is not None or name != "pairs":
            words = "loss_scale" if name == "scale" else name
            check_positive(function, words, value, zero=name == "pairs")
    if isinstance(logps, Tensor) and logps.dim() == 1 and offsets is None:
        logps, ref_logps, response_mask = (
            each[:, None] if isinstance(each, Tensor) and each.dim() == 1 else each
            for each in (logps, ref_logps, response_mask)
        )
        if response_mask is None:
            response_mask = torch.ones_like(logps, dtype=torch.bool, requires_grad=False)
    tensors = {
        "logps": logps,
        "ref_logps": ref_logps,
        "response_mask": response_mask,
        "offsets": offsets,
    }
    given = {f"normalizer.{name}": each for name, each in counts.items() if each is not None}
    return objective_call(
        "preference_loss",
        tensors,
        objective,
        options,
        given,
        family="preference",
        function=function,
    )


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

    def run():
        options = {"beta": beta, "label_smoothing": label_smoothing, **settings}
        return preference_loss(logps, ref_logps, response_mask, **options)

    return in_name_of("dpo_loss", "preference_loss", run)
