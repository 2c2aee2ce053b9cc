"""Log-probabilities, entropies and exact KL divergences from logits, never in half precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tether import _cuda, reference
from tether._checks import (
    check_device,
    check_given,
    check_integers,
    check_no_tangents,
    dtype_text,
    in_name_of,
    kind_of,
    shape_text,
)
from tether._functions import FUNCTIONS, Call
from tether._ids import check_asked_ids, check_id_values, looks_at_ids
from tether._logits_ops import (
    TokenLogpsOfCaller,
    again,
    token_logps_forward,
    token_statistics,
)
from tether._ops import below_autograd, has_kernel, is_eager, once_differentiable, ops
from tether._support import (
    NOWHERE,
    Support,
    checked_support,
    ids_for_kernel,
    support_of_logits,
    with_ids_below,
    with_known_ids,
)


class TokenLogps(NamedTuple):
    logps: Tensor  # like targets: float32, or float64 with logits
    entropies: Tensor | None  # like targets; None unless asked for
    # None unless statistics=True, constants:
    sum_of_squared_p: Tensor | None = None  # sum_v p_v^2
    mean_logits: Tensor | None = None  # of x, over the columns above -inf
    # bool: no other id is more probable; False where the row holds NaN
    target_is_largest: Tensor | None = None


class RowSettings(NamedTuple):
    """The options of rows of logits, however these are made."""

    temperature: float
    scale: float
    softcap: float
    ignore_index: int
    entropies: bool = False
    statistics: bool = False


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
    # Of linear_*: an all-reduce, which returns the sum of the gradients that hidden has on each
    # rank. Called once, in backward. None: hidden gets this rank's part of the sum.
    reduce: Callable[[Tensor], Tensor] | None = None


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
    support: Support | None = None,
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
                     once. torch.autograd.grad returns this memory; the .grad of a leaf is a copy.
                     Compiled code plans its own memory and leaves the buffer alone
    shard            logits are those of a part of the vocabulary; targets, ids of the whole, and
                     the gradients that arrive must be the same on every rank, as must the options,
                     which is checked. Results are those of the whole, the gradient that of the
                     shard's own columns
    support          of these targets: the softmax is over the ids that the sampler kept
                     (tether.support), and so is what is returned beside; others are not read and
                     get no gradient

    Results are float32 whatever the logits are (float64 for float64). Differentiable once in
    logits; a second backward raises. On the CPU: one pass over the logits each way, the same bits
    for any number of threads. On other devices: `tether.reference`, on CUDA kernels where the
    package has them (docs/cuda.md). Raises ValueError, TypeError or IndexError before any work is
    done.
    """
    function = "token_logps"
    check_integers(function, ignore_index=ignore_index)
    asked = (entropies, statistics)
    settings = RowSettings(temperature, scale, softcap, ignore_index, *asked)._asdict()
    call = FUNCTIONS[function].call({"logits": logits, "targets": targets}, settings)
    settings |= call.settings.numbers
    check_no_tangents(function, logits=logits)
    targets = call.tensors["targets"].to(torch.int64).contiguous()
    on_cuda = _cuda.has_kernel("token_logps_forward", (logits,))
    if shard is not None:
        check_shard(f"{function}: shard", shard, "logits", logits, logits.shape[-1])
    if not has_kernel(logits) and not on_cuda:
        _check_none(function, gradient_buffer=gradient_buffer, shard=shard)
        if support is not None:
            return _logps_of_support(logits, targets, support, **settings)
        check_id_values(f"{function}: targets", targets, logits.shape[-1], ignore_index)
        return _logps_by_torch(logits, targets, **settings)
    if gradient_buffer is not None:
        _check_buffer(f"{function}: gradient_buffer", gradient_buffer, logits)
    if shard is not None:
        call = call.with_numbers({"first_id": shard.first_id, "ids": shard.ids})
    return _logps_by_kernel(logits, targets, call, support, gradient_buffer, shard, *asked)


def _logps_by_kernel(
    logits: Tensor,
    targets: Tensor,
    call: Call,
    support: Support | None,
    gradient_buffer: Tensor | None,
    shard: VocabularyShard | None,
    entropies: bool,
    statistics: bool,
) -> TokenLogps:
    function, words = "token_logps", call.settings.words()
    ignore_index = call.settings.numbers["ignore_index"]
    vocabulary = logits.shape[-1] if shard is None else shard.ids
    check_asked_ids(f"{function}: targets", targets, vocabulary, ignore_index)
    ids = ids_for_kernel(function, support, targets, vocabulary, ignore_index)
    buffer = None if torch.compiler.is_compiling() else gradient_buffer

    def run():
        if buffer is None and shard is None:
            if not is_eager():
                return ops.token_logps_forward(logits, targets, ids, *words)
            if not (logits.requires_grad and torch.is_grad_enabled()):
                return token_logps_forward(logits, targets, ids, *words)
        return TokenLogpsOfCaller.apply(logits, targets, ids, words, entropies, buffer, shard)

    def checked():
        ignored = None if ids is None else targets == ignore_index
        return with_known_ids(function, run, ids, ignored, vocabulary)

    logps, found, sums = with_index_error(function, checked, targets, vocabulary, ignore_index)
    further = token_statistics(sums, logits, call.settings) if statistics else ()
    return TokenLogps(logps, found if entropies else None, *further)


def _logps_of_support(
    logits: Tensor, targets: Tensor, support: Support, *, ignore_index: int, **options: Any
) -> TokenLogps:
    support = checked_support("token_logps", support, targets, logits.shape[-1], ignore_index)
    others = targets.masked_fill(~support.whole, ignore_index)
    return of_support(
        support,
        support.gather(logits),
        options,
        lambda: token_logps(logits, others, ignore_index=ignore_index, **options),
    )


def _logps_by_torch(
    logits: Tensor, targets: Tensor, *, entropies: bool, statistics: bool, **rows: Any
) -> TokenLogps:
    logits = once_differentiable("token_logps", logits, again("token_logps"))
    logps, found = reference.token_logps(logits, targets, **rows)[:2]
    further = reference.token_statistics(logits, targets, **rows) if statistics else ()
    return TokenLogps(logps, found if entropies else None, *further)


def of_support(support: Support, kept: Tensor, options: dict, of_whole: Callable) -> TokenLogps:
    """token_logps of the kept logits [..., K], and where there is no set, of_whole()."""
    out = token_logps(kept, support.position, **options | {"ignore_index": NOWHERE})
    if not support.may_be_whole():
        return out
    whole = of_whole()
    both = zip(whole, out, strict=True)
    return TokenLogps(*(None if a is None else a.where(support.whole, b) for a, b in both))


def categorical_kl(
    q_logits: Tensor,
    p_logits: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    support: Support | None = None,
) -> CategoricalKl:
    """KL(q || p), KL(p || q) and H(q) over the whole vocabulary, exact [nats].

    q_logits, p_logits  [..., V]: the same dtype and shape, of any strides; q = softmax(q_logits /
                        temperature). -inf in both is a column that is not there
    mask                [...] bool: positions with False are not read and get zeros
    support             of these positions (tether.support): both softmaxes are over the ids that
                        the sampler kept, the added ones too; others are not read and get no
                        gradient. Positions whose target was ignored count as masked

    Differentiable once in both. On the CPU one pass over both, and on CUDA where the package has
    its kernels (docs/cuda.md); else `tether.reference`.
    """
    function = "categorical_kl"
    tensors = {"q_logits": q_logits, "p_logits": p_logits, "mask": mask}
    call = FUNCTIONS[function].call(tensors, {"temperature": temperature})
    check_no_tangents(function, q_logits=q_logits, p_logits=p_logits)
    if support is not None:
        support, mask = support_of_logits(function, support, "q_logits", q_logits, mask)
    on_cuda = _cuda.has_kernel("categorical_kl_forward", (q_logits, p_logits))
    if not (on_cuda or has_kernel(q_logits, p_logits)):
        options = {"mask": mask, **call.settings.numbers}
        return CategoricalKl(*_kl_by_torch(q_logits, p_logits, support, options))
    if support is not None and looks_at_ids():
        support = with_ids_below(function, support, q_logits.shape[-1])
    ids = None if support is None else support.ids.contiguous()

    def run():
        arguments = (q_logits, p_logits, mask, ids, *call.settings.words())
        wanted = torch.is_grad_enabled() and (q_logits.requires_grad or p_logits.requires_grad)
        if wanted or not is_eager():
            return ops.categorical_kl_forward(*arguments)
        return below_autograd(ops.categorical_kl_forward.default, *arguments)

    def checked():
        ignored = None if mask is None else ~mask
        return with_known_ids(function, run, ids, ignored, q_logits.shape[-1])

    return CategoricalKl(*in_name_of(function, "logits_kl_statistics", checked)[:3])


def _kl_by_torch(
    q_logits: Tensor, p_logits: Tensor, support: Support | None, options: dict
) -> list[Tensor]:
    function = "categorical_kl"
    both = [once_differentiable(function, x, again(function)) for x in (q_logits, p_logits)]
    if support is None:
        return reference.categorical_kl(*both, **options)
    support = with_ids_below(function, support, q_logits.shape[-1])
    mask, whole = options["mask"], support.whole

    def of(q: Tensor, p: Tensor, mask: Tensor) -> list[Tensor]:
        return reference.categorical_kl(q, p, **options | {"mask": mask})

    kept = of(*map(support.gather, both), mask & ~whole)
    if not support.may_be_whole():
        return kept
    every = of(*both, mask & whole)
    return [a.where(whole, b) for a, b in zip(every, kept, strict=True)]


# ---- checks --------------------------------------------------------------------------------------


def _check_none(function: str, **given: Any) -> None:
    for name, each in given.items():
        if each is not None:
            raise ValueError(f"{function}: {name} must be None for logits on a device")


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
    if torch.compiler.is_compiling():  # it is not written to
        return
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


def check_shard(where: str, shard: VocabularyShard, name: str, like: Tensor, columns: int) -> None:
    """`like`, named `name`, is what holds so many ids."""
    if not isinstance(shard, VocabularyShard):
        raise TypeError(f"{where} must be a VocabularyShard, got {kind_of(shard)}")
    for field in ("first_id", "ids"):
        value = getattr(shard, field)
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{where}.{field} must be an int, got {kind_of(value)}")
    if not callable(shard.gather):
        raise TypeError(f"{where}.gather must be callable, got {type(shard.gather).__name__}")
    if shard.reduce is not None and not callable(shard.reduce):
        raise TypeError(f"{where}.reduce must be callable, got {type(shard.reduce).__name__}")
    if shard.ids < columns:
        raise ValueError(
            f"{where}.ids must be at least {columns} like {name} {shape_text(like)}, got "
            f"{shard.ids}"
        )
    if not 0 <= shard.first_id <= shard.ids - columns:
        raise ValueError(
            f"{where}.first_id must be in [0, {shard.ids - columns}], got {shard.first_id}"
        )


def with_index_error(function: str, run, targets: Tensor, vocabulary: int, ignore_index: int):
    """run(); what the operator says of a bad id becomes an IndexError with its place."""
    try:
        return in_name_of(function, "token_logps", run)
    except ValueError as error:
        sentence = str(error)
        if ": targets must be in [" not in sentence:
            raise
    check_id_values(f"{function}: targets", targets, vocabulary, ignore_index)
    raise ValueError(sentence)
