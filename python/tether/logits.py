"""Log-probabilities, entropies and exact KL divergences from logits, never in half precision."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tether import reference
from tether._checks import (
    Number,
    check_device,
    check_given,
    check_integers,
    check_no_tangents,
    dtype_text,
    in_name_of,
    savable,
    shape_text,
)
from tether._functions import FUNCTIONS, Call, Settings, Value
from tether._logits_ops import (
    Chunk,
    LinearPolicyLoss,
    LinearTokenLogps,
    TokenLogpsOfCaller,
    chunk_of,
    token_statistics,
)
from tether._objectives import objective_call, objectives
from tether._ops import has_kernel, ops
from tether.policy import Normalizer, PolicyMetrics, denominators, policy_loss
from tether.preference import PreferenceLoss, preference_call, preference_loss


class TokenLogps(NamedTuple):
    logps: Tensor  # like targets: float32, or float64 with logits
    entropies: Tensor | None  # like targets; None unless asked for
    # None unless statistics=True, constants:
    sum_of_squared_p: Tensor | None = None  # sum_v p_v^2
    mean_logits: Tensor | None = None  # of x, over the columns above -inf
    target_is_largest: Tensor | None = None  # bool: no other id is more probable


class CategoricalKl(NamedTuple):
    kl: Tensor  # KL(q || p)
    reverse_kl: Tensor  # KL(p || q)
    entropies: Tensor  # H(q)


class VocabularyShard(NamedTuple):
    """Where the vocabulary is split over ranks (tensor parallel), the part that one holds."""

    first_id: int  # logits hold the columns of the ids [first_id, first_id + V)
    ids: int  # of all shards together
    # An all-gather of float64: [1 + N, 8] of this rank to [shards, 1 + N, 8] of all, in the same
    # order on every rank. Called once, in forward.
    gather: Callable[[Tensor], Tensor]


def token_logps(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float = 0.0,
    entropies: bool = False,
    statistics: bool = False,
    ignore_index: int = -100,
    gradient_buffer: Tensor | None = None,
    shard: VocabularyShard | None = None,
) -> TokenLogps:
    """Log-probabilities [nats] of the targets under softmax(x), and the entropies.

        x = scale logits / temperature, or softcap tanh(scale logits / softcap) / temperature

    logits           [..., V]: float32, float64, bfloat16 or float16, of any strides; -inf is a
                     column that is not there
    targets          [...]: int32 or int64, in [0, V) or ignore_index, which gets 0 and no gradient
    temperature      in [1e-6, 1e6], as is scale
    softcap          0: none
    statistics       also return what has no gradient, see TokenLogps
    gradient_buffer  where backward writes the gradient of the logits instead of fresh memory: a
                     tensor like logits that is used for nothing else until then, nor is a view of
                     it, or logits themselves, which then hold their own gradient; backward runs
                     once. torch.autograd.grad returns this memory; the .grad of a leaf is a copy
    shard            logits are those of a part of the vocabulary; targets, ids of the whole, and
                     the gradients that arrive must be the same on every rank, as must the options,
                     which is checked. Results are those of the whole, the gradient that of the
                     shard's own columns

    Results are float32 whatever the logits are (float64 for float64). Differentiable once in
    logits; a second backward raises. On the CPU: one pass over the logits each way, the same bits
    for any number of threads. On other devices: `tether.reference`. Raises ValueError, TypeError
    or IndexError before any work is done.
    """
    function = "token_logps"
    check_integers(function, ignore_index=ignore_index)
    rows = {
        "temperature": temperature,
        "scale": scale,
        "softcap": softcap,
        "ignore_index": ignore_index,
    }
    call = FUNCTIONS[function].call(
        {"logits": logits, "targets": targets},
        {**rows, "entropies": entropies, "statistics": statistics},
    )
    targets = call.tensors["targets"].to(torch.int64).contiguous()
    if not has_kernel(logits):
        if gradient_buffer is not None:
            raise ValueError(f"{function}: gradient_buffer must be None for logits on a device")
        if shard is not None:
            raise ValueError(f"{function}: shard must be None for logits on a device")
        out = reference.token_logps(logits, targets, **rows)
        further = reference.token_statistics(logits, targets, **rows) if statistics else ()
        return TokenLogps(out[0], out[1] if entropies else None, *further)
    check_no_tangents(function, logits=logits)
    if gradient_buffer is not None:
        _check_buffer(f"{function}: gradient_buffer", gradient_buffer, logits)
    if shard is not None:
        _check_shard(f"{function}: shard", shard, logits)
        call = call.with_numbers({"first_id": shard.first_id, "ids": shard.ids})
    words = call.settings.words()

    def run():
        if gradient_buffer is not None or shard is not None:
            return TokenLogpsOfCaller.apply(
                logits, targets, words, entropies, gradient_buffer, shard
            )
        return ops.token_logps_forward(logits, targets, *words)

    vocabulary = logits.shape[-1] if shard is None else shard.ids
    logps, found, sums = _with_index_error(function, run, targets, vocabulary, ignore_index)
    further = token_statistics(sums, logits, words) if statistics else ()
    return TokenLogps(logps, found if entropies else None, *further)


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
    chunk_bytes: int = 256 << 20,
    rows_per_chunk: int = 0,
) -> TokenLogps:
    """token_logps(hidden @ weight.T + bias, targets), never holding the logits of all tokens.

    hidden          [..., H]; weight [V, H]; bias [V]. Products are in the widest of their dtypes
                    or, under autocast, in its dtype; gradients in the dtype of each
    targets         [...]; ignored ones are not multiplied at all, whatever they hold
    chunk_bytes     of logits at a time; below 256 rows of them is slower
    rows_per_chunk  0: chunks of about equal size, as few as chunk_bytes allow. Else every matrix
                    product has this many rows, padded where fewer are left: the bits of a token's
                    results then do not depend on the tokens beside it, so that old and new
                    log-probabilities from batches of different sizes give a ratio of exactly 1.
                    For one torch, number of threads and width

    The rest as in token_logps. Backward makes the logits again: one matrix product more, and one
    each for the gradients of hidden and weight where they are wanted; positions with upstream
    gradients of exactly 0 are skipped. Where all logits are one chunk, they are kept for the first
    backward instead, if it skips none of them: leave positions out by ignore_index, not by a mask
    on the result. Half weights: their gradient is added up in float32.
    """
    function = "linear_token_logps"
    settings = {
        "temperature": temperature,
        "scale": scale,
        "softcap": softcap,
        "ignore_index": ignore_index,
        "entropies": entropies,
        "statistics": statistics,
    }
    linear, targets, call = _checked_linear(
        function, Linear(hidden, weight, bias), targets, settings, chunk_bytes, rows_per_chunk
    )
    chunk = chunk_of(linear.weight, chunk_bytes, rows_per_chunk)
    return _linear_token_logps(function, linear, targets, call.settings, chunk)


class Linear(NamedTuple):
    """logits = hidden @ weight.T + bias"""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    def in_one_dtype(self) -> Linear:
        """As torch's own linear: under autocast in its dtype, else nothing is rounded."""
        given = [each for each in self if each is not None]
        dtype = functools.reduce(torch.promote_types, (each.dtype for each in given))
        device = self.hidden.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        if autocast and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        return Linear(*(None if each is None else each.to(dtype) for each in self))


def _linear_token_logps(
    function: str, linear: Linear, targets: Tensor, settings: Settings, chunk: Chunk
) -> TokenLogps:
    """linear_token_logps of checked tensors, in the name of `function`."""
    hidden, weight, bias = linear
    ignore_index = settings.numbers["ignore_index"]
    entropies, statistics = (
        settings.choices[name] == "true" for name in ("entropies", "statistics")
    )
    if not has_kernel(hidden):
        # 0 times NaN would reach the gradient of the weight.
        known = hidden.masked_fill((targets == ignore_index)[..., None], 0)
        logits = torch.nn.functional.linear(known, savable(weight), savable(bias))
        flags = {"entropies": entropies, "statistics": statistics}

        def run_by_torch():
            return token_logps(logits, targets, **{**settings.numbers, **flags})

        return in_name_of(function, "token_logps", run_by_torch)
    check_no_tangents(function, hidden=hidden, weight=weight, bias=bias)
    words, active = settings.words(), targets != ignore_index

    def run():
        return LinearTokenLogps.apply(
            hidden, weight, bias, targets, words, entropies, active, chunk
        )

    logps, found, sums = _with_index_error(function, run, targets, weight.shape[0], ignore_index)
    further = token_statistics(sums, hidden, words) if statistics else ()
    return TokenLogps(logps, found, *further)


class LinearPolicyOutput(NamedTuple):
    loss: Tensor  # scalar: float32, or float64 with the logits
    metrics: PolicyMetrics  # constants
    logps: Tensor  # like targets, constants; 0 where the mask is 0
    entropies: Tensor | None  # the same, where asked for or needed


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    bias: Tensor | None = None,
    *,
    objective: str = "grpo",
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    offsets: Tensor | None = None,
    normalizer: Normalizer | None = None,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float = 0.0,
    entropies: bool = False,
    ignore_index: int = -100,
    chunk_bytes: int = 256 << 20,
    rows_per_chunk: int = 0,
    **options: Value,
) -> LinearPolicyOutput:
    """policy_loss(linear_token_logps(hidden, weight, targets, bias)), never holding all logits.

    hidden  [B, T, H], or packed [N, H] with offsets; targets, response_mask and the rest of the
            batch like policy_loss. Positions with mask 0 are not multiplied, whatever they hold

    Differentiable once in hidden, weight and bias. Where the ratio is that of a token, loss and
    gradients come in one walk over chunks of tokens, three matrix products, and backward is a
    scaling. Ratios of sequences (level=...) need all log-probabilities first: four products, or
    three where they are one chunk.
    """
    function = "linear_policy_loss"
    settings = {
        "temperature": temperature,
        "scale": scale,
        "softcap": softcap,
        "ignore_index": ignore_index,
        "entropies": entropies,
        "statistics": False,
    }
    linear, targets, rows = _checked_linear(
        function, Linear(hidden, weight, bias), targets, settings, chunk_bytes, rows_per_chunk
    )
    batch = {
        "advantages": advantages,
        "response_mask": response_mask,
        "old_logps": old_logps,
        "ref_logps": ref_logps,
        "offsets": offsets,
    }
    counts = denominators(function, normalizer)
    call = objective_call(
        "policy_loss",
        {"logps": _stand_in(linear, targets), "entropies": None, **batch},
        objective,
        options,
        counts,
        function=function,
    )
    taken = {name: call.tensors[name] for name in batch}
    active = targets.masked_fill(taken["response_mask"] == 0, ignore_index)
    bonus = float(call.settings.numbers.get("entropy_coef", 0)) != 0
    asked = entropies or bonus
    rows.settings.choices["entropies"] = "true" if asked else "false"
    chunk = chunk_of(linear.weight, chunk_bytes, rows_per_chunk)
    default = objectives()[objective].choices["level"].default
    if call.settings.choices.get("level", default) != "token" or not has_kernel(hidden):
        made = _linear_token_logps(function, linear, active, rows.settings, chunk)
        found = None if made.entropies is None else made.entropies.detach()

        def run_by_logps():
            return policy_loss(
                made.logps,
                objective=objective,
                entropies=made.entropies if bonus else found,
                normalizer=normalizer,
                **batch,
                **options,
            )

        out = in_name_of(function, "policy_loss", run_by_logps)
        return LinearPolicyOutput(out.loss, out.metrics, made.logps.detach(), found)
    check_no_tangents(function, hidden=hidden, weight=weight, bias=bias)

    def run():
        return LinearPolicyLoss.apply(
            *linear,
            active,
            tuple(taken.values()),
            call.settings.words(),
            rows.settings.words(),
            asked,
            chunk,
            [
                torch.is_grad_enabled() and each is not None and each.requires_grad
                for each in linear
            ],
        )

    loss, logps, found, sums, maxima = _with_index_error(
        function, run, active, weight.shape[0], ignore_index
    )
    return LinearPolicyOutput(loss, PolicyMetrics(sums, maxima), logps, found)


def linear_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ref_logps: Tensor | None = None,
    response_mask: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    objective: str = "dpo",
    offsets: Tensor | None = None,
    pairs: Number | None = None,
    world_size: Number = 1,
    loss_scale: Number = 1,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float = 0.0,
    ignore_index: int = -100,
    chunk_bytes: int = 256 << 20,
    rows_per_chunk: int = 0,
    **options: Value,
) -> PreferenceLoss:
    """preference_loss(linear_token_logps(hidden, weight, targets, bias)), never holding all logits.

    hidden         [2 B, T, H], or packed [N, H] with offsets, chosen answers first; targets,
                   ref_logps and the rest like preference_loss
    response_mask  always needed; positions with mask 0 are not multiplied, whatever they hold

    Differentiable once in hidden, weight and bias. A pair needs the log-probabilities of both
    answers first: four matrix products, or three where they are one chunk.
    """
    function = "linear_preference_loss"
    check_given(f"{function}: response_mask", response_mask)
    settings = {
        "temperature": temperature,
        "scale": scale,
        "softcap": softcap,
        "ignore_index": ignore_index,
        "entropies": False,
        "statistics": False,
    }
    linear, targets, rows = _checked_linear(
        function, Linear(hidden, weight, bias), targets, settings, chunk_bytes, rows_per_chunk
    )
    counts = {"pairs": pairs, "world_size": world_size, "scale": loss_scale}
    logps = _stand_in(linear, targets)
    call = preference_call(
        function, logps, ref_logps, response_mask, offsets, objective, options, counts
    )
    mask = call.tensors["response_mask"].view(targets.shape)
    active = targets.masked_fill(mask == 0, ignore_index)
    chunk = chunk_of(linear.weight, chunk_bytes, rows_per_chunk)
    made = _linear_token_logps(function, linear, active, rows.settings, chunk)

    def run():
        return preference_loss(
            made.logps,
            ref_logps,
            response_mask,
            objective=objective,
            offsets=offsets,
            pairs=pairs,
            world_size=world_size,
            loss_scale=loss_scale,
            **options,
        )

    return in_name_of(function, "preference_loss", run)


def categorical_kl(
    q_logits: Tensor,
    p_logits: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
) -> CategoricalKl:
    """KL(q || p), KL(p || q) and H(q) over the whole vocabulary, exact [nats].

    q_logits, p_logits  [..., V]: the same dtype and shape, of any strides; q = softmax(q_logits /
                        temperature). -inf in both is a column that is not there
    mask                [...] bool: positions with False are not read and get zeros

    Differentiable once in both. On the CPU one pass over both; else `tether.reference`.
    """
    function = "categorical_kl"
    tensors = {"q_logits": q_logits, "p_logits": p_logits, "mask": mask}
    call = FUNCTIONS[function].call(tensors, {"temperature": temperature})
    if not has_kernel(q_logits):
        return CategoricalKl(
            *reference.categorical_kl(q_logits, p_logits, mask=mask, temperature=temperature)
        )
    check_no_tangents(function, q_logits=q_logits, p_logits=p_logits)

    def run():
        return ops.categorical_kl_forward(q_logits, p_logits, mask, *call.settings.words())

    return CategoricalKl(*in_name_of(function, "logits_kl_statistics", run)[:3])


def _result_type(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


# ---- checks --------------------------------------------------------------------------------------


def _check_buffer(where: str, buffer: Tensor, logits: Tensor) -> None:
    check_given(where, buffer)
    if buffer.dtype != logits.dtype:
        raise TypeError(
            f"{where} must be {dtype_text(logits.dtype)} like logits, got "
            f"{dtype_text(buffer.dtype)}"
        )
    check_device(where, buffer, "logits", logits)
    if buffer.shape != logits.shape:
        raise ValueError(
            f"{where} must be {shape_text(logits)} like logits, got {shape_text(buffer)}"
        )
    if not buffer.is_contiguous():
        raise ValueError(f"{where} must be contiguous, got strides {list(buffer.stride())}")
    ours, theirs = (
        range(each.data_ptr(), each.data_ptr() + each.numel() * each.element_size())
        for each in (buffer, logits)
    )
    same = ours == theirs and logits.is_contiguous()
    shared = buffer.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()
    if shared and not same and (max(ours.start, theirs.start) < min(ours.stop, theirs.stop)):
        raise ValueError(
            f"{where} must be logits themselves or share no memory with them, got an overlap"
        )
    if buffer.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(f"{where} must not be made under inference_mode, got one that was")
    if buffer is not logits and buffer.requires_grad:
        raise ValueError(f"{where} must not require a gradient, got one that does")


def _check_shard(where: str, shard: VocabularyShard, logits: Tensor) -> None:
    if not isinstance(shard, VocabularyShard):
        raise TypeError(f"{where} must be a VocabularyShard, got {type(shard).__name__}")
    for name in ("first_id", "ids"):
        value = getattr(shard, name)
        if not isinstance(value, int):
            raise TypeError(f"{where}.{name} must be an int, got {type(value).__name__}")
    if not callable(shard.gather):
        raise TypeError(f"{where}.gather must be callable, got {type(shard.gather).__name__}")
    columns = logits.shape[-1]
    if shard.ids < columns:
        raise ValueError(
            f"{where}.ids must be at least {columns} like logits {shape_text(logits)}, got "
            f"{shard.ids}"
        )
    if not 0 <= shard.first_id <= shard.ids - columns:
        raise ValueError(
            f"{where}.first_id must be in [0, {shard.ids - columns}], got {shard.first_id}"
        )


def _stand_in(linear: Linear, targets: Tensor) -> Tensor:
    """For the checks, log-probabilities that are still to be made."""
    return linear.hidden.new_zeros(targets.shape, dtype=_result_type(linear.hidden))


def _checked_linear(
    function: str,
    linear: Linear,
    targets: Tensor,
    settings: dict[str, Value],
    chunk_bytes: int,
    rows_per_chunk: int,
) -> tuple[Linear, Tensor, Call]:
    """The tensors in one dtype; the targets as int64, contiguous."""
    check_integers(
        function,
        ignore_index=settings["ignore_index"],
        chunk_bytes=chunk_bytes,
        rows_per_chunk=rows_per_chunk,
    )
    tensors = {**linear._asdict(), "targets": targets}
    call = FUNCTIONS["linear_token_logps"].call(tensors, settings, function)
    if chunk_bytes < 1:
        raise ValueError(f"{function}: chunk_bytes must be at least 1, got {chunk_bytes}")
    if rows_per_chunk < 0:
        raise ValueError(f"{function}: rows_per_chunk must be at least 0, got {rows_per_chunk}")
    return linear.in_one_dtype(), targets.to(torch.int64).contiguous(), call


def _with_index_error(function: str, run, targets: Tensor, vocabulary: int, ignore_index: int):
    """run(); what the operator says of a bad id becomes an IndexError with its place."""
    try:
        return run()
    except ValueError as error:
        if ": targets must be in [" not in str(error):
            raise
        bad = ((targets < 0) | (targets >= vocabulary)) & (targets != ignore_index)
        place = bad.nonzero()[0].tolist()
        raise IndexError(
            f"{function}: targets must be in [0, {vocabulary}) or ignore_index {ignore_index}, "
            f"got {targets[tuple(place)].item()} at {place}"
        ) from None
