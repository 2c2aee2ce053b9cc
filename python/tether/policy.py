"""Policy losses: value, gradient and metrics in one pass over memory."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tether import _cuda, reference
from tether._checks import (
    Number,
    check_count,
    check_merged,
    check_number,
    check_positive,
    kind_of,
    scalar,
)
from tether._functions import Call
from tether._lists import Numbers, Value
from tether._objectives import Weights, objective_call, takes_tokens_out
from tether._ops import Arriving, has_kernel, is_eager, ops
from tether.objective import PolicyObjective
from tether.reference.rows import LEVELS
from tether.surrogate import Surrogate


@dataclasses.dataclass(frozen=True)
class Normalizer:
    """The denominators of a whole optimizer step, from the caller.

    What `local_counts` gives, added up over the micro-batches and ranks of the step: with it any
    split gives the same loss and gradient. None: the count of the batch itself. Numbers, or tensors
    of one number: those can be all-reduced, and torch.compile does not compile again for new ones.
    """

    policy: Number | None = None  # tokens under the surrogate
    kl: Number | None = None  # tokens under the KL penalty; None: as policy
    sequences: Number | None = None  # rows with at least one token
    world_size: Number = 1  # multiplies the loss, not the metrics: DDP and FSDP average gradients
    scale: Number = 1  # likewise: 1 / micro-batches where each has denominators of its own, say

    @property
    def factor(self) -> Number:
        return self.world_size * self.scale

    def __add__(self, other: Normalizer) -> Normalizer:
        """Sums the counts; one without any adds nothing.

        ValueError where only one of two with counts has a certain one: as None, the sum would mean
        another count. Likewise where world_size or scale differ and neither is 1.
        """
        if not isinstance(other, Normalizer):
            return NotImplemented
        factors = [_agreed(name, self, other) for name in ("world_size", "scale")]
        if _is_empty(self) or _is_empty(other):
            counts = [getattr(self if _is_empty(other) else other, name) for name in _COUNTS]
        else:
            counts = [_sum(name, getattr(self, name), getattr(other, name)) for name in _COUNTS]
        return Normalizer(*counts, *factors)

    def __radd__(self, other: int) -> Normalizer:
        """So that sum() works, which starts at 0."""
        return self if other == 0 else NotImplemented


_COUNTS = ("policy", "kl", "sequences")


def _is_empty(normalizer: Normalizer) -> bool:
    return all(getattr(normalizer, name) is None for name in _COUNTS)


def _sum(name: str, a: Number | None, b: Number | None) -> Number | None:
    if a is None and b is None:
        return None
    if a is None or b is None:
        have, lack = ("second", "first") if a is None else ("first", "second")
        raise ValueError(
            f"Normalizer: {name} must be given in both or in none of two that are added, got it in "
            f"the {have} and none in the {lack}"
        )
    for each in (a, b):
        check_number("Normalizer", name, each)
    return scalar(a) + scalar(b)


def _agreed(name: str, first: Normalizer, second: Normalizer) -> Number:
    a, b = getattr(first, name), getattr(second, name)
    if b == 1 or a == b:
        return a
    if a == 1:
        return b
    raise ValueError(f"Normalizer: {name} must be the same in two that are added, got {a} and {b}")


class PolicyMetrics(NamedTuple):
    """What a training loop logs, as two blocks: all-reduce `sums` by sum and `maxima` by max."""

    sums: Tensor  # [14, 2] float64: value and count
    maxima: Tensor  # [3] float64

    def merge(self, other: PolicyMetrics) -> PolicyMetrics:
        """Of the micro-batches of both."""
        check_merged(self, other)
        return PolicyMetrics(self.sums + other.sums, torch.fmax(self.maxima, other.maxima))

    def __add__(self, other: PolicyMetrics) -> PolicyMetrics:
        return self.merge(other) if isinstance(other, PolicyMetrics) else NotImplemented

    def __radd__(self, other: int):
        """So that sum() works, which starts at 0."""
        return self if other == 0 else NotImplemented

    def to_dict(self) -> dict[str, float]:
        """By name, ready for a logger: means over tokens, of ratios at levels of sequences or
        turns over those; counts; extremes. The one synchronisation with a device."""
        values = ops.policy_metrics(self.sums.cpu(), self.maxima.cpu())
        return dict(zip(_METRIC_NAMES, values.tolist(), strict=True))


_METRIC_NAMES = tuple(ops.metric_names("policy"))


class PolicyLoss(NamedTuple):
    loss: Tensor  # scalar: float32, or float64 with logps
    metrics: PolicyMetrics  # constants


def policy_loss(
    logps: Tensor,
    advantages: Numbers,
    response_mask: Tensor,
    *,
    objective: str | PolicyObjective | Surrogate = "grpo",
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    entropies: Tensor | None = None,
    rollout_logps: Tensor | None = None,
    turn_ids: Tensor | None = None,
    token_weights: Tensor | None = None,
    kl_weights: Tensor | None = None,
    entropy_weights: Tensor | None = None,
    row_tokens: Numbers | None = None,
    offsets: Numbers | None = None,
    normalizer: Normalizer | None = None,
    weights: Weights | None = None,
    **options: Value,
) -> PolicyLoss:
    """The loss of a policy objective and its metrics, differentiable once in logps and entropies.

    logps            [B, T], or packed [N] with offsets: log-probabilities [nats] of the tokens;
                     float32, float64, bfloat16 or float16, of any strides
    advantages       [B] or [B, 1], or like logps; packed [B] with B = N is refused, pass [B, 1].
                     A list or an array of numpy too, as row_tokens and offsets may be
    response_mask    like logps: bool, or weights in [0, 1]; slots of weight 0 may hold anything
    objective        a row of `objectives()`, which also lists the options and their defaults; or
                     one of `dialects()`, a trainer's loss by its name, as "verl.vanilla"; or one
                     of `tether.objective`, with settings of its own beneath the options here; or a
                     `Surrogate`, one's own formula
    old_logps        like logps, under the policy that the step began with; None: logps, detached
    ref_logps        like logps, under the reference policy; needed when beta > 0
    entropies        like logps, of the policy; needed when entropy_coef is not 0, with their graph:
                     constants move the loss and teach nothing
    rollout_logps    like logps, under the engine that sampled the tokens; needed by weights and
                     penalties that compare with it
    turn_ids         like logps, int32 or int64: which turn a token belongs to, for the levels of
                     turns; do not decrease along a row; None: each run of response_mask is a turn
    token_weights    like logps, of any kind of number, or bool: each token's S is multiplied by it,
    kl_weights       K by kl_weights and H by entropy_weights; constants. None: 1. Denominators do
    entropy_weights  not see them: `batch_weights` makes some, a mask of a term of its own is one
    row_tokens       [B]: what sequence_mean_token_mean divides each row by; None: its own tokens.
                     Of a row that is split over ranks, or of all answers to a prompt (docs)
    offsets          [B + 1] int32 or int64, from 0 to N: row i is offsets[i] .. offsets[i + 1]
    normalizer       the denominators of the optimizer step; None: of this batch
    weights          of the tokens, never differentiated: one of `tether.weight` or a list, or by
                     name (`weights()` lists them), {"truncated_importance": {"high": 2.0, "level":
                     "sequence_sum"}}; level is what it is meant for unless said. They multiply the
                     surrogate S alone, in value and gradient: penalty, entropies, clip fractions
                     and denominators do not see them. One that leaves changes response_mask
                     instead, before everything
    options          of the objective, as epsilon_low=0.1 (see Normalizer for tensors), and its
                     choices, as aggregation="token_mean", level="sequence_mean" or "turn_mean",
                     kl_estimator="k3", kl_gradient="k2", kl_correction="ratio" (or
                     "rollout_ratio", to the engine), kl_ratio_high=10.0, kl_reference="old" (or
                     "rollout": the penalty ties to the policy of old_logps, without ref_logps)

    On the CPU: a fused kernel, the same bits for any number of threads. On other devices:
    `tether.reference`, at torch's speed, where weights and counts are taken as they are, but for
    CUDA where the package has its kernels (docs/cuda.md). It also runs a `Surrogate`. Raises
    ValueError or TypeError before any work is done.
    """
    tensors = {
        "logps": logps,
        "advantages": advantages,
        "response_mask": response_mask,
        "old_logps": old_logps,
        "ref_logps": ref_logps,
        "entropies": entropies,
        "rollout_logps": rollout_logps,
        "turn_ids": turn_ids,
        "token_weights": token_weights,
        "kl_weights": kl_weights,
        "entropy_weights": entropy_weights,
        "row_tokens": row_tokens,
        "offsets": offsets,
    }
    return loss_of("policy_loss", tensors, objective, options, normalizer, weights)


def loss_of(
    function: str,
    tensors: dict[str, Tensor | None],
    objective: str | PolicyObjective | Surrogate,
    options: dict[str, Value],
    normalizer: Normalizer | None,
    weights: Weights | None = None,
) -> PolicyLoss:
    """policy_loss in the name of `function`."""
    counts = denominators(function, normalizer)
    call = objective_call(
        "policy_loss", tensors, objective, options, counts, weights=weights, function=function
    )
    fused = has_kernel(tensors["logps"], tensors.get("entropies"))
    if call.own and fused:
        call.detached().run_with_gradient()  # which looks at what the arrays hold
    on_device = None if fused else _cuda.call_on_cuda(call)
    if on_device is not None:
        call = on_device
    elif call.own or not fused:
        step = of_denominators(counts)
        out = call.on_tensors(reference.policy_loss, normalizer=step)
        return PolicyLoss(out.loss, PolicyMetrics(out.sums, out.maxima))
    loss, _, _, sums, maxima = call.run_with_gradient()
    return PolicyLoss(loss, PolicyMetrics(sums, maxima))


def policy_token_losses(
    logps: Tensor,
    advantages: Numbers,
    response_mask: Tensor,
    *,
    objective: str | PolicyObjective | Surrogate = "grpo",
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    entropies: Tensor | None = None,
    rollout_logps: Tensor | None = None,
    turn_ids: Tensor | None = None,
    token_weights: Tensor | None = None,
    kl_weights: Tensor | None = None,
    entropy_weights: Tensor | None = None,
    row_tokens: Numbers | None = None,
    offsets: Numbers | None = None,
    weights: Weights | None = None,
    **options: Value,
) -> Tensor:
    """The terms W S + beta K - entropy_coef H of each token, before mask and aggregation.

    Like logps; 0 in masked slots. Arguments as in policy_loss. For aggregations of your own:
    backward takes any gradient of it. By torch's operations on every device, at torch's speed;
    policy_loss is the fast way where its aggregations do.
    """
    function = "policy_token_losses"
    tensors = {
        "logps": logps,
        "advantages": advantages,
        "response_mask": response_mask,
        "old_logps": old_logps,
        "ref_logps": ref_logps,
        "entropies": entropies,
        "rollout_logps": rollout_logps,
        "turn_ids": turn_ids,
        "token_weights": token_weights,
        "kl_weights": kl_weights,
        "entropy_weights": entropy_weights,
        "row_tokens": row_tokens,
        "offsets": offsets,
    }
    call = objective_call(
        "policy_loss", tensors, objective, options, {}, weights=weights, function=function
    )
    call.check_settings()
    looks = turn_ids is not None or takes_tokens_out(call.settings.choices)
    if has_kernel(logps) and looks:  # at what they hold
        call.detached().run_with_gradient()
    arriving = _arriving_at_tokens(call)
    tensors = call.once_differentiable(forward_mode=True, arriving=arriving)
    losses = call.in_name_of(
        lambda: reference.policy_token_losses(**tensors, **call.named_settings())
    )
    return losses if arriving is None else arriving.at(losses)


def _arriving_at_tokens(call: Call) -> Arriving | None:
    """What arrives at each token, where it meets no gradient but that token's."""
    if call.own or not is_eager() or forward_ad._current_level >= 0:
        return None
    choices = call.settings.choices
    level = choices.get("level", reference.OBJECTIVES[choices["objective"]].level)
    return None if LEVELS[level].shared else Arriving(others=False)


def local_counts(
    logps: Tensor,
    advantages: Numbers,
    response_mask: Tensor,
    *,
    objective: str | PolicyObjective | Surrogate = "grpo",
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    entropies: Tensor | None = None,
    rollout_logps: Tensor | None = None,
    turn_ids: Tensor | None = None,
    token_weights: Tensor | None = None,
    kl_weights: Tensor | None = None,
    entropy_weights: Tensor | None = None,
    row_tokens: Numbers | None = None,
    offsets: Numbers | None = None,
    weights: Weights | None = None,
    **options: Value,
) -> Normalizer:
    """The denominators that this batch contributes to its optimizer step, as float64 tensors.

    Takes the arguments of `policy_loss`. The sum over the micro-batches and ranks of a step is the
    normalizer of each of its losses: normalizer = sum(local_counts(**batch) for batch in step).
    """
    function = "local_counts"
    tensors = {
        "logps": logps,
        "advantages": advantages,
        "response_mask": response_mask,
        "old_logps": old_logps,
        "ref_logps": ref_logps,
        "entropies": entropies,
        "rollout_logps": rollout_logps,
        "turn_ids": turn_ids,
        "token_weights": token_weights,
        "kl_weights": kl_weights,
        "entropy_weights": entropy_weights,
        "row_tokens": row_tokens,
        "offsets": offsets,
    }
    call = objective_call(function, tensors, objective, options, {}, weights=weights)
    if not has_kernel(logps) and _cuda.call_on_cuda(call) is None:
        call.check_settings()
        counts = reference.local_counts(**call.detached().tensors, **call.named_settings())
    else:
        counts = call.detached().run()
    policy, kl, sequences = counts.unbind()
    return Normalizer(policy, kl, sequences)


def denominators(function: str, normalizer: Normalizer | None) -> dict[str, Number]:
    """A checked normalizer in the words of the operators; counts that are not given are absent."""
    if normalizer is None:
        return {}
    if not isinstance(normalizer, Normalizer):
        raise TypeError(
            f"{function}: normalizer must be a tether.Normalizer, got {kind_of(normalizer)}"
        )
    out = {}
    for name in (*_COUNTS, "world_size", "scale"):
        value, is_count = getattr(normalizer, name), name in _COUNTS
        if value is not None or not is_count:
            (check_count if is_count else check_positive)(function, f"normalizer.{name}", value)
            out[f"normalizer.{name}"] = scalar(value)
    return out


def of_denominators(counts: dict[str, Number]) -> Normalizer:
    """The normalizer of checked words."""
    return Normalizer(**{name.removeprefix("normalizer."): each for name, each in counts.items()})
