"""KL divergences over a vocabulary from the top k of it and a sample."""

from __future__ import annotations

import torch
from torch import Tensor

from tether import reference
from tether._checks import (
    check_given,
    check_integers,
    check_no_tangents,
    check_strings,
    result_dtype,
    savable,
)
from tether._functions import FUNCTIONS
from tether._logits_ops import STATISTICS, again, like_result
from tether._ops import has_kernel, once_differentiable, ops


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

    p costs k numbers a position instead of a vocabulary. The gradients of k1 and k3 are those of
    KL(q || p) in expectation, that of the bucket is not.

    q_logits      [..., V], q = softmax(q_logits / temperature) in full
    head_ids      [..., k]: int32 or int64, all different at a position; as
                  `q_logits.topk(k).indices`
    head_logps    [..., k]: log p of them, as `head_logps(p_logits, head_ids)`
    targets       [...]: y, sampled from q, or ignore_index, where the result is 0; None with
                  "bucket": all positions count
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
    settings = {
        "tail": tail,
        "temperature": temperature,
        "precision": precision,
        "ignore_index": ignore_index,
    }
    call = FUNCTIONS[function].call(tensors, settings)
    check_no_tangents(function, q_logits=q_logits)
    if not has_kernel(q_logits):
        return reference.top_k_kl(
            once_differentiable(function, q_logits, again(function)),
            head_ids,
            head_logps,
            targets,
            target_logps,
            tail=tail,
            temperature=temperature,
            ignore_index=ignore_index,
            precision=precision,
        )
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
        raise _with_place(error, head_ids, targets, q_logits.shape[-1], ignore_index) from None


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
        log_p = torch.log_softmax(logits.detach().to(wide) / temperature, -1)
        return log_p.gather(-1, head_ids.to(torch.int64))
    ids = head_ids.to(torch.int64).contiguous()
    rows = ids.view(-1, ids.shape[-1]) if ids.numel() else ids.new_empty(logits[..., 0].numel(), 0)
    try:
        found = ops.head_logps(logits.detach(), rows, *call.settings.words())
    except ValueError as error:
        words = ValueError(str(error).replace("row_statistics", function, 1))
        raise _with_place(words, head_ids, None, logits.shape[-1], 0, function) from None
    return found.to(wide).view(ids.shape)


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


def _with_place(
    error: ValueError,
    head_ids: Tensor,
    targets: Tensor | None,
    vocabulary: int,
    ignore_index: int,
    function: str = "top_k_kl",
) -> Exception:
    """What the operator says of a bad id as an IndexError with its place."""

    def first(bad: Tensor, ids: Tensor, rule: str) -> IndexError:
        place = bad.nonzero()[0].tolist()
        return IndexError(f"{function}: {rule}, got {ids[tuple(place)].item()} at {place}")

    def outside(ids):
        return (ids < 0) | (ids >= vocabulary)

    if ": targets must be in" in str(error):
        rule = f"targets must be in [0, {vocabulary}) or ignore_index {ignore_index}"
        return first(outside(targets) & (targets != ignore_index), targets, rule)
    if "ids must be in" in str(error):
        active = True if targets is None else (targets != ignore_index)[..., None]
        return first(outside(head_ids) & active, head_ids, f"head_ids must be in [0, {vocabulary})")
    return error
