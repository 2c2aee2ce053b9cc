"""Autograd and tracing of the operators behind tether.logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tether import _ops
from tether._checks import dtype_text, kind_of, result_dtype, savable, shape_text
from tether._cuda_shards import block_of, merged
from tether._ops import ops
from tether.reference.logps import multiplier

STATISTICS, _KL_STATISTICS = 8, 9  # float64 numbers a row
_ON_CUDA = 7  # float32: the RowState of logits/rows_cuda.h


def again(function: str) -> str:
    return (
        f"{function}: the gradient must not be differentiated again, got a second backward. "
        "Detach it, or use torch.log_softmax for second derivatives"
    )


def check_no_batch(function: str, *gradients: Tensor | None) -> None:
    """Of gradients that arrive: what writes to memory cannot be mapped over them."""
    if torch.compiler.is_compiling():
        return
    is_batch = torch._C._functorch.is_legacy_batchedtensor
    if any(each is not None and is_batch(each) for each in gradients):
        raise NotImplementedError(
            f"{function}: gradients must arrive one at a time, got a batch of them. Use "
            "torch.func.jacrev in place of is_grads_batched"
        )


def like_result(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[:-1], dtype=result_dtype(logits))


def new_statistics(like: Tensor, rows: int) -> Tensor:
    """For what operators leave of each row, on the device of `like`."""
    if _ops.on_cuda(like):
        return like.new_empty((rows, _ON_CUDA), dtype=torch.float32)
    return like.new_empty((rows, STATISTICS), dtype=torch.float64)


def doubles(upstream: Tensor | None) -> Tensor | None:
    """[N], as the operators read it: side by side, whatever the strides of the upstream are. Those
    on CUDA read float32."""
    if upstream is None:
        return None
    dtype = torch.float32 if _ops.on_cuda(upstream) else torch.float64
    return upstream.to(dtype).contiguous().view(-1)


# ---- token_logps ---------------------------------------------------------------------------------


def _like_results(logits: Tensor, targets: Tensor, words: Sequence) -> tuple[Tensor, ...]:
    """logps, entropies and statistics."""
    asked = "true" in words[3]
    entropies = like_result(logits) if asked else logits.new_empty((0,)).float()
    return like_result(logits), entropies, new_statistics(logits, targets.numel())


@torch.library.register_fake("tether::token_logps_forward")
def _(logits, targets, _, *words):
    return _like_results(logits, targets, words)


@torch.library.register_fake("tether::shard_statistics")
def _(logits, targets, *_):
    return logits.new_empty((1 + targets.numel(), STATISTICS), dtype=torch.float64)


@torch.library.register_fake("tether::token_logps_of_shards")
def _(blocks, targets, logits, *words):
    return _like_results(logits, targets, words)


@torch.library.register_fake("tether::token_statistics")
def _(statistics, inputs, *_):
    return like_result(inputs), like_result(inputs), like_result(inputs)


def token_statistics(statistics, inputs, settings):
    """sum_of_squared_p, mean_logits, target_is_largest of rows of logits or of hidden states."""
    if _ops.on_cuda(statistics):
        return _token_statistics_on_cuda(statistics, inputs.shape[:-1], settings.numbers)
    *values, largest = ops.token_statistics(statistics, inputs.detach(), *settings.words())
    return *values, largest.bool()


def _token_statistics_on_cuda(statistics, shape, numbers):
    reference, total, _, target, squares, logits, columns = statistics.unbind(-1)
    means = logits / columns * multiplier(**numbers)
    found = squares / total.square(), means, (target >= reference) & (total > 0)
    return tuple(each.view(shape) for each in found)


@torch.library.register_fake("tether::token_logps_backward")
def _(*_):
    return None


class TokenGradient(torch.autograd.Function):
    """The gradient of the logits; a Function of its own so that a second backward raises."""

    @staticmethod
    def forward(ctx, logits, targets, support, statistics, dlogps, dentropies, words, buffer):
        check_no_batch("token_logps", dlogps, dentropies)
        dlogits = buffer
        if dlogits is None:
            dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
        ops.token_logps_backward(
            logits,
            targets,
            support,
            statistics,
            doubles(dlogps),
            doubles(dentropies),
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
    logits, targets, support, ctx.names, values, *ctx.choices = inputs
    asked = "true" in ctx.choices[1]
    ctx.mark_non_differentiable(output[2], *(() if asked else (output[1],)))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, savable(targets), savable(support), output[2], values)


def _backward(ctx, dlogps, dentropies, _):
    dlogits = None
    if dlogps is not None or dentropies is not None:
        *saved, values = ctx.saved_tensors
        words = (ctx.names, values, *ctx.choices)
        dlogits = TokenGradient.apply(*saved, dlogps, dentropies, words, None)
    return dlogits, *[None] * 6


torch.library.register_autograd("tether::token_logps_forward", _backward, setup_context=_setup)


def token_logps_forward(*arguments):
    """Of tensors that are what they seem, where nothing is for autograd."""
    return _ops.below_autograd(ops.token_logps_forward.default, *arguments)


class TokenLogpsOfCaller(torch.autograd.Function):
    """token_logps outside of graphs: of a shard, which it gathers, too, and with a gradient that
    goes to memory of the caller."""

    @staticmethod
    def forward(ctx, logits, targets, support, words, with_entropies, buffer, shard):
        ctx.words = words
        ctx.buffer, ctx.version, ctx.view_of_leaf = None, None, False
        if buffer is not None:
            ctx.buffer = buffer.detach()
            ctx.view_of_leaf = logits._base is not None and logits._base.is_leaf
            ctx.version = None if buffer.is_inference() else buffer._version
        if shard is None:
            out = token_logps_forward(logits, targets, support, *words)
        elif _ops.on_cuda(logits):
            states = ops.token_logps_forward(logits, targets, support, *words)[2]
            ours = block_of(states, logits.shape[-1], targets, words)
            out = merged(gathered(shard, ours), targets, words)
        else:
            ours = ops.shard_statistics(logits, targets, support, *words)
            out = ops.token_logps_of_shards(gathered(shard, ours), targets, logits, *words)
        logps, entropies, statistics = out
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, savable(targets), savable(support), statistics)
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
        return dlogits, *[None] * 6


def gathered(shard, ours: Tensor) -> Tensor:
    """[shards, 1 + N, 8] of all ranks, each with the header of its shard."""
    where = "token_logps: shard.gather must return"
    shards = shard.gather(ours)
    if not isinstance(shards, Tensor):
        raise TypeError(f"{where} a tensor, got {kind_of(shards)}")
    if shards.layout != torch.strided:
        raise TypeError(f"{where} a dense tensor, got {dtype_text(shards.layout)}")
    right = shards.dim() == 3 and shards.shape[0] >= 1 and shards.shape[1:] == ours.shape
    if not right or shards.dtype != ours.dtype or shards.device != ours.device:
        raise ValueError(
            f"{where} float64 [shards, {ours.shape[0]}, {STATISTICS}] on {ours.device}, got "
            f"{dtype_text(shards.dtype)} {shape_text(shards)} on {shards.device}"
        )
    return shards.contiguous()


# ---- categorical_kl ------------------------------------------------------------------------------


@torch.library.register_fake("tether::categorical_kl_forward")
def _(q_logits, p_logits, mask, *_):
    result = like_result(q_logits)
    rows = 0 if q_logits.is_cuda else result.numel()  # there backward reads the logits alone
    statistics = q_logits.new_empty((rows, _KL_STATISTICS), dtype=torch.float64)
    return result, torch.empty_like(result), torch.empty_like(result), statistics


@torch.library.register_fake("tether::categorical_kl_backward")
def _(q_logits, p_logits, support, statistics, upstream, *words_and_wanted):
    with_q, with_p = words_and_wanted[-2:]

    def gradient(wanted):
        return q_logits.new_empty(q_logits.shape if wanted else (0,))

    return gradient(with_q), gradient(with_p)


class _KlGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_logits, p_logits, support, statistics, upstream, words, with_q, with_p):
        return ops.categorical_kl_backward(
            q_logits, p_logits, support, statistics, upstream, *words, with_q, with_p
        )

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(again("categorical_kl"))


def _setup_kl(ctx, inputs, output):
    q_logits, p_logits, mask, support, ctx.names, values, *ctx.choices = inputs
    ctx.mark_non_differentiable(output[3])
    ctx.set_materialize_grads(False)
    saved = (q_logits, p_logits, output[3], mask, support, values)
    ctx.save_for_backward(*map(savable, saved))


def _kl_backward(ctx, *upstreams):
    q_logits, p_logits, statistics, mask, support, values = ctx.saved_tensors
    if all(each is None for each in upstreams[:3]):
        return (None,) * 8
    zero = statistics.new_zeros(q_logits.shape[:-1])
    upstream = torch.stack(
        [zero if each is None else each.to(torch.float64) for each in upstreams[:3]], -1
    )
    if mask is not None:
        upstream = upstream.masked_fill(~mask[..., None], 0)
    with_q, with_p = ctx.needs_input_grad[:2]
    words = (ctx.names, values, *ctx.choices)
    dq, dp = _KlGradient.apply(
        q_logits, p_logits, support, statistics, upstream.contiguous(), words, with_q, with_p
    )
    return dq if with_q else None, dp if with_p else None, *[None] * 6


torch.library.register_autograd(
    "tether::categorical_kl_forward", _kl_backward, setup_context=_setup_kl
)
