"""Preference losses: value, gradient and metrics of answers, in pairs or with labels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tether import _cuda, reference
from tether._catalogue import FAMILIES
from tether._checks import (
    Number,
    check_constant,
    check_count,
    check_device,
    check_floating,
    check_merged,
    check_positive,
    number_of,
    result_dtype,
    scalar,
)
from tether._functions import Call
from tether._lists import Numbers, Value, of_numbers
from tether._objectives import objective_call
from tether._ops import has_kernel, ops
from tether.objective import PreferenceObjective
from tether.reference.rows import Rows


class PreferenceMetrics(NamedTuple):
    """What a training loop logs, as one block: all-reduce `sums` by sum."""

    sums: Tensor  # [9, 2] float64: value and count

    def merge(self, other: PreferenceMetrics) -> PreferenceMetrics:
        """Of the micro-batches of both."""
        check_merged(self, other)
        return PreferenceMetrics(self.sums + other.sums)

    def __add__(self, other: PreferenceMetrics) -> PreferenceMetrics:
        return self.merge(other) if isinstance(other, PreferenceMetrics) else NotImplemented

    def __radd__(self, other: int):
        """So that sum() works, which starts at 0."""
        return self if other == 0 else NotImplemented

    def to_dict(self) -> dict[str, float]:
        """Means by name, ready for a logger. The one synchronisation with a device."""
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
    objective: str | PreferenceObjective = "dpo",
    nll_mask: Tensor | None = None,
    labels: Numbers | None = None,
    baselines: Numbers | None = None,
    answer_weights: Numbers | None = None,
    offsets: Numbers | None = None,
    pairs: Number | None = None,
    tokens: Number | None = None,
    world_size: Number = 1,
    loss_scale: Number = 1,
    **options: Value,
) -> PreferenceLoss:
    """The loss of a preference objective and its metrics, differentiable once in logps.

    Of pairs all chosen answers come first, then the rejected ones in the same order; an objective
    of single answers takes them in any order, and their labels.

    logps            [2 B, T], packed [N] with offsets, or of whole answers [2 B], in nats; float32,
                     float64, bfloat16 or float16, of any strides
    ref_logps        like logps, under the reference policy; needed unless reference=False. Or [2 B]
                     beside tokens, made once for all epochs: of each answer the sum, with
                     score="mean" the mean, not with ld_alpha
    response_mask    like logps: bool, or weights in [0, 1]; slots of weight 0 may hold anything;
                     None with answers [2 B]
    objective        a row of `objectives("preference")`, which also lists options and defaults, or
                     one of `tether.objective`
    nll_mask         like response_mask: the tokens of the negative log-likelihood of the chosen
                     answers, where nll_coef is not 0; None: those of the response
    labels           [B]: whether an answer is a good one: bool, or in [0, 1] and above 1/2
    baselines        [2 B] or [B] with labels: what the scores are compared with; None: 0. A pair's
                     margin is beta (S_chosen - baseline - (S_rejected - baseline))
    answer_weights   likewise: of the loss, at least 0; a pair's is the product of its two; None: 1
    offsets          [2 B + 1] int32 or int64, from 0 to N
    pairs            the pairs, or the answers with labels, of the optimizer step, over
                     micro-batches and ranks; None: of this batch
    tokens           likewise the tokens of the negative log-likelihood, of chosen answers alone
    world_size       multiplies the loss, not the metrics: DDP and FSDP average gradients
    loss_scale       likewise: 1 / micro-batches where each has its own pairs, say
    options          as beta=0.1, and choices: score="mean", link="js", reference=False

    On the CPU: a fused kernel, the same bits for any number of threads. On other devices:
    `tether.reference`, at torch's speed, but for CUDA where the package has its kernels
    (docs/cuda.md). Raises ValueError or TypeError before any work is done.
    """
    tensors = {
        "logps": logps,
        "ref_logps": ref_logps,
        "response_mask": response_mask,
        "nll_mask": nll_mask,
        "labels": labels,
        "baselines": baselines,
        "answer_weights": answer_weights,
        "offsets": offsets,
    }
    counts = {"pairs": pairs, "tokens": tokens, "world_size": world_size, "loss_scale": loss_scale}
    return loss_of("preference_loss", tensors, objective, options, counts)


def loss_of(
    function: str,
    tensors: dict[str, Tensor | None],
    objective: str | PreferenceObjective,
    options: dict[str, Value],
    counts: dict[str, Number | None],
) -> PreferenceLoss:
    """preference_loss in the name of `function`."""
    call = preference_call(function, tensors, objective, options, counts)
    ready = call if has_kernel(tensors["logps"]) else _cuda.call_on_cuda(call)

    def run():
        if ready is not None:
            loss, _, sums = ready.run_with_gradient()
            return loss, sums
        logps, offsets = call.tensors["logps"], call.tensors["offsets"]
        rows = len(logps) if offsets is None else len(offsets) - 1
        step = {name: scalar(each) for name, each in counts.items()}
        return call.on_tensors(reference.preference_loss, rows=rows, **step)

    try:
        loss, sums = run()
    except ValueError as error:
        words = str(error).replace("normalizer.scale", "loss_scale").replace("normalizer.", "")
        raise ValueError(words) from None
    return PreferenceLoss(loss, PreferenceMetrics(sums))


def preference_call(
    function: str,
    tensors: dict[str, Tensor | None],
    objective: str | PreferenceObjective,
    options: dict[str, Value],
    counts: dict[str, Number | None],
) -> Call:
    """A checked call in the name of `function`: whole answers become rows of one token."""
    counts = {name: each for name, each in counts.items() if each is not _COUNTS[name]}
    for name, value in counts.items():
        of_step = name in ("pairs", "tokens")
        (check_count if of_step else check_positive)(function, name, value)
    logps = tensors["logps"]
    tensors = tensors | {"offsets": of_numbers(tensors["offsets"], "ids", logps)}
    if isinstance(logps, Tensor) and logps.dim() == 1 and tensors["offsets"] is None:
        for name in ("logps", "ref_logps", "response_mask", "nll_mask"):
            each = tensors[name]
            if isinstance(each, Tensor) and each.dim() == 1:
                tensors[name] = each[:, None]
        if tensors["response_mask"] is None:
            ones = torch.ones_like(tensors["logps"], dtype=torch.bool, requires_grad=False)
            tensors["response_mask"] = ones
    given = {f"normalizer.{name.removeprefix('loss_')}": each for name, each in counts.items()}

    def call(tensors):
        return objective_call(
            "preference_loss",
            tensors,
            objective,
            options,
            given,
            family="preference",
            function=function,
        )

    if not _is_of_answers(tensors):
        out = call(tensors)
    else:
        out = call(tensors | {"ref_logps": tensors["logps"].detach()})
        out = _with_reference(function, out, tensors["ref_logps"])
    _check_denominators(function, out, counts)
    return out


def _check_denominators(function: str, call: Call, counts: dict[str, Number]) -> None:
    """A likelihood by tokens that fell back on those of the batch would depend on the split."""
    numbers, choices = call.settings
    row = FAMILIES["preference"][choices["objective"]]
    coefficient = number_of(numbers.get("nll_coef", row.options["nll_coef"].default))
    by_token = choices.get("nll_mean", row.choices["nll_mean"].default) == "token"
    if "pairs" in counts and "tokens" not in counts and by_token and coefficient != 0:
        raise ValueError(
            f"{function}: tokens must be given where pairs is, for a likelihood by tokens, got none"
        )


def _is_of_answers(tensors: dict[str, Tensor | None]) -> bool:
    """Whether there is one number of the reference for each answer of several tokens."""
    logps, ref_logps, offsets = (tensors[name] for name in ("logps", "ref_logps", "offsets"))
    dense = (isinstance(each, Tensor) and not each.is_nested for each in (logps, ref_logps))
    if not all(dense) or ref_logps.dim() != 1:
        return False
    if offsets is None:
        return logps.dim() == 2 and len(ref_logps) == len(logps)
    packed = isinstance(offsets, Tensor) and offsets.dim() == 1
    return packed and ref_logps.shape != logps.shape and len(ref_logps) == len(offsets) - 1


def _with_reference(function: str, call: Call, scores: Tensor) -> Call:
    """The reference's scores of answers [2 B] as log-probabilities of tokens: each at the first
    token that counts."""
    where = f"{function}: ref_logps"
    check_floating(where, scores)
    check_constant(where, "ref_logps", scores)
    tensors, (numbers, choices) = call.tensors, call.settings
    check_device(where, scores, "logps", tensors["logps"])
    if number_of(numbers.get("ld_alpha", 1)) != 1:
        raise ValueError(f"{where} must be of tokens where ld_alpha is not 1, got one of answers")
    rows = Rows.of(function, "logps", tensors["logps"], tensors["offsets"])
    weight = rows.weights(tensors["response_mask"], torch.float64)
    left = torch.arange(weight.shape[-1], 0, -1, dtype=torch.float64, device=weight.device)
    left = torch.where(weight > 0, left, 0.0)
    first = (left > 0) & (left == rows.spread(rows.largest(left)))
    sums = scores.double()
    row = FAMILIES["preference"][choices["objective"]]
    if choices.get("score", row.choices["score"].default) == "mean":
        sums = sums * rows.sum(weight)
    at_first = torch.where(first, rows.spread(sums) / weight, 0.0)
    at_first = at_first.to(result_dtype(tensors["logps"]))
    return call._replace(tensors=tensors | {"ref_logps": at_first})


# Beside the first three arguments of preference_loss.
_FURTHER = ("nll_mask", "labels", "baselines", "answer_weights", "offsets")
_COUNTS = {"pairs": None, "tokens": None, "world_size": 1, "loss_scale": 1}


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
    if "objective" in settings:
        raise ValueError(
            f"dpo_loss: objective must not be given, got {settings['objective']}. Call "
            "preference_loss"
        )

    tensors = {"logps": logps, "ref_logps": ref_logps, "response_mask": response_mask}
    tensors |= {name: settings.pop(name, None) for name in _FURTHER}
    counts = {name: settings.pop(name, default) for name, default in _COUNTS.items()}
    options = {"beta": beta, "label_smoothing": label_smoothing, **settings}
    return loss_of("dpo_loss", tensors, "dpo", options, counts)
