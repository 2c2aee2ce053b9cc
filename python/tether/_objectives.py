"""Objectives by name: the catalogue, and the words of a call as the operators take them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tether._ops import ops

Number = float | Tensor
ABSENT = float("-inf")  # a count that the caller does not give


class Option(NamedTuple):
    default: float
    range: str  # in words: "in [0, 1]"


class Choice(NamedTuple):
    default: str
    legal: str  # "k1, k2, k3"


class Objective(NamedTuple):
    family: str  # policy or preference
    name: str
    formula: str
    paper: str
    agreement: str  # who computes the same in the tests
    options: dict[str, Option]
    choices: dict[str, Choice]


@functools.cache
def _catalogue() -> dict[str, Objective]:
    out = {}
    for family, name, formula, paper, agreement in zip(*[iter(ops.catalogue())] * 5, strict=True):
        names, defaults, ranges = ops.catalogue_options(name)
        options = {each: Option(*rest) for each, *rest in zip(names, defaults, ranges, strict=True)}
        choices = zip(*[iter(ops.catalogue_choices(name))] * 3, strict=True)
        choices = {each: Choice(default, legal) for each, default, legal in choices}
        out[name] = Objective(family, name, formula, paper, agreement, options, choices)
    return out


def objectives(family: str = "policy") -> dict[str, Objective]:
    """Every objective of a family by name, with its formula, paper, options and choices."""
    rows = {name: row for name, row in _catalogue().items() if row.family == family}
    if not rows:
        raise ValueError(f'objectives: family must be one of policy, preference, got "{family}"')
    return rows


_CHOICES = {
    family: tuple(next(iter(objectives(family).values())).choices)
    for family in ("policy", "preference")
}


class Wanted(NamedTuple):
    """An objective in the words of a call."""

    objective: str
    numbers: dict[str, Number]
    choices: dict[str, str]

    def arguments(self) -> tuple:
        """As the operators take it."""
        return (
            self.objective,
            list(self.numbers),
            packed(list(self.numbers.values())),
            list(self.choices),
            list(self.choices.values()),
        )


def checked_objective(
    family: str, function: str, objective: str, options: dict[str, Number | str | bool]
) -> Wanted:
    if not isinstance(objective, str):
        raise TypeError(f"{function}: objective must be a string, got {type(objective).__name__}")
    numbers, choices = {}, {}
    for name, value in options.items():
        if name not in _CHOICES[family]:
            check_number(function, name, value)
            numbers[name] = value
        elif isinstance(value, bool):
            choices[name] = "true" if value else "false"
        elif isinstance(value, str):
            choices[name] = value
        else:
            raise TypeError(f"{function}: {name} must be a string, got {type(value).__name__}")
    return Wanted(objective, numbers, choices)


def check_options(family: str, function: str, wanted: Wanted) -> None:
    """Where no operator does, except where a graph is traced: numbers are not known there."""
    if torch.compiler.is_compiling():
        return
    objective, numbers, choices = wanted
    values = [float(each) for each in numbers.values()]
    ops.objective_check(
        *(family, function, objective),
        *(list(numbers), values, list(choices), list(choices.values())),
    )


def check_number(function: str, name: str, value: Number) -> None:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{function}: {name} must be one number, got {list(value.shape)}")
        if value.device.type == "meta":
            raise ValueError(f"{function}: {name} must be a number, got a tensor on meta")
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{function}: {name} must be a number, got {type(value).__name__}")


def check_positive(function: str, name: str, value: Number, *, zero: bool = False) -> None:
    """A finite number above 0, or with `zero` at least 0. What a tensor holds is not looked at."""
    check_number(function, name, value)
    legal = isinstance(value, Tensor) or ((value > 0 or (zero and value == 0)) and value < math.inf)
    if not legal:
        rule = "at least 0" if zero else "greater than 0"
        raise ValueError(f"{function}: {name} must be {rule} and finite, got {value:g}")


def packed(numbers: Sequence[Number]) -> Tensor:
    """Numbers and tensors of one number, side by side for an operator."""
    if not any(isinstance(each, Tensor) for each in numbers):
        return torch.tensor(numbers, dtype=torch.float64, device="cpu")
    tensors = [
        torch.as_tensor(each, dtype=torch.float64, device="cpu").detach().reshape(())
        for each in numbers
    ]
    return torch.stack(tensors)
