"""Functions as the library declares them: their arrays, options and results, read once.

The lists stand beside the structs of C++ (core/arguments.h, core/options.h); from them come the
checks at the door, the same in words and order as those of the C++ faces, what tracing has to know
of the operators, and their autograd. Only presence, types, devices, shapes and numbers of Python
are looked at, so nothing waits for a device and nothing breaks a traced graph: what tensors hold is
checked by the operators.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tether._checks import (
    INTEGERS,
    Number,
    check_constant,
    check_device,
    check_floating,
    check_given,
    check_no_tangents,
    check_number,
    dtype_text,
    shape_text,
)
from tether._ops import ops, scaled

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


def _options(description: dict) -> dict[str, Option]:
    return {name: Option(*rest) for name, *rest in description["options"]}


def _choices(description: dict) -> dict[str, Choice]:
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
    if not any(isinstance(each, Tensor) for each in numbers):
        return torch.tensor(numbers, dtype=torch.float64, device="cpu")
    tensors = [
        torch.as_tensor(each, dtype=torch.float64, device="cpu").reshape(()) for each in numbers
    ]
    return torch.stack(tensors)


def check_range(function: str, name: str, value: Number, option: Option) -> None:
    """What a tensor holds is not looked at."""
    check_number(function, name, value)
    if not isinstance(value, Tensor) and not option.contains(value):
        raise ValueError(f"{function}: {name} must be {option.range}, got {value:g}")


def checked_settings(
    function: str,
    options: Mapping[str, Option],
    choices: Mapping[str, Choice],
    values: Mapping[str, Value],
) -> Settings:
    """A name that ends in _ is that of an option which Python has as a word."""
    numbers, names = {}, {}
    for name, value in values.items():
        option = name.removesuffix("_")
        if option in choices:
            names[option] = _checked_choice(function, name, value, choices[option])
        elif option in options:
            check_range(function, name, value, options[option])
            numbers[option] = value
        else:
            what, known = ("choice", choices) if isinstance(value, str) else ("option", options)
            raise ValueError(f'{function}: {what} must be one of {", ".join(known)}, got "{name}"')
    return Settings(numbers, names)


def _checked_choice(function: str, name: str, value: Value, choice: Choice) -> str:
    flag = choice.legal == ("false", "true")
    if flag and isinstance(value, bool):
        return "true" if value else "false"
    if flag and value not in choice.legal:
        raise TypeError(f"{function}: {name} must be a bool, got {type(value).__name__}")
    if not isinstance(value, str):
        raise TypeError(f"{function}: {name} must be a string, got {type(value).__name__}")
    if value not in choice.legal:
        raise ValueError(
            f'{function}: {name} must be one of {", ".join(choice.legal)}, got "{value}"'
        )
    return value


# ---- arrays --------------------------------------------------------------------------------------


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
    if twofold and tensor.shape == (like.rows,):
        raise ValueError(
            f"{where} must be [{like.rows}, 1] where there are as many rows as tokens, got "
            f"{shape_text(tensor)}. It may be read in two ways"
        )


def _check_argument(function: str, argument: Argument, tensor: Tensor | None, like: Like) -> None:
    where = f"{function}: {argument.name}"
    if tensor is None and not argument.required:
        return
    check_given(where, tensor)
    _check_kind(where, argument, tensor, like)
    check_device(where, tensor, like.name, like.tensor)
    _check_shape(where, argument.shape, tensor, like)
    if not argument.differentiable:
        check_constant(where, argument.name, tensor)


_OFFSETS = Argument("offsets", "offsets", "ids", False, False)


def _check_offsets(function: str, offsets: Tensor, like: Like) -> None:
    where = f"{function}: offsets"
    check_given(where, offsets)
    _check_kind(where, _OFFSETS, offsets, like)
    if offsets.dim() != 1 or offsets.shape[0] < 1:
        raise ValueError(f"{where} must be [B + 1], got {shape_text(offsets)}")
    check_device(where, offsets, like.name, like.tensor)


# ---- functions -----------------------------------------------------------------------------------


class Call(NamedTuple):
    """A checked call: tensors in the order of the operator, masks of integers as float32."""

    function: Function
    tensors: dict[str, Tensor | None]
    settings: Settings

    def run(self) -> tuple[Tensor, ...] | Tensor:
        return self.function.operator(*self.tensors.values(), *self.settings.words())

    def run_with_gradient(self) -> tuple[Tensor, ...]:
        """Differentiable once in the arguments that the list says."""
        check_no_tangents(
            self.function.name, **{name: self.tensors[name] for name in self.function.leaves}
        )
        wanted = torch.is_grad_enabled() and any(
            each is not None and each.requires_grad for each in self.tensors.values()
        )
        return self.function.operator(*self.tensors.values(), *self.settings.words(), wanted)

    def with_numbers(self, numbers: Mapping[str, Number]) -> Call:
        settings = self.settings._replace(numbers={**self.settings.numbers, **numbers})
        return self._replace(settings=settings)

    def detached(self) -> Call:
        tensors = {
            name: None if each is None else each.detach() for name, each in self.tensors.items()
        }
        return self._replace(tensors=tensors)

    def on_cpu(self) -> Call:
        """For functions without a gradient: what lies on a device comes over."""
        call = self.detached()
        for name, each in call.tensors.items():
            if each is not None and each.device.type == "meta":
                raise ValueError(
                    f"{self.function.name}: {name} must hold numbers, got a tensor on meta"
                )
        tensors = {
            name: None if each is None else each.cpu() for name, each in call.tensors.items()
        }
        return call._replace(tensors=tensors)

    def named_settings(self) -> dict[str, Value]:
        """As `tether.reference` takes them; a normalizer is an argument of its own there."""
        numbers, choices = self.settings
        named = {name: each for name, each in numbers.items() if "." not in name}
        return named | choices

    def check_settings(self, function: str, rows: int = 0) -> None:
        """The rules between options and arrays, where no operator checks them. Tensors among the
        options are not waited for; where a graph is traced nothing can be asked."""
        if torch.compiler.is_compiling():
            return
        numbers = {k: v for k, v in self.settings.numbers.items() if not isinstance(v, Tensor)}
        given = [name for name, each in self.tensors.items() if each is not None]
        words = self.settings._replace(numbers=numbers).words()
        ops.check_settings(function, self.function.name, given, rows, *words)


class Function:
    """One function of the library by its lists."""

    def __init__(self, name: str, description: dict):
        self.name = name
        self.arguments = tuple(Argument(*each) for each in description["arguments"])
        self.leaves = tuple(each.name for each in self.arguments if each.differentiable)
        self.packed = description["packed"]
        self.gradient = description["gradient"]
        self.options = _options(description)
        self.choices = _choices(description)
        self.results = tuple(
            Result(result, kind, of, tuple(size for size in sizes if size))
            for result, kind, of, sizes in description["results"]
        )
        self.operator = getattr(ops, name) if self.results else None
        if self.results:
            _register_fake(self)
        if self.gradient:
            _register_autograd(self)

    def naming(self, **names: str) -> Function:
        """The same with other names of arguments, those of the Python signature."""
        out = copy.copy(self)
        out.arguments = tuple(
            each._replace(name=names.get(each.name, each.name)) for each in self.arguments
        )
        return out

    def checked(
        self, tensors: Mapping[str, Tensor | None], function: str = ""
    ) -> dict[str, Tensor | None]:
        """The tensors as the operator takes them, or an error in the name of `function`."""
        function = function or self.name
        first, *others = self.arguments
        offsets = tensors.get("offsets")
        rows = tensors[first.name]
        check_given(f"{function}: {first.name}", rows)
        like = Like(first.name, rows, offsets is not None, 0)
        _check_argument(function, first, rows, like)
        if offsets is not None:
            _check_offsets(function, offsets, like)
        if self.packed:
            count = rows.shape[0] if offsets is None else offsets.shape[0] - 1
            like = like._replace(rows=count)
        for each in others:
            of = like._replace(name=each.like, tensor=tensors[each.like]) if each.like else like
            _check_argument(function, each, tensors[each.name], of)
        out = {each.name: tensors[each.name] for each in self.arguments}
        for each in others:
            if each.kind == "mask" or each.shape == "either":
                out[each.name] = _as_taken(each, out[each.name], like)
        if self.packed:
            out["offsets"] = offsets
        return out

    def call(
        self,
        tensors: Mapping[str, Tensor | None],
        values: Mapping[str, Value],
        function: str = "",
    ) -> Call:
        function = function or self.name
        checked = self.checked(tensors, function)
        settings = checked_settings(function, self.options, self.choices, values)
        return Call(self, checked, settings)


def _as_taken(argument: Argument, tensor: Tensor | None, like: Like) -> Tensor | None:
    """Masks of integers as float32, one number a row as [B, 1]."""
    if tensor is None:
        return None
    if argument.kind == "mask" and tensor.dtype in INTEGERS:
        return tensor.to(torch.float32)
    a_row = argument.shape == "either" and tensor.dim() == 1 and tensor.shape != like.tensor.shape
    return tensor[:, None] if a_row else tensor


# ---- tracing and autograd ------------------------------------------------------------------------


def _fake_result(result: Result, tensors: Mapping[str, Tensor | None], first: str, wanted: bool):
    like = tensors.get(result.of or first)
    like = tensors[first] if like is None else like
    if result.kind == "like":
        return like.new_empty(like.shape)
    if result.kind == "scalar":
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        return like.new_empty((), dtype=wide)
    if result.kind == "block":
        return like.new_empty(result.sizes, dtype=torch.float64)
    wanted = wanted and tensors[result.of] is not None
    stored = torch.float32 if wanted and like.dtype == torch.float16 else like.dtype
    return like.new_empty(like.shape if wanted else (0,), dtype=stored)


def _register_fake(function: Function) -> None:
    names = [each.name for each in function.arguments]

    def fake(*arguments):
        tensors = dict(zip(names, arguments, strict=False))
        wanted = function.gradient and arguments[-1]
        out = [_fake_result(each, tensors, names[0], wanted) for each in function.results]
        return out[0] if len(out) == 1 else tuple(out)

    torch.library.register_fake(f"tether::{function.name}")(fake)


def _register_autograd(function: Function) -> None:
    """The loss is the first result; gradients were found with it, and backward is a scaling."""
    places = {each.name: i for i, each in enumerate(function.arguments)}
    stored = [(i, places[each.of]) for i, each in enumerate(function.results) if each.of]

    def setup(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.arguments = len(inputs)
        needed = [ctx.needs_input_grad[place] for _, place in stored]
        # Constants may be tensors of inference_mode, which cannot be saved.
        ctx.save_for_backward(
            *(output[i] for i, _ in stored),
            *(
                inputs[place] if need else None
                for need, (_, place) in zip(needed, stored, strict=True)
            ),
        )

    def backward(ctx, upstream, *_):
        gradients = [None] * ctx.arguments
        saved = ctx.saved_tensors
        inputs = saved[len(stored) :]
        for gradient, tensor, (_, place) in zip(saved[: len(stored)], inputs, stored, strict=True):
            if upstream is not None and ctx.needs_input_grad[place]:
                gradients[place] = scaled(function.name, upstream, gradient, tensor)
        return tuple(gradients)

    torch.library.register_autograd(f"tether::{function.name}", backward, setup_context=setup)


_DESCRIPTION = json.loads(ops.description()[0])
FUNCTIONS = {name: Function(name, each) for name, each in _DESCRIPTION["functions"].items()}
OBJECTIVES = [(row["row"], _options(row), _choices(row)) for row in _DESCRIPTION["objectives"]]
