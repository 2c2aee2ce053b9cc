"""The walks over chunks of logits behind tether.linear, with their autograd."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from tether import _ops
from tether._checks import dtype_text, result_dtype, savable, shape_text
from tether._cuda_shards import block_of, merged
from tether._logits_ops import again, check_no_batch, doubles, gathered, new_statistics
from tether._ops import ops, scaled

_IGNORED_ROW = (0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0)  # ignored_row() of logits/rows.h


def without_autocast(function):
    """Matrix products inside are in the dtype of their tensors, which the caller has chosen."""

    @functools.wraps(function)
    def run(*arguments):
        with torch.autocast(arguments[0].device.type, enabled=False):
            return function(*arguments)

    return run


def _rows_of(condition: Tensor) -> Tensor | None:
    """The places where it holds; None if everywhere, and where that would have to be waited for:
    then all are multiplied, and kernels leave the others alone."""
    if _ops.on_cuda(condition):
        return None
    return None if bool(condition.all()) else condition.nonzero()[:, 0]


def without_unknown(hidden: Tensor, known: Tensor) -> Tensor:
    """Rows [N, H] that are all multiplied: 0 times NaN would reach the gradient of the weight."""
    return hidden.masked_fill(~known[:, None], 0) if _ops.on_cuda(hidden) else hidden


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


@without_autocast
def logps_of_chunks(
    hidden, weight, bias, targets, support, words, with_entropies, active, chunk, keeps_logits
):
    """logps, entropies or None, statistics; the logits where all are one chunk and wanted."""
    shape, targets = targets.shape, targets.reshape(-1)
    rows = hidden.reshape(-1, hidden.shape[-1])
    logps = hidden.new_zeros(targets.shape, dtype=result_dtype(hidden))
    entropies = torch.zeros_like(logps) if with_entropies else None
    statistics, kept = _statistics_of(hidden, targets.numel()), None
    active = active.reshape(-1)
    for places, logits in logits_of_chunks(rows, weight, bias, active, chunk):
        part = ops.token_logps_forward(logits, targets[places], _at(support, places), *words)
        logps[places], statistics[places] = part[0], part[2]
        if with_entropies:
            entropies[places] = part[1]
        if keeps_logits and logits.shape[0] == _count_of(active):
            kept = logits
    return logps.view(shape), (entropies.view(shape) if with_entropies else None), statistics, kept


def _statistics_of(hidden: Tensor, rows: int) -> Tensor:
    if _ops.on_cuda(hidden):  # every row has its own
        return new_statistics(hidden, rows)
    return hidden.new_tensor(_IGNORED_ROW, dtype=torch.float64).repeat(rows, 1)


def _count_of(active: Tensor) -> int | Tensor:
    return active.numel() if _ops.on_cuda(active) else active.sum()


@without_autocast
def logps_of_shards(
    hidden,
    weight,
    bias,
    targets,
    support,
    words,
    with_entropies,
    active,
    chunk,
    keeps_logits,
    shard,
):
    """The same where the weight has a part of the vocabulary; what its logits leave behind goes to
    all ranks in one gather."""
    if _ops.on_cuda(hidden):
        part = (hidden, weight, bias, targets, support, words, False, active, chunk, keeps_logits)
        *_, states, kept = logps_of_chunks(*part)
        block = block_of(states, weight.shape[0], targets, words)
        logps, entropies, states = merged(gathered(shard, block), targets, words)
        return logps, (entropies if with_entropies else None), states, kept
    shape, targets = targets.shape, targets.reshape(-1)
    rows, kept = hidden.reshape(-1, hidden.shape[-1]), None
    # The header is that of all rows; of their logits it says how many columns there are.
    block = ops.shard_statistics(weight.new_zeros(targets.numel(), 1), targets, support, *words)
    block[:1, 1] = weight.shape[0]
    active = active.reshape(-1)
    for places, logits in logits_of_chunks(rows, weight, bias, active, chunk):
        part = (logits, targets[places], _at(support, places))
        block[1:][places] = ops.shard_statistics(*part, *words)[1:]
        if keeps_logits and logits.shape[0] == active.sum():
            kept = logits
    logps, entropies, statistics = ops.token_logps_of_shards(
        gathered(shard, block), targets, rows, *words
    )
    return logps.view(shape), (entropies.view(shape) if with_entropies else None), statistics, kept


def _reduced(function, shard, gradient):
    """The gradient of hidden, of all ranks where the shard says how."""
    if gradient is None or shard is None or shard.reduce is None:
        return gradient
    out = shard.reduce(gradient)
    if not isinstance(out, Tensor) or out.shape != gradient.shape or out.dtype != gradient.dtype:
        tensor = isinstance(out, Tensor)
        got = f"{dtype_text(out.dtype)} {shape_text(out)}" if tensor else type(out).__name__
        raise ValueError(
            f"{function}: shard.reduce must return the sum, "
            f"{dtype_text(gradient.dtype)} {shape_text(gradient)}, got {got}"
        )
    return out


class LinearTokenLogps(torch.autograd.Function):
    """The walks of libtorch/linear_token_logps.cc: one product a chunk, then two more."""

    @staticmethod
    def forward(
        ctx,
        hidden,
        weight,
        bias,
        targets,
        support,
        words,
        with_entropies,
        active,
        chunk,
        shard,
        function,
    ):
        linear, keeps_logits = (hidden, weight, bias), any(ctx.needs_input_grad[:3])
        walk = (*linear, targets, support, words, with_entropies, active, chunk, keeps_logits)
        out = logps_of_chunks(*walk) if shard is None else logps_of_shards(*walk, shard)
        logps, entropies, statistics, kept = out
        ctx.kept = {"logits": kept}
        ctx.words, ctx.active, ctx.chunk = words, active, chunk
        ctx.shard, ctx.function = shard, function
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*map(savable, (*linear, targets, support)), statistics)
        return logps, entropies, statistics

    @staticmethod
    def backward(ctx, dlogps, dentropies, _):
        gradients = [None] * 3
        if dlogps is not None or dentropies is not None:
            # Kept logits become their gradient; another backward, of another thread too, makes them
            # again.
            kept = ctx.kept.pop("logits", None)
            gradients = _LinearGradient.apply(
                *ctx.saved_tensors,
                dlogps,
                dentropies,
                ctx.words,
                ctx.active,
                ctx.chunk,
                kept,
                tuple(ctx.needs_input_grad[:3]),
                ctx.shard,
                ctx.function,
            )
        return *gradients, *[None] * 8


def _at(support: Tensor | None, places) -> Tensor | None:
    """The kept ids [n, K] of some rows."""
    return None if support is None else support.view(-1, support.shape[-1])[places]


def logits_of_chunks(hidden, weight, bias, active, chunk, kept=None):
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


class Gradients:
    """Sums over chunks of what the gradients of logits give hidden, weight and bias."""

    def __init__(self, hidden, weight, wanted, *, alone=False):
        """`alone`: one chunk, whose products are rounded once anyway."""
        self.weight, self.wanted, self.alone = weight, wanted, alone
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
            self._add_wide(dlogits.t(), hidden[places])
        if self.wanted[2]:
            self.dbias = self._sum(self.dbias, dlogits.sum(0, dtype=self.wide))

    def _add_wide(self, a, b):
        """The gradient of the weight. Where torch can, nothing is rounded to half on its way."""
        if not _ops.on_cuda(a) or self.alone or a.dtype == self.wide:
            self.dweight = self._sum(self.dweight, a @ b)
        elif self.dweight is None:
            self.dweight = torch.mm(a, b, out_dtype=self.wide)
        else:
            torch.addmm(self.dweight, a, b, out_dtype=self.wide, out=self.dweight)

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


@without_autocast
def gradient_of_chunks(
    hidden,
    weight,
    bias,
    targets,
    support,
    statistics,
    dlogps,
    dentropies,
    words,
    known,
    chunk,
    kept,
    wanted,
):
    """Of hidden, weight and bias, None where not wanted."""
    upstreams = [doubles(dlogps), doubles(dentropies)]
    targets, known = targets.reshape(-1), known.reshape(-1)
    active = torch.zeros_like(targets, dtype=torch.bool)
    for each in upstreams:
        if each is not None:
            active |= each != 0
    active &= known
    flat = without_unknown(hidden.reshape(-1, hidden.shape[-1]), active)
    gradients = Gradients(flat, weight, wanted, alone=len(flat) <= chunk.rows)
    for places, logits in logits_of_chunks(flat, weight, bias, active, chunk, kept):
        ops.token_logps_backward(
            logits,
            targets[places],
            _at(support, places),
            statistics[places],
            *(None if each is None else each[places] for each in upstreams),
            *words,
            logits,
        )
        gradients.add(places, logits, flat)
    return gradients.taken(hidden)


class _LinearGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        *walk, shard, ctx.function = arguments
        check_no_batch(ctx.function, *walk[6:8])
        dhidden, *others = gradient_of_chunks(*walk)
        return _reduced(ctx.function, shard, dhidden), *others

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(again(ctx.function))


@without_autocast
def loss_of_chunks(
    hidden, weight, bias, targets, batch, words, row_words, with_entropies, chunk, wanted, _
):
    """(loss, logps, entropies or None, sums, maxima), and the gradients."""
    mask = batch[1]
    flat, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    active = (mask != 0).reshape(-1)
    places = active.nonzero()[:, 0]
    gradients = Gradients(flat, weight, wanted)
    result = result_dtype(hidden)
    logps = hidden.new_zeros(targets.shape, dtype=result)
    entropies = torch.zeros_like(logps) if with_entropies else None
    loss = hidden.new_zeros((), dtype=torch.float64)
    sums, maxima, begin = None, None, 0
    # A batch without tokens still has a loss and metrics: those of a chunk of none.
    none = [(places, weight.new_empty(0, weight.shape[0]))]
    walk = logits_of_chunks(flat, weight, bias, active, chunk) if len(places) else none
    for chosen, logits in walk:
        end = begin + logits.shape[0]
        at = (logits, targets[chosen], places[begin:end])
        part = ops.policy_loss_of_logits(*at, *batch, *words, *row_words, any(wanted))
        loss += part[0]
        logps[chosen] = part[1].to(result)
        if with_entropies:
            entropies[chosen] = part[2].to(result)
        sums = part[3] if sums is None else sums + part[3]
        maxima = part[4] if maxima is None else torch.maximum(maxima, part[4])
        if len(places):
            gradients.add(chosen, logits, flat)
        begin = end
    entropies = None if entropies is None else entropies.view(mask.shape)
    results = loss.to(result), logps.view(mask.shape), entropies, sums, maxima
    return results, gradients.taken(hidden)


def save_gradients(ctx, gradients, linear, wanted):
    """For scaled_gradients."""
    inputs = zip(linear, wanted, strict=True)
    ctx.save_for_backward(*gradients, *(each if needed else None for each, needed in inputs))


def scaled_gradients(ctx, upstream):
    """Those that were found with the loss."""
    gradients = [None] * 3
    if upstream is not None:
        saved = ctx.saved_tensors
        for i, (each, tensor) in enumerate(zip(saved[:3], saved[3:], strict=True)):
            if tensor is not None:
                gradients[i] = scaled("linear_policy_loss", upstream, each, tensor)
    return gradients


class LinearPolicyLoss(torch.autograd.Function):
    """Loss and gradients in one walk; backward is a scaling."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, *rest):
        walk, *rest = rest
        linear, wanted = (hidden, weight, bias), rest[-2]
        results, gradients = walk(*linear, *rest)
        save_gradients(ctx, gradients, linear, wanted)
        ctx.mark_non_differentiable(*(each for each in results[1:] if each is not None))
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx, upstream, *_):
        return *scaled_gradients(ctx, upstream), *[None] * 9
