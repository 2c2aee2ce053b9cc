"""Log-probabilities, entropies and exact KL divergences from logits, never in half precision."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tether import reference
from tether._checks import check_floating, check_given, dtype_text, shape_text
from tether._logits_ops import LinearTokenLogps, TokenLogpsInto
from tether._ops import ops


class TokenLogps(NamedTuple):
    logps: Tensor  # like targets: float32, or float64 with logits
    entropies: Tensor | None  # like targets; None unless asked for


class CategoricalKl(NamedTuple):
    kl: Tensor  # KL(q || p)
    reverse_kl: Tensor  # KL(p || q)
    entropies: Tensor  # H(q)


def token_logps(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float = 0.0,
    entropies: bool = False,
    ignore_index: int = -100,
    gradient_buffer: Tensor | None = None,
) -> TokenLogps:
    """Log-probabilities [nats] of the targets under softmax(x), and the entropies.

        x = scale logits / temperature, or softcap tanh(scale logits / softcap) / temperature

    logits           [..., V]: float32, float64, bfloat16 or float16, of any strides; -inf is a
                     column that is not there
    targets          [...]: int32 or int64, in [0, V) or ignore_index, which gets 0 and no gradient
    temperature      in [1e-6, 1e6], as is scale
    softcap          0: none
    gradient_buffer  where backward writes the gradient of the logits instead of fresh memory: a
                     tensor like logits that is used for nothing else until then, or logits
                     themselves, which then hold their own gradient; backward runs once

    Results are float32 whatever the logits are (float64 for float64). Differentiable once in
    logits; a second backward raises. On the CPU: one pass over the logits each way, the same bits
    for any number of threads. On other devices: `tether.reference`. Raises ValueError, TypeError
    or IndexError before any work is done.
    """
    function = "token_logps"
    _check_logits(f"{function}: logits", logits)
    targets = _checked_targets(function, targets, "logits", logits)
    options = (float(temperature), float(scale), float(softcap), int(ignore_index))
    if logits.device.type != "cpu":
        if gradient_buffer is not None:
            raise ValueError(f"{function}: gradient_buffer must be None for logits on a device")
        out = reference.token_logps(
            logits,
            targets,
            temperature=temperature,
            scale=scale,
            softcap=softcap,
            ignore_index=ignore_index,
        )
        return TokenLogps(out[0], out[1] if entropies else None)
    if gradient_buffer is not None:
        _check_buffer(f"{function}: gradient_buffer", gradient_buffer, logits)

    def run():
        if gradient_buffer is not None:
            return TokenLogpsInto.apply(logits, targets, options, entropies, gradient_buffer)
        return ops.token_logps_forward(logits, targets, *options, entropies)[:2]

    logps, found = _with_index_error(function, run, targets, logits.shape[-1], ignore_index)
    return TokenLogps(logps, found if entropies else None)


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
    ignore_index: int = -100,
    chunk_bytes: int = 256 << 20,
) -> TokenLogps:
    """token_logps(hidden @ weight.T + bias, targets), never holding the logits of all tokens.

    hidden       [..., H]; weight [V, H]; bias [V]: one dtype
    targets      [...]; ignored ones are not multiplied at all, whatever they hold
    chunk_bytes  of logits at a time; below 256 rows of them is slower

    The rest as in token_logps. Backward makes the logits again: one matrix product more, and one
    each for the gradients of hidden and weight where they are wanted; positions with upstream
    gradients of exactly 0 are skipped. Half weights: their gradient is added up in float32.
    """
    function = "linear_token_logps"
    _check_logits(f"{function}: hidden", hidden, "H")
    check_given(f"{function}: weight", weight)
    if weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{function}: weight must be [V, {hidden.shape[-1]}] with V at least 1, for hidden "
            f"{shape_text(hidden)}, got {shape_text(weight)}"
        )
    for name, each in (("weight", weight), ("bias", bias)):
        if each is not None:
            _check_like(f"{function}: {name}", each, "hidden", hidden)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{function}: bias must be [{weight.shape[0]}] like the rows of weight, got "
            f"{shape_text(bias)}"
        )
    if chunk_bytes < 1:
        raise ValueError(f"{function}: chunk_bytes must be at least 1, got {chunk_bytes}")
    targets = _checked_targets(function, targets, "hidden", hidden)
    options = (float(temperature), float(scale), float(softcap), int(ignore_index))
    if hidden.device.type != "cpu":
        return token_logps(
            torch.nn.functional.linear(hidden, weight, bias),
            targets,
            temperature=temperature,
            scale=scale,
            softcap=softcap,
            entropies=entropies,
            ignore_index=ignore_index,
        )

    def run():
        return LinearTokenLogps.apply(
            hidden, weight, bias, targets, options, entropies, chunk_bytes
        )

    return TokenLogps(*_with_index_error(function, run, targets, weight.shape[0], ignore_index))


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
    _check_logits(f"{function}: q_logits", q_logits)
    check_given(f"{function}: p_logits", p_logits)
    _check_like(f"{function}: p_logits", p_logits, "q_logits", q_logits)
    if p_logits.shape != q_logits.shape:
        raise ValueError(
            f"{function}: p_logits must be {shape_text(q_logits)} like q_logits, got "
            f"{shape_text(p_logits)}"
        )
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"{function}: mask must be bool, got {dtype_text(mask.dtype)}")
        if mask.shape != q_logits.shape[:-1]:
            raise ValueError(
                f"{function}: mask must be {list(q_logits.shape[:-1])}, got {shape_text(mask)}"
            )
    if q_logits.device.type != "cpu":
        return CategoricalKl(
            *reference.categorical_kl(q_logits, p_logits, mask=mask, temperature=temperature)
        )
    return CategoricalKl(
        *ops.categorical_kl_forward(q_logits, p_logits, mask, float(temperature))[:3]
    )


# ---- checks --------------------------------------------------------------------------------------


def _check_logits(where: str, logits: Tensor, last: str = "V") -> None:
    check_given(where, logits)
    check_floating(where, logits)
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(
            f"{where} must be [..., {last}] with {last} at least 1, got {shape_text(logits)}"
        )


def _check_like(where: str, tensor: Tensor, name: str, like: Tensor) -> None:
    if tensor.dtype != like.dtype:
        raise TypeError(
            f"{where} must be {dtype_text(like.dtype)} like {name}, got {dtype_text(tensor.dtype)}"
        )
    if tensor.device != like.device:
        raise ValueError(f"{where} must be on {like.device} like {name}, got {tensor.device}")


def _check_buffer(where: str, buffer: Tensor, logits: Tensor) -> None:
    check_given(where, buffer)
    _check_like(where, buffer, "logits", logits)
    if buffer.shape != logits.shape:
        raise ValueError(
            f"{where} must be {shape_text(logits)} like logits, got {shape_text(buffer)}"
        )
    if not buffer.is_contiguous():
        raise ValueError(f"{where} must be contiguous, got strides {list(buffer.stride())}")
    if buffer is not logits and buffer.requires_grad:
        raise ValueError(f"{where} must not require a gradient, got one that does")


def _checked_targets(function: str, targets: Tensor, name: str, like: Tensor) -> Tensor:
    """int64, contiguous."""
    where = f"{function}: targets"
    check_given(where, targets)
    if targets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{where} must be int32 or int64, got {dtype_text(targets.dtype)}")
    if targets.device != like.device:
        raise ValueError(f"{where} must be on {like.device} like {name}, got {targets.device}")
    if targets.shape != like.shape[:-1]:
        raise ValueError(
            f"{where} must be {list(like.shape[:-1])} like {name} {shape_text(like)}, got "
            f"{shape_text(targets)}"
        )
    return targets.to(torch.int64).contiguous()


def _with_index_error(function: str, run, targets: Tensor, vocabulary: int, ignore_index: int):
    """run(); what the operator says of a bad id becomes an IndexError with its place."""
    try:
        return run()
    except ValueError as error:
        if ": targets must be in" not in str(error):
            raise ValueError(str(error).replace("row_statistics", function, 1)) from None
        bad = ((targets < 0) | (targets >= vocabulary)) & (targets != ignore_index)
        place = bad.nonzero()[0].tolist()
        raise IndexError(
            f"{function}: targets must be in [0, {vocabulary}) or ignore_index {ignore_index}, "
            f"got {targets[tuple(place)].item()} at {place}"
        ) from None
