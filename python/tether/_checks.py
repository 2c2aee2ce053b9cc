"""Checks at the door: the rules and the words of the C++ face (libtorch/policy_inputs.cc).

Only shapes, dtypes and devices are looked at here, so nothing waits for a device and nothing breaks
a traced graph. What needs the numbers is checked by the operators.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

Number = float | Tensor

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Batch(NamedTuple):
    """Checked tensors: advantages [B, 1] or like logps, response_mask bool or floating."""

    logps: Tensor
    advantages: Tensor
    response_mask: Tensor
    old_logps: Tensor | None
    ref_logps: Tensor | None
    entropies: Tensor | None
    offsets: Tensor | None


def shape_text(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def dtype_text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_given(where: str, tensor: Tensor | None) -> None:
    if tensor is None:
        raise ValueError(f"{where} must be given, got none")
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{where} must be a tensor, got {type(tensor).__name__}")


def check_floating(where: str, tensor: Tensor) -> None:
    if tensor.dtype not in _FLOATING:
        raise TypeError(
            f"{where} must be float32, float64, bfloat16 or float16, got {dtype_text(tensor.dtype)}"
        )


def check_logits(where: str, logits: Tensor, last: str = "V") -> None:
    check_given(where, logits)
    check_floating(where, logits)
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(
            f"{where} must be [..., {last}] with {last} at least 1, got {shape_text(logits)}"
        )


def _check_width(where: str, name: str, tensor: Tensor, logps: Tensor) -> None:
    """Arithmetic is in float32, or in float64 with logps; nothing is rounded to enter it."""
    if tensor.dtype == torch.float64 and logps.dtype != torch.float64:
        raise TypeError(
            f"{where} must not be wider than logps, {dtype_text(logps.dtype)}, got float64. "
            f"Pass {name}.to(torch.float32)"
        )


def check_device(where: str, tensor: Tensor, name: str, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{where} must be on {like.device} like {name}, got {tensor.device}")


def savable(value: Any) -> Any:
    """Autograd saves no tensor that was made under inference_mode: a copy of such a one."""
    if not isinstance(value, Tensor) or torch.compiler.is_compiling():
        return value
    inference = value.is_inference() and not torch.is_inference_mode_enabled()
    return value.clone() if inference else value


def in_name_of(function: str, callee: str, run: Callable):
    """run(); its errors, which begin with the name of the callee, begin with `function`."""
    try:
        return run()
    except (ValueError, TypeError) as error:
        if not str(error).startswith(f"{callee}: "):
            raise
        raise type(error)(function + str(error).removeprefix(callee)) from None


def check_no_tangents(function: str, **tensors: Tensor | None) -> None:
    """Kernels know no forward-mode derivative, and torch would take it for 0."""
    for name, tensor in tensors.items():
        if tensor is not None:
            _check_no_tangent(f"{function}: {name}", tensor)


def _check_no_tangent(where: str, tensor: Tensor) -> None:
    if torch.compiler.is_compiling():
        return
    if forward_ad.unpack_dual(tensor).tangent is not None:
        raise NotImplementedError(
            f"{where} must have no tangent, got one. Forward-mode derivatives are not supported: "
            "use backward"
        )


def check_constant(where: str, name: str, tensor: Tensor) -> None:
    _check_no_tangent(where, tensor)
    if tensor.requires_grad:
        raise ValueError(
            f"{where} must not require grad, got a tensor that does. It is a constant of the loss: "
            f"pass {name}.detach()"
        )


# ---- numbers, strings, flags ---------------------------------------------------------------------


def check_number(function: str, name: str, value: Number) -> None:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{function}: {name} must be one number, got {shape_text(value)}")
        if value.device.type == "meta":
            raise ValueError(f"{function}: {name} must be a number, got a tensor on meta")
        check_constant(f"{function}: {name}", name, value)
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{function}: {name} must be a number, got {type(value).__name__}")


def check_numbers(function: str, **values: Number) -> None:
    for name, value in values.items():
        check_number(function, name, value)


def check_positive(function: str, name: str, value: Number, *, zero: bool = False) -> None:
    """A finite number above 0, or with `zero` at least 0. What a tensor holds is not looked at."""
    check_number(function, name, value)
    legal = isinstance(value, Tensor) or ((value > 0 or (zero and value == 0)) and value < math.inf)
    if not legal:
        rule = "at least 0" if zero else "greater than 0"
        raise ValueError(f"{function}: {name} must be {rule} and finite, got {value:g}")


def check_integers(function: str, **values: int) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{function}: {name} must be an int, got {type(value).__name__}")


def check_flags(function: str, **values: bool) -> None:
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{function}: {name} must be a bool, got {type(value).__name__}")


def check_strings(function: str, **values: str) -> None:
    for name, value in values.items():
        if not isinstance(value, str):
            raise TypeError(f"{function}: {name} must be a string, got {type(value).__name__}")


# ---- rows of tokens ------------------------------------------------------------------------------


def _check_tokens(where: str, tensor: Tensor, logps: Tensor, like: str = "logps") -> None:
    check_device(where, tensor, like, logps)
    if tensor.shape != logps.shape:
        raise ValueError(
            f"{where} must be {shape_text(logps)} like {like}, got {shape_text(tensor)}"
        )


def check_rows(function: str, name: str, tensor: Tensor, offsets: Tensor | None) -> None:
    """Rows of tokens, [B, T] or packed [N]."""
    where = f"{function}: {name}"
    check_given(where, tensor)
    check_floating(where, tensor)
    if tensor.dim() != (2 if offsets is None else 1):
        rule = "[B, T], or [N] with offsets" if offsets is None else "[N] with offsets"
        raise ValueError(f"{where} must be {rule}, got {shape_text(tensor)}")


def check_constants(function: str, like: str, rows: Tensor, **tensors: Tensor) -> None:
    """Floating-point tensors like `rows`, without a gradient."""
    for name, tensor in tensors.items():
        where = f"{function}: {name}"
        check_given(where, tensor)
        check_floating(where, tensor)
        _check_tokens(where, tensor, rows, like)
        check_constant(where, name, tensor)


def check_offsets(function: str, offsets: Tensor | None, name: str, rows: Tensor) -> None:
    where = f"{function}: offsets"
    if offsets is None:
        return
    check_given(where, offsets)
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{where} must be int32 or int64, got {dtype_text(offsets.dtype)}")
    check_device(where, offsets, name, rows)
    if offsets.dim() != 1 or offsets.shape[0] < 1:
        raise ValueError(f"{where} must be [B + 1], got {shape_text(offsets)}")


def check_offset_values(function: str, offsets: Tensor, name: str, size: int) -> None:
    """The ends and the order, where they are on the host; the operators do it for their calls."""
    if offsets.shape[0] == 1 and offsets.device.type != "cpu" and size > 0:
        raise ValueError(
            f"{function}: offsets must run from 0 to {size}, the size of {name}, got one number"
        )
    if offsets.device.type != "cpu" or torch.compiler.is_compiling():
        return
    numbers = offsets.tolist()
    if numbers[0] != 0 or numbers[-1] != size:
        raise ValueError(
            f"{function}: offsets must run from 0 to {size}, the size of {name}, got {numbers[0]} "
            f"to {numbers[-1]}"
        )
    for i in range(1, len(numbers)):
        if numbers[i] < numbers[i - 1]:
            raise ValueError(
                f"{function}: offsets must not decrease, got {numbers[i]} after {numbers[i - 1]} "
                f"at [{i}]"
            )


def _checked_advantages(function: str, advantages: Tensor, logps: Tensor, rows: int) -> Tensor:
    where = f"{function}: advantages"
    check_given(where, advantages)
    check_floating(where, advantages)
    _check_width(where, "advantages", advantages, logps)
    check_device(where, advantages, "logps", logps)
    check_constant(where, "advantages", advantages)
    if advantages.shape == logps.shape or advantages.shape == (rows, 1):
        return advantages
    if advantages.shape == (rows,):
        return advantages[:, None]
    raise ValueError(
        f"{where} must be [{rows}] or {shape_text(logps)}, got {shape_text(advantages)}"
    )


def checked_mask(function: str, mask: Tensor, logps: Tensor, like: str = "logps") -> Tensor:
    where = f"{function}: response_mask"
    check_given(where, mask)
    _check_tokens(where, mask, logps, like)
    if mask.dtype in _INTEGERS:
        return mask.to(torch.float32)
    if mask.dtype != torch.bool:
        check_floating(where, mask)
    check_constant(where, "response_mask", mask)
    return mask


def _check_optional_tokens(function: str, name: str, tensor: Tensor | None, logps: Tensor) -> None:
    where = f"{function}: {name}"
    if tensor is None:
        return
    check_given(where, tensor)
    check_floating(where, tensor)
    _check_width(where, name, tensor, logps)
    _check_tokens(where, tensor, logps)


def _check_constant_tokens(function: str, name: str, tensor: Tensor | None, logps: Tensor) -> None:
    _check_optional_tokens(function, name, tensor, logps)
    if tensor is not None:
        check_constant(f"{function}: {name}", name, tensor)


def checked(function: str, batch: Batch) -> Batch:
    """The batch as the operators take it, or ValueError / TypeError beginning with `function`."""
    logps = batch.logps
    check_rows(function, "logps", logps, batch.offsets)
    check_offsets(function, batch.offsets, "logps", logps)
    rows = logps.shape[0] if batch.offsets is None else batch.offsets.shape[0] - 1
    advantages = _checked_advantages(function, batch.advantages, logps, rows)
    response_mask = checked_mask(function, batch.response_mask, logps)
    _check_constant_tokens(function, "old_logps", batch.old_logps, logps)
    _check_constant_tokens(function, "ref_logps", batch.ref_logps, logps)
    _check_optional_tokens(function, "entropies", batch.entropies, logps)
    return batch._replace(advantages=advantages, response_mask=response_mask)


class Pairs(NamedTuple):
    """Checked tensors of chosen and rejected answers."""

    logps: Tensor
    response_mask: Tensor
    ref_logps: Tensor | None
    offsets: Tensor | None


def checked_pairs(function: str, pairs: Pairs) -> Pairs:
    """The pairs as the operators take them: answers [2 B] become rows of one token."""
    logps, response_mask, ref_logps, offsets = pairs
    check_given(f"{function}: logps", logps)
    if logps.dim() == 1 and offsets is None:
        logps, response_mask, ref_logps = (
            each[:, None] if isinstance(each, Tensor) and each.dim() == 1 else each
            for each in (logps, response_mask, ref_logps)
        )
        if response_mask is None:
            response_mask = torch.ones_like(logps, dtype=torch.bool, requires_grad=False)
    check_rows(function, "logps", logps, offsets)
    check_offsets(function, offsets, "logps", logps)
    response_mask = checked_mask(function, response_mask, logps)
    _check_constant_tokens(function, "ref_logps", ref_logps, logps)
    return Pairs(logps, response_mask, ref_logps, offsets)
