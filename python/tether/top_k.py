"""KL divergences over a vocabulary from the top k of it and a sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tether import reference
from tether._checks import (
    check_given,
    check_integers,
    check_no_tangents,
    check_strings,
    holds_numbers,
    result_dtype,
    savable,
)
from tether._functions import FUNCTIONS
from tether._ids import check_id_values
from tether._logits_ops import STATISTICS, again, like_result
from tether._ops import has_kernel, once_differentiable, ops
from tether.reference.logps import logps_of_ids


def top_k_kl(
    q_logits: Tensor,
    head_ids: Tensor,
    head_logps: Tensor,
    targets: Tensor | None = None,
    target_logps: Tensor | None = None,
    *,
    tail: str = "k3",
    temperature: float = 1.0,
    ignore_index: int = -100,
    precision: float = 2.0**-23,
) -> Tensor:
    """KL(q || p) [nats] of each position from a head of ids and, for all others, one sample of q.

        u = log q - log p,   Q, P = 1 - sum_S q, 1 - sum_S p
        "bucket"   B = sum_S q u + Q log(Q / P)                   a lower bound, >= 0
        "k1"       B + [y not in S] (u_y - log(Q / P))            unbiased, any sign
        "k3"       B + [y not in S] k3(log(Q / P) - u_y)          unbiased, >= 0
        "reverse_bucket"   -sum_S p u - P log(Q / P)     of KL(p || q), a lower bound, >= 0

    p costs k numbers a position instead of a vocabulary. The gradients of k1 and k3 are those of
    KL(q || p) in expectation, those of buckets are not. To distil a teacher p from its top k:
    "reverse_bucket", with head_ids as `teacher_logits.topk(k).indices`.

    q_logits      [..., V], q = softmax(q_logits / temperature) in full
    head_ids      [..., k]: int32 or int64, all different at a position; as
                  `q_logits.topk(k).indices`
    head_logps    [..., k]: log p of them, as `head_logps(p_logits, head_ids)`
    targets       [...]: y, sampled from q, or ignore_index, where the result is 0; None with a
                  bucket: all positions count
    target_logps  [...]: log p of them
    tail          k3 varies less where the tails of q and p are alike, k1 where P is much larger
    precision     of the log-probabilities of p (2^-52 for float64): smaller masses of a tail count
                  as this; where P is not much larger, k3 is biased by up to Q, k1 is not

    Returns [...]: float32 (float64 for float64), differentiable once in q_logits. On the CPU one
    pass over the logits each way; else `tether.reference`.
    """
    function = "top_k_kl"
    check_integers(function, ignore_index=ignore_index)
    check_strings(function, tail=tail)
    tensors = {
        "q_logits": q_logits,
        "head_ids": head_ids,
        "head_logps": head_logps,
        "targets": targets,
        "target_logps": target_logps,
    }
    sampled = tail in ("k1", "k3")
    for name in ("targets", "target_logps") if sampled else ():
        check_given(f"{function}: {name}", tensors[name])
    if targets is None:
        tensors["target_logps"] = None
    settings = {"tail": tail, "temperature": temperature}
    settings |= {"precision": precision, "ignore_index": ignore_index}
    call = FUNCTIONS[function].call(tensors, settings)
    check_no_tangents(function, q_logits=q_logits)
    if not has_kernel(q_logits):
        _check_ids(function, head_ids, q_logits.shape[-1], targets, ignore_index)
        _check_different(function, head_ids, targets, ignore_index)
        q = once_differentiable(function, q_logits, again(function))
        return reference.top_k_kl(**tensors | {"q_logits": q}, **settings | call.settings.numbers)
    try:
        return ops.top_k_kl_forward(
            q_logits,
            head_ids.to(torch.int64).contiguous(),
            head_logps.to(torch.float64).contiguous(),
            None if targets is None else targets.to(torch.int64).contiguous(),
            target_logps.to(torch.float64).contiguous() if sampled else None,
            *call.settings.words(),
        )[0]
    except ValueError as error:
        arrays = (head_ids, q_logits.shape[-1], targets, ignore_index)
        raise _with_place(error, function, *arrays) from None


def head_logps(logits: Tensor, head_ids: Tensor, *, temperature: float = 1.0) -> Tensor:
    """The log-probabilities [..., k] of several ids under softmax(logits / temperature), constants.

    logits [..., V], head_ids [..., k]: int32 or int64, in [0, V). float32 (float64 for float64).
    """
    function = "head_logps"
    tensors = {"logits": logits, "head_ids": head_ids}
    call = FUNCTIONS[function].call(tensors, {"temperature": temperature})
    check_no_tangents(function, logits=logits)
    wide = result_dtype(logits)
    if not has_kernel(logits):
        _check_ids(function, head_ids, logits.shape[-1])
        return logps_of_ids(logits.detach(), head_ids, **call.settings.numbers)
    ids = head_ids.to(torch.int64).contiguous()
    rows = ids.view(-1, ids.shape[-1]) if ids.numel() else ids.new_empty(logits[..., 0].numel(), 0)
    try:
        found = ops.head_logps(logits.detach(), rows, *call.settings.words())
        return found.to(wide).view(ids.shape)
    except ValueError as error:
        raise _with_place(error, function, head_ids, logits.shape[-1]) from None


# ---- autograd and tracing ------------------------------------------------------------------------


@torch.library.register_fake("tether::top_k_kl_forward")
def _(q_logits, *_):
    kl = like_result(q_logits)
    return kl, q_logits.new_empty((kl.numel(), STATISTICS), dtype=torch.float64)


@torch.library.register_fake("tether::top_k_kl_backward")
def _(q_logits, *_):
    return q_logits.new_empty(q_logits.shape)


@torch.library.register_fake("tether::head_logps")
def _(logits, head_ids, *_):
    return logits.new_empty(head_ids.shape, dtype=torch.float64)


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_logits, reference_of_p, statistics, upstream, words):
        upstream = upstream.to(torch.float64).contiguous()
        return ops.top_k_kl_backward(q_logits, *reference_of_p, statistics, upstream, *words)

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(again("top_k_kl"))


def _setup(ctx, inputs, output):
    q_logits, *p = inputs[:5]
    names, values, *ctx.choices = inputs[5:]
    ctx.names = names
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q_logits, *map(savable, p), output[1], values)


def _backward(ctx, upstream, _):
    dq = None
    if upstream is not None:
        q_logits, *p, statistics, values = ctx.saved_tensors
        dq = _Gradient.apply(q_logits, p, statistics, upstream, (ctx.names, values, *ctx.choices))
    return dq, *[None] * 8


torch.library.register_autograd("tether::top_k_kl_forward", _backward, setup_context=_setup)


# ---- checks --------------------------------------------------------------------------------------


def _check_ids(
    function: str,
    head_ids: Tensor,
    vocabulary: int,
    targets: Tensor | None = None,
    ignore_index: int = 0,
) -> None:
    if targets is not None:
        check_id_values(f"{function}: targets", targets, vocabulary, ignore_index)
    active = None if targets is None else (targets != ignore_index)[..., None]
    check_id_values(f"{function}: head_ids", head_ids, vocabulary, active=active)


def _check_different(
    function: str, head_ids: Tensor, targets: Tensor | None, ignore_index: int
) -> None:
    """Of each row that counts, where they are on the host; the operator does it for its calls."""
    if not holds_numbers(head_ids) or not head_ids.numel():
        return
    ids, places = head_ids.reshape(-1, head_ids.shape[-1]).sort(dim=-1, stable=True)
    again = ids[:, 1:] == ids[:, :-1]
    if targets is not None and holds_numbers(targets):
        again = again & (targets != ignore_index).reshape(-1, 1)
    if again.any():
        row, i = again.nonzero()[0].tolist()
        raise ValueError(
            f"{function}: head_ids must be all different in a row, got {ids[row, i].item()} again "
            f"at [{row}, {places[row, i + 1].item()}]"
        )


def _with_place(error: ValueError, *arguments: Any) -> Exception:
    """What the operator says of a bad id as an IndexError with its place."""
    try:
        _check_ids(*arguments)
    except IndexError as bad:
        return bad
    return error
