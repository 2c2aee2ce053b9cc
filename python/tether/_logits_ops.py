"""Autograd and tracing of the operators behind tether.logits."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tether._checks import dtype_text, savable, shape_text
from tether._ops import ops, scaled

STATISTICS, _KL_STATISTICS = 8, 9  # float64 numbers a row
_IGNORED_ROW = (0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0)  # ignored_row() of logits/rows.h


def again(function: str) -> str:
    return (
        f"{function}: the gradient must not be differentiated again, got a second backward. "
        "Detach it, or use torch.log_softmax for second derivatives"
    )


def _like_result(logits: Tensor) -> Tensor:
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty(logits.shape[:-1], dtype=wide)


def _doubles(upstream: Tensor | None) -> Tensor | None:
    """[N], as the operators read it: side by side, whatever the strides of the upstream are."""
    return None if upstream is None else upstream.to(torch.float64).contiguous().view(-1)


def _without_autocast(function):
    """Matrix products inside are in the dtype of their tensors, which the caller has chosen."""

    @functools.wraps(function)
    def run(*arguments):
        with torch.autocast("cpu", enabled=False):
            return function(*arguments)

    return run


# ---- token_logps ---------------------------------------------------------------------------------


def _like_results(logits: Tensor, targets: Tensor, words: Sequence) -> tuple[Tensor, ...]:
    """logps, entropies and statistics."""
    asked = "true" in words[3]
    entropies = _like_result(logits) if asked else logits.new_empty((0,)).float()
    statistics = logits.new_empty((targets.numel(), STATISTICS), dtype=torch.float64)
    return _like_result(logits), entropies, statistics


@torch.library.register_fake("tether::token_logps_forward")
def _(logits, targets, *words):
    return _like_results(logits, targets, words)


@torch.library.register_fake("tether::shard_statistics")
def _(logits, targets, *_):
    return logits.new_empty((1 + targets.numel(), STATISTICS), dtype=torch.float64)


@torch.library.register_fake("tether::token_logps_of_shards")
def _(blocks, targets, logits, *words):
    return _like_results(logits, targets, words)


@torch.library.register_fake("tether::token_statistics")
def _(statistics, inputs, *_):
    return _like_result(inputs), _like_result(inputs), _like_result(inputs)


def token_statistics(statistics, inputs, words):
    """sum_of_squared_p, mean_logits, target_is_largest of rows of logits or of hidden states."""
    *values, largest = ops.token_statistics(statistics, inputs.detach(), *words)
    return *values, largest.bool()


@torch.library.register_fake("tether::token_logps_backward")
def _(*_):
    return None


class TokenGradient(torch.autograd.Function):
    """The gradient of the logits; a Function of its own so that a second backward raises."""

    @staticmethod
    def forward(ctx, logits, targets, statistics, dlogps, dentropies, words, buffer):
        dlogits = buffer
        if dlogits is None:
            dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
        ops.token_logps_backward(
            logits,
            targets,
            statistics,
            _doubles(dlogps),
            _doubles(dentropies),
            *words,
            dlogits,
        )
        if buffer is None:
            return dlogits
        # Whoever else has saved the tensor learns that it has changed.
        torch.autograd.graph.increment_version(buffer)
        return buffer.detach()

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(again("token_logps"))


def _setup(ctx, inputs, output):
    logits, targets, ctx.names, values, *ctx.choices = inputs
    asked = "true" in ctx.choices[1]
    ctx.mark_non_differentiable(output[2], *(() if asked else (output[1],)))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, savable(targets), output[2], values)


def _backward(ctx, dlogps, dentropies, _):
    dlogits = None
    if dlogps is not None or dentropies is not None:
        *saved, values = ctx.saved_tensors
        words = (ctx.names, values, *ctx.choices)
        dlogits = TokenGradient.apply(*saved, dlogps, dentropies, words, None)
    return dlogits, *[None] * 5


torch.library.register_autograd("tether::token_logps_forward", _backward, setup_context=_setup)


class TokenLogpsOfCaller(torch.autograd.Function):
    """token_logps of a shard, which it gathers, or whose gradient goes to memory of the caller."""

    @staticmethod
    def forward(ctx, logits, targets, words, with_entropies, buffer, shard):
        ctx.words = words
        ctx.buffer, ctx.version, ctx.view_of_leaf = None, None, False
        if buffer is not None:
            ctx.buffer = buffer.detach()
            ctx.view_of_leaf = logits._base is not None and logits._base.is_leaf
            ctx.version = None if buffer.is_inference() else buffer._version
        if shard is None:
            out = ops.token_logps_forward(logits, targets, *words)
        else:
            ours = ops.shard_statistics(logits, targets, *words)
            out = ops.token_logps_of_shards(_gathered(shard, ours), targets, logits, *words)
        logps, entropies, statistics = out
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, savable(targets), statistics)
        return logps, (entropies if with_entropies else None), statistics

    @staticmethod
    def backward(ctx, dlogps, dentropies, _):
        dlogits = None
        if dlogps is not None or dentropies is not None:
            saved = ctx.saved_tensors  # torch's own error first, where the buffer is the logits
            if ctx.buffer is not None and ctx.buffer._version != ctx.version:
                raise ValueError(
                    "token_logps: gradient_buffer must be used for nothing else until backward, "
                    "got one that has changed. Give each call a buffer of its own"
                )
            dlogits = TokenGradient.apply(*saved, dlogps, dentropies, ctx.words, ctx.buffer)
        if ctx.buffer is not None and dlogits is not None:
            # A leaf keeps a gradient as its .grad if nobody else holds it, and the next call would
            # write there: held here, it is copied. Views hand on tensors of their own.
            ctx.held = dlogits
            dlogits = dlogits.clone() if ctx.view_of_leaf else dlogits
        return dlogits, *[None] * 5


def _gathered(shard, ours: Tensor) -> Tensor:
    """[shards, 1 + N, 8] of all ranks, each with the header of its shard."""
    where = "token_logps: shard.gather must return"
    shards = shard.gather(ours)
    if not isinstance(shards, Tensor):
        raise TypeError(f"{where} a tensor, got {type(shards).__name__}")
    right = shards.dim() == 3 and shards.shape[0] >= 1 and shards.shape[1:] == ours.shape
    if not right or shards.dtype != ours.dtype or shards.device != ours.device:
        raise ValueError(
            f"{where} float64 [shards, {ours.shape[0]}, {STATISTICS}] on cpu, got "
            f"{dtype_text(shards.dtype)} {shape_text(shards)} on {shards.device}"
        )
    return shards.contiguous()


# ---- linear_token_logps --------------------------------------------------------------------------


def _rows_of(condition: Tensor) -> Tensor | None:
    """The places where it holds; None if everywhere."""
    return None if bool(condition.all()) else condition.nonzero()[:, 0]


class Chunk(NamedTuple):
    """How many rows of logits exist at a time: about so many, or exactly, the last ones padded."""

    rows: int
    padded: bool

    def pieces(self, count: int) -> list[tuple[int, int]]:
        parts = -(-count // self.rows)
        if self.padded:
            return [(i * self.rows, min((i + 1) * self.rows, count)) for i in range(parts)]
        return [(count * i // parts, count * (i + 1) // parts) for i in range(parts)]


def chunk_of(weight: Tensor, chunk_bytes: int, rows_per_chunk: int) -> Chunk:
    if rows_per_chunk > 0:
        return Chunk(rows_per_chunk, True)
    return Chunk(max(chunk_bytes // (weight.shape[0] * weight.element_size()), 1), False)


class LinearTokenLogps(torch.autograd.Function):
    """The walks of libtorch/linear_token_logps.cc: one product a chunk, then two more."""

    @staticmethod
    @_without_autocast
    def forward(ctx, hidden, weight, bias, targets, words, with_entropies, active, chunk):
        shape, targets = targets.shape, targets.reshape(-1)
        rows = hidden.reshape(-1, hidden.shape[-1])
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logps = hidden.new_zeros(targets.shape, dtype=wide)
        entropies = torch.zeros_like(logps) if with_entropies else None
        statistics = hidden.new_tensor(_IGNORED_ROW, dtype=torch.float64)
        statistics = statistics.repeat(targets.numel(), 1)
        ctx.chunk, ctx.kept = chunk, None
        active = active.reshape(-1)
        for places, logits in _logits_of_chunks(rows, weight, bias, active, chunk):
            part = ops.token_logps_forward(logits, targets[places], *words)
            logps[places], statistics[places] = part[0], part[2]
            if with_entropies:
                entropies[places] = part[1]
            if logits.shape[0] == active.sum() and any(ctx.needs_input_grad[:3]):
                ctx.kept = logits
        ctx.words, ctx.active = words, active
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*map(savable, (hidden, weight, bias, targets)), statistics)
        return logps.view(shape), (entropies.view(shape) if with_entropies else None), statistics

    @staticmethod
    def backward(ctx, dlogps, dentropies, _):
        gradients = [None] * 3
        if dlogps is not None or dentropies is not None:
            # Kept logits become their gradient; another backward makes them again.
            kept, ctx.kept = ctx.kept, None
            gradients = _LinearGradient.apply(
                *ctx.saved_tensors,
                dlogps,
                dentropies,
                ctx.words,
                ctx.active,
                ctx.chunk,
                kept,
                tuple(ctx.needs_input_grad[:3]),
            )
        return *gradients, *[None] * 5


def _logits_of_chunks(hidden, weight, bias, active, chunk, kept=None):
    """(places, logits) of one chunk of active rows after another, all in one buffer."""
    rows = _rows_of(active)
    count = hidden.shape[0] if rows is None else rows.numel()
    if count == 0:
        return
    if kept is not None and kept.shape[0] == count:
        yield (slice(0, count) if rows is None else rows), kept
        return
    pieces = chunk.pieces(count)
    largest = chunk.rows if chunk.padded else max(end - begin for begin, end in pieces)
    buffer = weight.new_empty(largest, weight.shape[0])
    for begin, end in pieces:
        places = slice(begin, end) if rows is None else rows[begin:end]
        inputs, product = hidden[places], buffer[: end - begin]
        if chunk.padded:
            inputs = torch.nn.functional.pad(inputs, (0, 0, 0, chunk.rows - (end - begin)))
            inputs = inputs.contiguous()  # bits depend on strides too
            product = buffer
        if bias is None:
            torch.mm(inputs, weight.t(), out=product)
        else:
            torch.addmm(bias, inputs, weight.t(), out=product)
        yield places, buffer[: end - begin]


class _Gradients:
    """Sums over chunks of what the gradients of logits give hidden, weight and bias."""

    def __init__(self, hidden, weight, wanted):
        self.weight, self.wanted = weight, wanted
        # Sums of many chunks of half weights are in float32.
        self.wide = torch.float32 if weight.element_size() == 2 else weight.dtype
        self.dhidden = torch.zeros_like(hidden) if wanted[0] else None
        self.dweight = self.dbias = None

    def add(self, places, dlogits, hidden):
        if self.wanted[0]:
            self.dhidden[places] = dlogits @ self.weight
        if self.wanted[1] and self.dweight is not None and self.wide == self.weight.dtype:
            self.dweight.addmm_(dlogits.t(), hidden[places])
        elif self.wanted[1]:
            self.dweight = self._sum(self.dweight, dlogits.t() @ hidden[places])
        if self.wanted[2]:
            self.dbias = self._sum(self.dbias, dlogits.sum(0, dtype=self.wide))

    def _sum(self, sum_so_far, part):
        if sum_so_far is None:
            return part
        return sum_so_far.to(self.wide).add_(part)

    def taken(self, hidden):
        def like(shape, value, wanted):
            if not wanted:
                return None
            return self.weight.new_zeros(shape) if value is None else value.to(self.weight.dtype)

        return (
            None if self.dhidden is None else self.dhidden.view(hidden.shape),
            like(self.weight.shape, self.dweight, self.wanted[1]),
            like(self.weight.shape[:1], self.dbias, self.wanted[2]),
        )


class _LinearGradient(torch.autograd.Function):
    @staticmethod
    @_without_autocast
    def forward(
        ctx,
        hidden,
        weight,
        bias,
        targets,
        statistics,
        dlogps,
        dentropies,
        words,
        known,
        chunk,
        kept,
        wanted,
    ):
        upstreams = [_doubles(dlogps), _doubles(dentropies)]
        active = torch.zeros_like(targets, dtype=torch.bool)
        for each in upstreams:
            if each is not None:
                active |= each != 0
        active &= known
        flat = hidden.reshape(-1, hidden.shape[-1])
        gradients = _Gradients(flat, weight, wanted)
        for places, logits in _logits_of_chunks(flat, weight, bias, active, chunk, kept):
            ops.token_logps_backward(
                logits,
                targets[places],
                statistics[places],
                *(None if each is None else each[places] for each in upstreams),
                *words,
                logits,
            )
            gradients.add(places, logits, flat)
        return gradients.taken(hidden)

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(again("linear_token_logps"))


class LinearPolicyLoss(torch.autograd.Function):
    """Loss and gradients in one walk; backward is a scaling."""

    @staticmethod
    @_without_autocast
    def forward(
        ctx, hidden, weight, bias, targets, batch, words, row_words, with_entropies, chunk, wanted
    ):
        mask = batch[1]
        flat, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        active = (mask != 0).reshape(-1)
        places = active.nonzero()[:, 0]
        gradients = _Gradients(flat, weight, wanted)
        result = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logps = hidden.new_zeros(targets.shape, dtype=result)
        entropies = torch.zeros_like(logps) if with_entropies else None
        loss = hidden.new_zeros((), dtype=torch.float64)
        sums, maxima, begin = None, None, 0
        # A batch without tokens still has a loss and metrics: those of a chunk of none.
        none = [(places, weight.new_empty(0, weight.shape[0]))]
        walk = _logits_of_chunks(flat, weight, bias, active, chunk) if len(places) else none
        for chosen, logits in walk:
            end = begin + logits.shape[0]
            part = ops.policy_loss_of_logits(
                logits,
                targets[chosen],
                places[begin:end],
                *batch,
                *words,
                *row_words,
                any(wanted),
            )
            loss += part[0]
            logps[chosen] = part[1].to(result)
            if with_entropies:
                entropies[chosen] = part[2].to(result)
            sums = part[3] if sums is None else sums + part[3]
            maxima = part[4] if maxima is None else torch.maximum(maxima, part[4])
            if len(places):
                gradients.add(chosen, logits, flat)
            begin = end
        inputs = zip((hidden, weight, bias), wanted, strict=True)
        inputs = [each if needed else None for each, needed in inputs]
        ctx.save_for_backward(*gradients.taken(hidden), *inputs)
        shape = mask.shape
        entropies = None if entropies is None else entropies.view(shape)
        ctx.mark_non_differentiable(logps, sums, maxima)
        ctx.set_materialize_grads(False)
        return loss.to(result), logps.view(shape), entropies, sums, maxima

    @staticmethod
    def backward(ctx, upstream, *_):
        gradients = [None] * 3
        if upstream is not None:
            saved = ctx.saved_tensors
            for i, (each, tensor) in enumerate(zip(saved[:3], saved[3:], strict=True)):
                if each is not None:
                    gradients[i] = scaled("linear_policy_loss", upstream, each, tensor)
        return *gradients, *[None] * 7


# ---- categorical_kl ------------------------------------------------------------------------------


@torch.library.register_fake("tether::categorical_kl_forward")
def _(q_logits, p_logits, mask, *_):
    result = _like_result(q_logits)
    statistics = q_logits.new_empty((result.numel(), _KL_STATISTICS), dtype=torch.float64)
    return result, torch.empty_like(result), torch.empty_like(result), statistics


@torch.library.register_fake("tether::categorical_kl_backward")
def _(q_logits, p_logits, statistics, upstream, *words_and_wanted):
    with_q, with_p = words_and_wanted[-2:]

    def gradient(wanted):
        return q_logits.new_empty(q_logits.shape if wanted else (0,))

    return gradient(with_q), gradient(with_p)


class _KlGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_logits, p_logits, statistics, upstream, words, with_q, with_p):
        return ops.categorical_kl_backward(
            q_logits, p_logits, statistics, upstream, *words, with_q, with_p
        )

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(again("categorical_kl"))


def _setup_kl(ctx, inputs, output):
    q_logits, p_logits, mask, ctx.names, values, *ctx.choices = inputs
    ctx.mark_non_differentiable(output[3])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*map(savable, (q_logits, p_logits, output[3], mask, values)))


def _kl_backward(ctx, *upstreams):
    q_logits, p_logits, statistics, mask, values = ctx.saved_tensors
    if all(each is None for each in upstreams[:3]):
        return (None,) * 7
    zero = statistics.new_zeros(q_logits.shape[:-1])
    upstream = torch.stack(
        [zero if each is None else each.to(torch.float64) for each in upstreams[:3]], -1
    )
    if mask is not None:
        upstream = upstream.masked_fill(~mask[..., None], 0)
    with_q, with_p = ctx.needs_input_grad[:2]
    words = (ctx.names, values, *ctx.choices)
    dq, dp = _KlGradient.apply(
        q_logits, p_logits, statistics, upstream.contiguous(), words, with_q, with_p
    )
    return dq if with_q else None, dp if with_p else None, *[None] * 5


torch.library.register_autograd(
    "tether::categorical_kl_forward", _kl_backward, setup_context=_setup_kl
)
