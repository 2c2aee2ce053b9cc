"""The walks over chunks as operators, for torch.compile, which cannot know how many tokens are
active. What eager calls return as None is empty here."""

from __future__ import annotations

import torch

from tether._checks import result_dtype
from tether._cuda_linear import walk_over
from tether._functions import FUNCTIONS
from tether._linear_inputs import LOSS_ARRAYS
from tether._linear_ops import (
    Chunk,
    gradient_of_chunks,
    logps_of_chunks,
    save_gradients,
    scaled_gradients,
)
from tether._logits_ops import like_result, new_statistics
from tether._ops import ops
from tether._support import with_known_ids
from tether.logits import with_index_error

_LINEAR = "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets"
_ROWS = f"{_LINEAR}, Tensor? support"
_WORDS = "str[] names, Tensor values, str[] choice_names, str[] choice_values"
_CHUNK = "SymInt rows, bool padded"
_ERRORS = "str function, int ignore_index"


def _present(tensors, like):
    """As an operator returns them."""
    return tuple(like.new_empty(0) if each is None else each for each in tensors)


def _fake_gradients(linear, wanted):
    both = zip(linear, wanted, strict=True)
    return _present((x.new_empty(x.shape) if need else None for x, need in both), linear[0])


# ---- log-probabilities ---------------------------------------------------------------------------


@torch.library.custom_op(
    "tether::linear_token_logps",
    mutates_args=(),
    schema=f"({_ROWS}, Tensor active, {_WORDS}, bool with_entropies, {_CHUNK}, {_ERRORS})"
    " -> (Tensor, Tensor, Tensor)",
)
def _logps(hidden, weight, bias, targets, support, active, *rest):
    *words, with_entropies, rows, padded, function, ignore_index = rest

    def run():
        chunk = Chunk(rows, padded)
        return logps_of_chunks(
            hidden, weight, bias, targets, support, words, with_entropies, active, chunk, False
        )

    def checked():
        return with_known_ids(function, run, support, ~active, weight.shape[0])

    out = with_index_error(function, checked, targets, weight.shape[0], ignore_index)
    return _present(out[:3], out[0])


@_logps.register_fake
def _(hidden, weight, bias, targets, support, active, *rest):
    logps = like_result(hidden)
    found = _present((logps, torch.empty_like(logps) if rest[4] else None), logps)
    return *found, new_statistics(hidden, targets.numel())


def _save(ctx, inputs, output):
    *row, active = inputs[:6]
    ctx.names, values, *ctx.choices = inputs[6:10]
    ctx.with_entropies, ctx.rows, ctx.padded = inputs[10:13]
    ctx.mark_non_differentiable(output[2], *(() if ctx.with_entropies else (output[1],)))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*row, output[2], active, values)


def _backward(ctx, dlogps, dentropies, _):
    gradients, wanted = [None] * 3, list(ctx.needs_input_grad[:3])
    if dlogps is not None or dentropies is not None:
        *saved, active, values = ctx.saved_tensors
        words = (ctx.names, values, *ctx.choices)
        found = ops.linear_gradient(
            *saved, active, dlogps, dentropies, *words, ctx.rows, ctx.padded, wanted
        )
        gradients = [each if need else None for each, need in zip(found, wanted, strict=True)]
    return *gradients, *[None] * 12


_logps.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op(
    "tether::linear_gradient",
    mutates_args=(),
    schema=f"({_ROWS}, Tensor statistics, Tensor active, Tensor? dlogps, Tensor? dentropies, "
    f"{_WORDS}, {_CHUNK}, bool[] wanted) -> (Tensor, Tensor, Tensor)",
)
def _gradient(
    hidden, weight, bias, targets, support, statistics, active, dlogps, dentropies, *rest
):
    *words, rows, padded, wanted = rest
    row = (hidden, weight, bias, targets, support, statistics, dlogps, dentropies)
    return _present(
        gradient_of_chunks(*row, words, active, Chunk(rows, padded), None, wanted), hidden
    )


@_gradient.register_fake
def _(hidden, weight, bias, *rest):
    return _fake_gradients((hidden, weight, bias), rest[-1])


def traced_logps(linear, targets, support, words, with_entropies, active, chunk, *errors):
    """As LinearTokenLogps.apply()."""
    logps, entropies, statistics = ops.linear_token_logps(
        *linear, targets, support, active, *words, with_entropies, *chunk, *errors
    )
    return logps, (entropies if with_entropies else None), statistics


# ---- the loss ------------------------------------------------------------------------------------

_ROW_WORDS = "str[] row_names, Tensor row_values, str[] row_choice_names, str[] row_choice_values"
_ARRAYS = ", ".join(f"Tensor? {name}" for name in LOSS_ARRAYS)
_BLOCKS = [each.sizes for each in FUNCTIONS["policy_loss"].results if each.kind == "block"]


@torch.library.custom_op(
    "tether::linear_policy_loss",
    mutates_args=(),
    schema=f"({_LINEAR}, {_ARRAYS}, {_WORDS}, {_ROW_WORDS}, bool with_entropies, {_CHUNK}, "
    f"bool[] wanted, Tensor? counts, {_ERRORS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _loss(hidden, weight, bias, targets, *rest):
    batch, rest = rest[: len(LOSS_ARRAYS)], rest[len(LOSS_ARRAYS) :]
    words, row_words = rest[:4], rest[4:8]
    with_entropies, rows, padded, wanted, counts, function, ignore_index = rest[8:]

    def run():
        of_batch = (batch, words, row_words, with_entropies, Chunk(rows, padded), wanted, counts)
        return walk_over(counts)(hidden, weight, bias, targets, *of_batch)

    results, gradients = with_index_error(function, run, targets, weight.shape[0], ignore_index)
    return _present((*results, *gradients), hidden)


@_loss.register_fake
def _(hidden, weight, bias, targets, advantages, response_mask, *rest):
    with_entropies, _, _, wanted, _, _, _ = rest[-7:]
    loss = hidden.new_empty((), dtype=result_dtype(hidden))
    logps = loss.new_empty(response_mask.shape)
    entropies = torch.empty_like(logps) if with_entropies else None
    blocks = (hidden.new_empty(size, dtype=torch.float64) for size in _BLOCKS)
    results = _present((loss, logps, entropies, *blocks), hidden)
    return *results, *_fake_gradients((hidden, weight, bias), wanted)


def _save_loss(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.arguments = len(inputs)
    save_gradients(ctx, output[5:], inputs[:3], inputs[-4])


def _backward_loss(ctx, upstream, *_):
    return *scaled_gradients(ctx, upstream), *[None] * (ctx.arguments - 3)


_loss.register_autograd(_backward_loss, setup_context=_save_loss)


def traced_loss(linear, targets, batch, words, row_words, with_entropies, chunk, *rest):
    """As LinearPolicyLoss.apply()."""
    out = ops.linear_policy_loss(
        *linear, targets, *batch, *words, *row_words, with_entropies, *chunk, *rest
    )
    loss, logps, entropies, sums, maxima = out[:5]
    return loss, logps, (entropies if with_entropies else None), sums, maxima
