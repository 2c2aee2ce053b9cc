"""The lists of the library's functions, and the checks at the door that come from them.

They stand beside the structs of C++ (core/arguments.h, core/options.h); the checks are the same in
words and order as those of the C++ faces. Only presence, types, devices, shapes and single numbers
that are on the host are looked at, so nothing waits for a device and nothing breaks a traced graph:
what arrays hold is checked by the operators.
"""

from __future__ import annotations

import functools
import keyword
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tether._checks import (
    FLOATING,
    INTEGERS,
    Number,
    check_constant,
    check_device,
    check_floating,
    check_given,
    check_number,
    dtype_text,
    hint,
    kind_of,
    number_of,
    result_dtype,
    scalar,
    shape_text,
)
from tether._ops import is_eager

Value = Number | str | bool


class Argument(NamedTuple):
    name: str
    shape: str
    kind: str
    required: bool
    differentiable: bool
    like: str = ""  # another argument; empty: the first


class Option(NamedTuple):
    default: float
    low: float
    high: float
    above: bool
    range: str  # in words: "in [0, 1]"

    def contains(self, value: float) -> bool:
        return (self.low < value if self.above else self.low <= value) and value <= self.high


class Choice(NamedTuple):
    default: str
    legal: tuple[str, ...]


class Result(NamedTuple):
    name: str
    kind: str
    of: str
    sizes: tuple[int, ...]


def options_of(description: dict) -> dict[str, Option]:
    return {name: Option(*rest) for name, *rest in description["options"]}


def choices_of(description: dict) -> dict[str, Choice]:
    return {name: Choice(value, tuple(names)) for name, value, names in description["choices"]}


# ---- the settings of a call ----------------------------------------------------------------------


class Settings(NamedTuple):
    """Numbers and names as the operators take them; an option that is not named has its default."""

    numbers: dict[str, Number]
    choices: dict[str, str]

    def words(self) -> tuple:
        return (
            list(self.numbers),
            packed(list(self.numbers.values())),
            list(self.choices),
            list(self.choices.values()),
        )


def packed(numbers: Sequence[Number]) -> Tensor:
    """Numbers and tensors of one number, side by side for an operator."""
    if not [each for each in numbers if isinstance(each, Tensor)]:
        if is_eager():
            return _constants(tuple(numbers))
        return torch.tensor(numbers, dtype=torch.float64, device="cpu")
    tensors = [
        torch.as_tensor(each, dtype=torch.float64, device="cpu").reshape(()) for each in numbers
    ]
    return torch.stack(tensors)


@functools.lru_cache(256)  # a training loop passes the same ones in every step
def _constants(numbers: Sequence[float]) -> Tensor:
    with torch.inference_mode(False):  # the first call may be in it, and no later one
        return torch.tensor(numbers, dtype=torch.float64, device="cpu")


def check_range(function: str, name: str, value: Number, option: Option) -> None:
    """What a tensor holds is looked at where it is on the host."""
    if type(value) is float and option.contains(value):  # the usual case
        return
    check_number(function, name, value)
    number = number_of(value)
    if number is not None and not option.contains(number):
        raise ValueError(f"{function}: {name} must be {option.range}, got {number:g}")


def checked_settings(
    function: str,
    options: Mapping[str, Option],
    choices: Mapping[str, Choice],
    values: Mapping[str, Value],
) -> Settings:
    """The name of an option which Python has as a word ends in _."""
    numbers, names = {}, {}
    for name, value in values.items():
        option = name[:-1] if keyword.iskeyword(name[:-1]) else name
        if option in choices:
            names[option] = _checked_choice(function, name, value, choices[option])
        elif option in options:
            check_range(function, name, value, options[option])
            numbers[option] = scalar(value)
        else:
            what, known = ("choice", choices) if isinstance(value, str) else ("option", options)
            rule = (
                f"must be one of {', '.join(map(shown, known))}" if known else "must not be given"
            )
            meant = hint(name, map(shown, (*options, *choices)))
            raise ValueError(f'{function}: {what} {rule}, got "{name}"{meant}')
    return Settings(numbers, names)


def shown(option: str) -> str:
    """As Python writes it."""
    return option + "_" * keyword.iskeyword(option)


def _checked_choice(function: str, name: str, value: Value, choice: Choice) -> str:
    flag = choice.legal == ("false", "true")
    if flag and isinstance(value, bool):
        return "true" if value else "false"
    if flag and not (isinstance(value, str) and value in choice.legal):
        raise TypeError(f"{function}: {name} must be a bool, got {kind_of(value)}")
    if not isinstance(value, str):
        raise TypeError(f"{function}: {name} must be a string, got {kind_of(value)}")
    if value not in choice.legal:
        raise ValueError(
            f'{function}: {name} must be one of {", ".join(choice.legal)}, got "{value}"'
            f"{hint(value, choice.legal)}"
        )
    return value


# ---- arrays --------------------------------------------------------------------------------------


class _Array(Protocol):
    def __array__(self) -> Any: ...


Numbers = Tensor | Sequence[float] | _Array  # of rows: few
_OF_ROWS = ("either", "per_row")


def of_numbers(value: Any, kind: str, like: Any = None) -> Any:
    """A list, or an array of numpy, as a tensor beside `like`; all else as it is."""
    if isinstance(value, Tensor) or not (
        isinstance(value, (list, tuple)) or hasattr(value, "__array__")
    ):
        return value
    device = like.device if isinstance(like, Tensor) else "cpu"
    try:
        if any(isinstance(each, Tensor) and each.requires_grad for each in value):
            return torch.stack([torch.as_tensor(each) for each in value])  # refused as such
        made = torch.tensor(value, device=device)
        as_it_is = kind in ("ids", "flags", "mask", "counts") and not made.is_floating_point()
        if as_it_is or made.is_complex():
            return made
        if isinstance(like, Tensor):
            return torch.tensor(value, dtype=result_dtype(like), device=device)
        if not hasattr(value, "__array__"):  # numbers of Python are not rounded to half
            wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
            return torch.tensor(value, dtype=wide, device=device)
        return made if made.is_floating_point() else made.float()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return value  # no numbers: refused by its type


def numbers_of(argument: Argument, value: Any, like: Like) -> Any:
    """of_numbers, of an argument that has a number a row."""
    return of_numbers(value, argument.kind, like.tensor) if argument.shape in _OF_ROWS else value


class Like(NamedTuple):
    """The tensor that the others of a call are like."""

    name: str
    tensor: Tensor
    packed: bool
    rows: int


def _check_kind(where: str, argument: Argument, tensor: Tensor, like: Like) -> None:
    kind, dtype = argument.kind, tensor.dtype
    if kind == "flags":
        if dtype != torch.bool:
            raise TypeError(f"{where} must be bool, got {dtype_text(dtype)}")
        return
    if kind == "ids":
        if dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{where} must be int32 or int64, got {dtype_text(dtype)}")
        return
    if kind == "mask" and (dtype == torch.bool or dtype in INTEGERS):
        return
    if kind == "counts" and dtype not in FLOATING:
        if dtype not in INTEGERS:
            raise TypeError(f"{where} must be floating or integer, got {dtype_text(dtype)}")
        return
    if kind == "same":
        if dtype != like.tensor.dtype:
            raise TypeError(
                f"{where} must be {dtype_text(like.tensor.dtype)} like {like.name}, got "
                f"{dtype_text(dtype)}"
            )
        return
    check_floating(where, tensor)
    narrow = kind == "narrow" and like.tensor.dtype != torch.float64
    if narrow and dtype == torch.float64:
        raise TypeError(
            f"{where} must not be wider than {like.name}, {dtype_text(like.tensor.dtype)}, got "
            f"float64. Pass {argument.name}.to(torch.float32)"
        )


def _rule_of_shape(shape: str, like: Like) -> str:
    sizes, name = shape_text(like.tensor), like.name
    if shape == "rows":
        return "[N] with offsets" if like.packed else "[B, T], or [N] with offsets"
    if shape == "positions":
        return f"{list(like.tensor.shape[:-1])} like {name} {sizes}"
    if shape == "weight":
        return f"[V, {like.tensor.shape[-1]}] with V at least 1, for {name} {sizes}"
    if shape == "bias":
        return f"[{like.tensor.shape[0]}] like the rows of {name}"
    return {
        "elements": "[B, T] or [N]",
        "answers": "[B]",
        "per_row": f"[{like.rows}]",
        "either": f"[{like.rows}] or {sizes}",
        "logits": "[..., V] with V at least 1",
        "hidden": "[..., H] with H at least 1",
        "heads": f"[..., k] like {name} {sizes}",
        "tokens": f"{sizes} like {name}",
    }[shape]


def _has_shape(shape: str, tensor: Tensor, like: Like) -> bool:
    sizes, of = tensor.shape, like.tensor.shape
    if shape == "tokens":
        return sizes == of
    if shape == "rows":
        return len(sizes) == (1 if like.packed else 2)
    if shape == "elements":
        return len(sizes) in (1, 2)
    if shape == "answers":
        return len(sizes) == 1
    if shape == "per_row":
        return sizes == (like.rows,)
    if shape in ("logits", "hidden"):
        return len(sizes) >= 1 and sizes[-1] >= 1
    if shape == "positions":
        return sizes == of[:-1]
    if shape == "heads":
        return len(sizes) == len(of) and sizes[:-1] == of[:-1]
    if shape == "weight":
        return len(sizes) == 2 and sizes[0] >= 1 and sizes[1] == of[-1]
    if shape == "bias":
        return sizes == of[:1]
    either = shape == "either" and sizes in ((like.rows,), (like.rows, 1))
    return either or sizes == of


def _check_shape(where: str, shape: str, tensor: Tensor, like: Like) -> None:
    if not _has_shape(shape, tensor, like):
        raise ValueError(f"{where} must be {_rule_of_shape(shape, like)}, got {shape_text(tensor)}")
    twofold = shape == "either" and like.packed and tensor.shape == like.tensor.shape
    if twofold and tensor.shape == (like.rows,) and like.rows > 0:
        raise ValueError(
            f"{where} must be [{like.rows}, 1] where there are as many rows as tokens, got "
            f"{shape_text(tensor)}. It may be read in two ways"
        )


def check_argument(function: str, argument: Argument, tensor: Tensor | None, like: Like) -> None:
    if tensor is None and not argument.required:
        return
    where = f"{function}: {argument.name}"
    check_given(where, tensor)
    _check_kind(where, argument, tensor, like)
    check_device(where, tensor, like.name, like.tensor)
    _check_shape(where, argument.shape, tensor, like)
    if not argument.differentiable:
        check_constant(where, argument.name, tensor)


# By Argument.kind, beside the dtype of the rows.
_PLAIN_DTYPES = {
    "floating": FLOATING,
    "narrow": tuple(each for each in FLOATING if each != torch.float64),
    "mask": (*FLOATING, torch.bool),
    "counts": FLOATING,
    "same": (),
}


def is_plain(argument: Argument, tensor: Any, like: Like) -> bool:
    """A constant beside the rows, of a dtype and shape that are taken as they are, as most
    arguments are: check_argument has nothing to say of it, and would take four times as long."""
    of, dtypes = like.tensor, _PLAIN_DTYPES.get(argument.kind)
    return (
        dtypes is not None
        and type(tensor) is Tensor
        and (tensor.dtype in dtypes or tensor.dtype == of.dtype)
        and not argument.like
        and tensor.layout == torch.strided
        and not tensor.is_nested  # which has no shape
        and tensor.shape in _plain_shapes(argument.shape, like)
        and tensor.device == of.device
        and not tensor.requires_grad
        and forward_ad._current_level < 0
    )


def _plain_shapes(shape: str, like: Like) -> tuple:
    if shape == "tokens":
        return (like.tensor.shape,)
    if shape == "either":  # packed ones like the rows may be read in two ways
        column = (like.rows, 1)
        return (column,) if like.packed else (column, like.tensor.shape)
    return ()


_OFFSETS = Argument("offsets", "offsets", "ids", False, False)


def check_offsets(function: str, offsets: Tensor, like: Like) -> None:
    where = f"{function}: offsets"
    check_given(where, offsets)
    _check_kind(where, _OFFSETS, offsets, like)
    if offsets.dim() != 1 or offsets.shape[0] < 1:
        raise ValueError(f"{where} must be [B + 1], got {shape_text(offsets)}")
    check_device(where, offsets, like.name, like.tensor)
