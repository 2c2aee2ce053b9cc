"""Objectives by name: the catalogue, and the words of a call as the operators take them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tether._checks import Number, check_number, check_strings
from tether._ops import ops

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
    check_strings(function, objective=objective)
    numbers, choices = {}, {}
    for name, value in options.items():
        if name not in _CHOICES[family]:
            check_number(function, name, value)
            numbers[name] = value
        elif isinstance(value, bool):
            choices[name] = "true" if value else "false"
        else:
            check_strings(function, **{name: value})
            choices[name] = value
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


def packed(numbers: Sequence[Number]) -> Tensor:
    """Numbers and tensors of one number, side by side for an operator."""
    if not any(isinstance(each, Tensor) for each in numbers):
        return torch.tensor(numbers, dtype=torch.float64, device="cpu")
    tensors = [
        torch.as_tensor(each, dtype=torch.float64, device="cpu").reshape(()) for each in numbers
    ]
    return torch.stack(tensors)
