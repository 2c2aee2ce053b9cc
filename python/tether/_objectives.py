"""Objectives by name: the catalogue, and calls of the losses that take one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from tether._checks import Number, check_strings
from tether._functions import FUNCTIONS, OBJECTIVES, Call
from tether._lists import Choice, Option, Value, checked_settings


class Objective(NamedTuple):
    family: str  # policy or preference
    name: str
    formula: str
    paper: str
    agreement: str  # who computes the same in the tests
    options: dict[str, Option]
    choices: dict[str, Choice]


_CATALOGUE = {row[1]: Objective(*row, options, choices) for row, options, choices in OBJECTIVES}
_FAMILIES = {
    family: {name: row for name, row in _CATALOGUE.items() if row.family == family}
    for family in dict.fromkeys(row.family for row in _CATALOGUE.values())
}


def objectives(family: str = "policy") -> dict[str, Objective]:
    """Every objective of a family by name, with its formula, paper, options and choices."""
    check_strings("objectives", family=family)
    if family not in _FAMILIES:
        raise ValueError(
            f'objectives: family must be one of {", ".join(_FAMILIES)}, got "{family}"'
        )
    return dict(_FAMILIES[family])


def objective_call(
    callee: str,
    tensors: Mapping[str, Tensor | None],
    objective: str,
    options: Mapping[str, Value],
    denominators: Mapping[str, Number],
    *,
    family: str = "policy",
    function: str = "",
) -> Call:
    """A checked call of the loss `callee`, in the name of `function`."""
    function = function or callee
    loss = FUNCTIONS[callee]
    checked = loss.checked(tensors, function)
    check_strings(function, objective=objective)
    rows = _FAMILIES[family]
    if objective not in rows:
        raise ValueError(
            f'{function}: objective must be one of {", ".join(rows)}, got "{objective}"'
        )
    row = rows[objective]
    settings = checked_settings(function, row.options, row.choices, options)
    settings = settings._replace(
        numbers={**settings.numbers, **denominators},
        choices={"objective": objective, **settings.choices},
    )
    return Call(loss, checked, settings)
