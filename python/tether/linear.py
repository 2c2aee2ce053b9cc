"""The functions of hidden states and the head of a language model, without the logits of all."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tether import policy, preference
from tether._catalogue import FAMILIES
from tether._checks import Number, check_given, check_no_tangents, number_of, shape_text
from tether._cuda_linear import loss_call, walk_over
from tether._functions import Call
from tether._ids import check_asked_ids
from tether._linear_inputs import LOSS_ARRAYS, Linear, checked_linear, stand_in
from tether._linear_logps import logps_of, walk_of
from tether._linear_ops import Chunk, LinearPolicyLoss
from tether._linear_tracing import traced_loss
from tether._lists import Numbers, Settings, Value
from tether._objectives import Weights, levels_of, objective_call, resolved
from tether._ops import has_eager_kernel
from tether._support import Support
from tether._typed import class_name
from tether.logits import RowSettings, TokenLogps, VocabularyShard, with_index_error
from tether.objective import PolicyObjective, PreferenceObjective
from tether.policy import Normalizer, PolicyMetrics, denominators
from tether.preference import PreferenceLoss, preference_call
from tether.surrogate import Surrogate


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float = 0.0,
    entropies: bool = False,
    statistics: bool = False,
    ignore_index: int = -100,
    chunk_bytes: int | None = None,
    rows_per_chunk: int = 0,
    shard: VocabularyShard | None = None,
    support: Support | None = None,
) -> TokenLogps:
    """token_logps(hidden @ weight.T + bias, targets), never holding the logits of all tokens.

    hidden          [..., H]; weight [V, H]; bias [V]. Products are in the widest of their dtypes
                    or, under autocast, in its dtype; gradients in the dtype of each
    targets         [...]; ignored ones are not multiplied at all, whatever they hold
    chunk_bytes     of logits at a time: 256 MiB unless said, 1 GiB on CUDA; below 256 rows of them
                    is slower
    rows_per_chunk  0: chunks of about equal size, as few as chunk_bytes allow. Else every matrix
                    product has this many rows, padded where fewer are left: the bits of a token's
                    results then do not depend on the tokens beside it, so that old and new
                    log-probabilities from batches of different sizes give a ratio of exactly 1.
                    For one torch, number of threads and width
    shard           the weight, and bias, have the rows of a part of the vocabulary: hidden, targets
                    and options are the same on every rank, as in token_logps. One gather a call,
                    and with its `reduce` one sum of hidden's gradient
    support         as in token_logps. Of a token only the kept rows of the weight are multiplied
                    while the sets are small, up to V / 128 ids, unless there is rows_per_chunk or
                    a shard

    The rest as in token_logps. Backward makes the logits again: one matrix product more, and one
    each for the gradients of hidden and weight where they are wanted; positions with upstream
    gradients of exactly 0 are skipped. Where all logits are one chunk, they are kept for the first
    backward instead, if it skips none of them: leave positions out by ignore_index, not by a mask
    on the result. Half weights: their gradient is added up in float32.
    """
    function = "linear_token_logps"
    settings = RowSettings(temperature, scale, softcap, ignore_index, entropies, statistics)
    linear, targets, call = checked_linear(
        function, Linear(hidden, weight, bias), targets, settings, chunk_bytes, rows_per_chunk
    )
    walk = walk_of(function, linear, chunk_bytes, rows_per_chunk, shard)
    return logps_of(function, linear, targets, call.settings, walk, support)


class LinearPolicyOutput(NamedTuple):
    loss: Tensor  # scalar: float32, or float64 with the logits
    metrics: PolicyMetrics  # constants
    logps: Tensor  # like targets, constants; 0 where the mask is 0
    entropies: Tensor | None  # the same, where asked for or needed


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Numbers,
    response_mask: Tensor,
    bias: Tensor | None = None,
    *,
    objective: str | PolicyObjective | Surrogate = "grpo",
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    rollout_logps: Tensor | None = None,
    turn_ids: Tensor | None = None,
    token_weights: Tensor | None = None,
    kl_weights: Tensor | None = None,
    entropy_weights: Tensor | None = None,
    row_tokens: Numbers | None = None,
    offsets: Numbers | None = None,
    normalizer: Normalizer | None = None,
    weights: Weights | None = None,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float = 0.0,
    entropies: bool = False,
    ignore_index: int = -100,
    chunk_bytes: int | None = None,
    rows_per_chunk: int = 0,
    shard: VocabularyShard | None = None,
    support: Support | None = None,
    **options: Value,
) -> LinearPolicyOutput:
    """policy_loss(linear_token_logps(hidden, weight, targets, bias)), never holding all logits.

    hidden  [B, T, H], or packed [N, H] with offsets; targets, response_mask and the rest of the
            batch like policy_loss. Positions with mask 0 are not multiplied, whatever they hold

    Differentiable once in hidden, weight and bias. Where ratio and weights are those of a token,
    loss and gradients come in one walk over chunks of tokens, three matrix products, and backward
    is a scaling. Those of sequences or turns (level=...), of a shard, of a support and of a
    `Surrogate` need all log-probabilities first: four products, or three where they are one chunk.
    """
    function = "linear_policy_loss"
    _check_scale(function, objective, scale)
    objective, options, weights = resolved(objective, options, weights, function)
    settings = RowSettings(temperature, scale, softcap, ignore_index, entropies=entropies)
    if isinstance(objective, Surrogate):
        _check_names(function, objective, settings)
    linear, targets, rows = checked_linear(
        function, Linear(hidden, weight, bias), targets, settings, chunk_bytes, rows_per_chunk
    )
    _check_rows(function, targets, offsets)
    batch = {
        "advantages": advantages,
        "response_mask": response_mask,
        "old_logps": old_logps,
        "ref_logps": ref_logps,
        "rollout_logps": rollout_logps,
        "turn_ids": turn_ids,
        "token_weights": token_weights,
        "kl_weights": kl_weights,
        "entropy_weights": entropy_weights,
        "row_tokens": row_tokens,
        "offsets": offsets,
    }
    counts = denominators(function, normalizer)
    tensors = {"logps": stand_in(linear, targets), "entropies": None, **batch}
    call = objective_call(
        "policy_loss", tensors, objective, options, counts, weights=weights, function=function
    )
    active = targets.masked_fill(call.tensors["response_mask"] == 0, ignore_index)
    bonus = number_of(call.settings.numbers.get("entropy_coef", 0)) != 0
    rows.settings.choices["entropies"] = "true" if entropies or bonus else "false"
    walk = walk_of(function, linear, chunk_bytes, rows_per_chunk, shard)
    of_tokens = levels_of(call.settings.choices) == {"token"} and not call.own
    if of_tokens and support is None and shard is None:
        out = _loss_in_one_walk(linear, active, call, rows.settings, walk.chunk)
        if out is not None:
            return out
    made = logps_of(function, linear, active, rows.settings, walk, support)
    settings = {"objective": objective, "normalizer": normalizer, "weights": weights}
    return _loss_of_logps(function, made, bonus, batch, settings | {"options": options})


def _check_rows(function: str, targets: Tensor, offsets: Numbers | None) -> None:
    if offsets is None and targets.dim() != 2:
        raise ValueError(
            f"{function}: targets must be [B, T], or [N] with offsets, got {shape_text(targets)}"
        )


def _check_scale(function: str, objective: Any, scale: float) -> None:
    """That of logits is not taken for an option of the objective."""
    row = FAMILIES["policy"].get(objective) if isinstance(objective, str) else None
    if row is not None and "scale" in row.options and scale != 1:
        raise ValueError(
            f"{function}: scale must be 1 beside the name of an objective with such an option, got "
            f'{scale} of "{objective}". Pass tether.objective.{class_name(objective)}(scale=...)'
        )


def _check_names(function: str, own: Surrogate, settings: RowSettings) -> None:
    for name in own.defaults:
        if name in (*settings._fields, "chunk_bytes", "rows_per_chunk", "shard", "support"):
            raise ValueError(
                f"{function}: option {name} of the surrogate must have another name: {function} "
                "has one"
            )


def _loss_of_logps(
    function: str, made: TokenLogps, bonus: bool, batch: dict, settings: dict[str, Any]
) -> LinearPolicyOutput:
    """Loss of log-probabilities that are there, with the entropies as a term or as a metric."""
    found = None if made.entropies is None else made.entropies.detach()
    entropies = made.entropies if bonus else found

    tensors = {"logps": made.logps, "entropies": entropies, **batch}
    out = policy.loss_of(function, tensors, **settings)
    return LinearPolicyOutput(out.loss, out.metrics, made.logps.detach(), found)


def _loss_in_one_walk(
    linear: Linear, targets: Tensor, call: Call, rows: Settings, chunk: Chunk
) -> LinearPolicyOutput | None:
    """Loss and gradients in one walk over the chunks; None where there is no kernel for it."""
    function, counts = "linear_policy_loss", None
    if not has_eager_kernel(*linear):
        on_cuda = loss_call(call, linear)
        if on_cuda is None:
            return None
        call, counts = on_cuda
    check_no_tangents(function, **linear._asdict())
    batch = tuple(call.tensors[name] for name in LOSS_ARRAYS)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in linear]
    with_entropies, ignore_index = rows.choices["entropies"] == "true", rows.numbers["ignore_index"]
    words = (call.settings.words(), rows.words())
    check_asked_ids(f"{function}: targets", targets, linear.weight.shape[0], ignore_index)
    walk = (targets, batch, *words, with_entropies, chunk, wanted, counts)
    if torch.compiler.is_compiling():
        out = traced_loss(linear, *walk, function, ignore_index)
    else:
        out = with_index_error(
            function,
            lambda: LinearPolicyLoss.apply(*linear, walk_over(counts), *walk),
            targets,
            linear.weight.shape[0],
            ignore_index,
        )
    loss, logps, found, sums, maxima = out
    return LinearPolicyOutput(loss, PolicyMetrics(sums, maxima), logps, found)


def linear_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ref_logps: Tensor | None = None,
    response_mask: Tensor | None = None,
    bias: Tensor | None = None,
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
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float = 0.0,
    ignore_index: int = -100,
    chunk_bytes: int | None = None,
    rows_per_chunk: int = 0,
    shard: VocabularyShard | None = None,
    **options: Value,
) -> PreferenceLoss:
    """preference_loss(linear_token_logps(hidden, weight, targets, bias)), never holding all logits.

    hidden         [2 B, T, H], or packed [N, H] with offsets, chosen answers first; targets,
                   ref_logps and the rest like preference_loss
    response_mask  always needed; positions with mask 0, and nll_mask 0 where there is one, are not
                   multiplied, whatever they hold

    Differentiable once in hidden, weight and bias. A pair needs the log-probabilities of both
    answers first: four matrix products, or three where they are one chunk.
    """
    function = "linear_preference_loss"
    check_given(f"{function}: response_mask", response_mask)
    settings = RowSettings(temperature, scale, softcap, ignore_index)
    linear, targets, rows = checked_linear(
        function, Linear(hidden, weight, bias), targets, settings, chunk_bytes, rows_per_chunk
    )
    batch = {
        "ref_logps": ref_logps,
        "response_mask": response_mask,
        "nll_mask": nll_mask,
        "labels": labels,
        "baselines": baselines,
        "answer_weights": answer_weights,
        "offsets": offsets,
    }
    counts = {"pairs": pairs, "tokens": tokens, "world_size": world_size, "loss_scale": loss_scale}
    tensors = {"logps": stand_in(linear, targets), **batch}
    call = preference_call(function, tensors, objective, options, counts)
    masked = call.tensors["response_mask"] == 0
    if nll_mask is not None:
        masked &= call.tensors["nll_mask"] == 0
    active = targets.masked_fill(masked.view(targets.shape), ignore_index)
    walk = walk_of(function, linear, chunk_bytes, rows_per_chunk, shard)
    made = logps_of(function, linear, active, rows.settings, walk, support=None)
    tensors = {"logps": made.logps, **batch}
    return preference.loss_of(function, tensors, objective, options, counts)
