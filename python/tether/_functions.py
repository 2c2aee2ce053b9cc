"""Functions as the library declares them, with what tracing and autograd know of them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tether._checks import (
    INTEGERS,
    Number,
    check_given,
    check_no_tangents,
    in_name_of,
    number_of,
    result_dtype,
)
from tether._lists import (
    Argument,
    Like,
    Result,
    Settings,
    Value,
    check_argument,
    check_offsets,
    checked_settings,
    choices_of,
    is_plain,
    numbers_of,
    of_numbers,
    options_of,
    shown,
)
from tether._ops import (
    Arriving,
    below_autograd,
    is_eager,
    once_differentiable,
    ops,
    scaled,
)
from tether._values import check_values


class Call(NamedTuple):
    """A checked call: tensors in the order of the operator and of the types that it takes."""

    function: Function
    tensors: dict[str, Tensor | None]
    settings: Settings
    # A surrogate of one's own, which no operator knows, and its options.
    own: Mapping[str, Any] = {}
    more: tuple[Tensor, ...] = ()  # that the operator takes beside those of its list
    caller: str = ""  # the public function, in whose name errors are; empty: the function's own

    def name(self) -> str:
        return self.caller or self.function.name

    def arguments(self) -> tuple:
        settings = self.settings
        if self.name() != self.function.name:
            settings = settings._replace(choices={**settings.choices, "function": self.caller})
        return (*self.tensors.values(), *self.more, *settings.words())

    def run(self) -> tuple[Tensor, ...] | Tensor:
        return self.function.operator(*self.arguments())

    def run_with_gradient(self) -> tuple[Tensor, ...]:
        """Differentiable once in the arguments that the list says."""
        named = self.leaves()
        check_no_tangents(self.name(), **named)
        leaves = named.values()
        wanted = torch.is_grad_enabled() and any(
            each is not None and each.requires_grad for each in leaves
        )
        function, arguments = self.function, self.arguments()
        if not is_eager():
            return function.operator(*arguments, wanted)
        if not wanted:
            return below_autograd(function.operator, *arguments, False)
        others = []
        whose = (function, self.name())
        loss = _Differentiated.apply(whose, (*arguments, True), others, *leaves)
        return loss, *others

    def with_numbers(self, numbers: Mapping[str, Number]) -> Call:
        settings = self.settings._replace(numbers={**self.settings.numbers, **numbers})
        return self._replace(settings=settings)

    def detached(self) -> Call:
        tensors = {
            name: None if each is None else each.detach() for name, each in self.tensors.items()
        }
        return self._replace(tensors=tensors)

    def leaves(self) -> dict[str, Tensor | None]:
        """What the result is differentiable in."""
        return {name: self.tensors[name] for name in self.function.leaves}

    def in_name_of(self, run: Callable) -> Any:
        """run(), of what knows the function's own name."""
        return in_name_of(self.name(), self.function.name, run)

    def once_differentiable(
        self, *, forward_mode: bool = False, arriving: Arriving | None = None
    ) -> dict[str, Tensor | None]:
        """The tensors, for torch's own operations."""
        function, leaves = self.name(), self.leaves()
        if not forward_mode:
            check_no_tangents(function, **leaves)
        return self.tensors | {
            name: once_differentiable(function, each, arriving=arriving)
            for name, each in leaves.items()
        }

    def on_tensors(self, reference: Callable, *, rows: int = 0, **further: Any):
        """What the function of `tether.reference` gives, its loss differentiable once."""
        self.check_settings(rows)
        arriving = Arriving(others=bool(self.own)) if is_eager() else None
        tensors = self.once_differentiable(arriving=arriving)
        out = self.in_name_of(lambda: reference(**tensors, **further, **self.named_settings()))
        return out if arriving is None else out._replace(loss=arriving.at(out.loss))

    def named_settings(self) -> dict[str, Value]:
        """As `tether.reference` takes them; a normalizer is an argument of its own there."""
        numbers, choices = self.settings
        named = {shown(k): v for k, v in numbers.items() if not k.startswith("normalizer.")}
        return named | choices | self.own

    def check_settings(self, rows: int = 0) -> None:
        """The rules between options and arrays, where no operator checks them. Tensors among the
        options are not waited for; where a graph is traced nothing can be asked."""
        if torch.compiler.is_compiling():
            return
        numbers = {k: v for k, v in self.settings.numbers.items() if number_of(v) is not None}
        given = [name for name, each in self.tensors.items() if each is not None]
        words = self.settings._replace(numbers=numbers).words()
        if type(words[1]) is Tensor:  # else of a mode in which tensors hold nothing
            ops.check_settings(self.name(), self.function.name, given, rows, *words)
        of_turns = any(each.startswith("turn") for each in self.settings.choices.values())
        check_values(self.name(), self.tensors, of_turns=of_turns)


class Function:
    """One function of the library by its lists."""

    def __init__(self, name: str, description: dict):
        self.name = name
        self.arguments = tuple(Argument(*each) for each in description["arguments"])
        self.leaves = tuple(each.name for each in self.arguments if each.differentiable)
        self.packed = description["packed"]
        self.gradient = description["gradient"]
        self.options = options_of(description)
        self.choices = choices_of(description)
        self.results = tuple(
            Result(result, kind, of, tuple(size for size in sizes if size))
            for result, kind, of, sizes in description["results"]
        )
        # Of the gradient of each leaf, among the results behind the loss.
        places = {each.of: i - 1 for i, each in enumerate(self.results) if each.of}
        self.gradients = tuple(places[name] for name in self.leaves if self.gradient)
        self.operator = None
        if self.results:
            self._take_operator(name)

    def _take_operator(self, name: str) -> None:
        self.operator = getattr(ops, name).default
        _register_fake(self, name)
        if self.gradient:
            _register_autograd(self, name)

    def by_operator(self, name: str) -> Function:
        """The same by another operator, which takes more tensors before the settings."""
        out = copy.copy(self)
        out._take_operator(name)
        return out

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
        """The tensors as the operator takes them, or an error in the name of `function`. What is
        not named is not given."""
        function = function or self.name
        first, *others = self.arguments
        rows, offsets = tensors[first.name], tensors.get("offsets")
        if offsets is not None:
            offsets = of_numbers(offsets, "ids", rows)
            check_given(f"{function}: offsets", offsets)
        like = Like(first.name, rows, offsets is not None, 0)
        check_argument(function, first, rows, like)
        if offsets is not None:
            check_offsets(function, offsets, like)
        if self.packed:
            count = rows.shape[0] if offsets is None else offsets.shape[0] - 1
            like = Like(first.name, rows, offsets is not None, count)
        out = {first.name: rows}
        for each in others:
            tensor = tensors.get(each.name)
            absent = tensor is None and not each.required
            if not (absent or is_plain(each, tensor, like)):
                of = like._replace(name=each.like, tensor=tensors[each.like]) if each.like else like
                tensor = numbers_of(each, tensor, of)
                check_argument(function, each, tensor, of)
                tensor = _as_taken(each, tensor, like)
            out[each.name] = tensor
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
        return Call(self, checked, settings, caller=function)


def _as_taken(argument: Argument, tensor: Tensor, like: Like) -> Tensor:
    """Masks of integers as float32, counts of integers as float64, one number a row as [B, 1]."""
    if argument.kind == "mask" and tensor.dtype in INTEGERS:
        return tensor.to(torch.float32)
    if argument.kind == "counts" and tensor.dtype in INTEGERS:
        return tensor.to(torch.float64)
    a_row = argument.shape == "either" and tensor.dim() == 1 and tensor.shape != like.tensor.shape
    return tensor.unsqueeze(1) if a_row else tensor


# ---- tracing and autograd ------------------------------------------------------------------------


def _fake_result(result: Result, tensors: Mapping[str, Tensor | None], first: str, wanted: bool):
    like = tensors.get(result.of or first)
    like = tensors[first] if like is None else like
    if result.kind == "like":
        return like.new_empty(like.shape)
    if result.kind == "scalar":
        return like.new_empty((), dtype=result_dtype(like))
    if result.kind == "block":
        return like.new_empty(result.sizes, dtype=torch.float64)
    wanted = wanted and tensors[result.of] is not None
    stored = torch.float32 if wanted and like.dtype == torch.float16 else like.dtype
    return like.new_empty(like.shape if wanted else (0,), dtype=stored)


def _register_fake(function: Function, operator: str) -> None:
    names = [each.name for each in function.arguments]

    def fake(*arguments):
        tensors = dict(zip(names, arguments, strict=False))
        wanted = function.gradient and arguments[-1]
        out = [_fake_result(each, tensors, names[0], wanted) for each in function.results]
        return out[0] if len(out) == 1 else tuple(out)

    torch.library.register_fake(f"tether::{operator}")(fake)


def _register_autograd(function: Function, operator: str) -> None:
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

    torch.library.register_autograd(f"tether::{operator}", backward, setup_context=setup)


class _Differentiated(torch.autograd.Function):
    """The loss of an operator, without torch.library's way from there to `backward`, which takes
    longer than the loss of a few rows. What else the operator gives is left in `others`."""

    @staticmethod
    def forward(ctx, whose, arguments, others, *leaves):
        function, ctx.name = whose
        loss, *rest = below_autograd(function.operator, *arguments)
        others.extend(rest)
        ctx.set_materialize_grads(False)
        needed = ctx.needs_input_grad[3:]
        kept = [leaf if need else None for leaf, need in zip(leaves, needed, strict=True)]
        ctx.save_for_backward(*(rest[i] for i in function.gradients), *kept)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        count = len(ctx.needs_input_grad) - 3
        if upstream is None:
            return (None,) * (3 + count)
        saved = ctx.saved_tensors
        gradients = [
            None if leaf is None else scaled(ctx.name, upstream, gradient, leaf)
            for gradient, leaf in zip(saved[:count], saved[count:], strict=True)
        ]
        return None, None, None, *gradients


_DESCRIPTION = json.loads(ops.description()[0])
FUNCTIONS = {name: Function(name, each) for name, each in _DESCRIPTION["functions"].items()}
OBJECTIVES = [(row["row"], options_of(row), choices_of(row)) for row in _DESCRIPTION["objectives"]]
DIALECTS = _DESCRIPTION["dialects"]
WEIGHTS = [(row["row"], options_of(row)) for row in _DESCRIPTION["weights"]]
BATCH_WEIGHTS = [
    (row["row"], options_of(row), choices_of(row)) for row in _DESCRIPTION["batch_weights"]
]
LINKS = [options_of(row) for row in _DESCRIPTION["links"]]
ADVANTAGES = [(row["row"], options_of(row), choices_of(row)) for row in _DESCRIPTION["advantages"]]
