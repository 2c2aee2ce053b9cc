"""Objectives by name: the catalogue, and calls of the losses that take one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from tether._checks import Number, check_strings
from tether._functions import FUNCTIONS, LINKS, OBJECTIVES, WEIGHTS, Call
from tether._lists import Choice, Option, Settings, Value, checked_settings


class Objective(NamedTuple):
    family: str  # policy or preference
    name: str
    formula: str
    paper: str
    agreement: str  # who computes the same in the tests
    options: dict[str, Option]
    choices: dict[str, Choice]


class Weight(NamedTuple):
    """A weight of tokens, never differentiated: W S in place of the surrogate S."""

    name: str
    formula: str
    paper: str
    leaves: bool  # changes the mask instead: what it takes out is counted by nothing
    options: dict[str, Option]
    levels: tuple[str, ...]


Weights = Mapping[str, Mapping[str, Value]]

# Every policy objective has them among its choices: none, or a level.
_WEIGHTS = {
    row[0]: Weight(*row, options, OBJECTIVES[0][2][row[0]].legal[1:]) for row, options in WEIGHTS
}
# Every preference objective has the options of a link once it is chosen.
_OF_LINKS = {f"link_{name}": option for link in LINKS for name, option in link.items()}
_CATALOGUE = {
    row[1]: Objective(
        *row,
        options | (_OF_LINKS if row[0] == "preference" else {}),
        {k: v for k, v in choices.items() if k not in _WEIGHTS},
    )
    for row, options, choices in OBJECTIVES
}
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


def weights() -> dict[str, Weight]:
    """Every weight by name, for `weights=` of the policy losses."""
    return dict(_WEIGHTS)


def _weight_settings(function: str, weights: Weights | None) -> Settings:
    """As the operators take them: the level under the weight's name, its options behind it."""
    if weights is not None and not isinstance(weights, Mapping):
        raise TypeError(f"{function}: weights must be a dict, got {type(weights).__name__}")
    out = Settings({}, {})
    for name, values in (weights or {}).items():
        if name not in _WEIGHTS:
            raise ValueError(f'{function}: weights must be of {", ".join(_WEIGHTS)}, got "{name}"')
        if not isinstance(values, Mapping):
            raise TypeError(
                f"{function}: weights of {name} must be a dict of its options, got "
                f"{type(values).__name__}"
            )
        row = _WEIGHTS[name]
        for key in values:
            if key != "level" and key not in row.options:
                known = ", ".join((*row.options, "level"))
                raise ValueError(f'{function}: weights of {name} must be of {known}, got "{key}"')
        options = {f"{name}.{key}": option for key, option in row.options.items()}
        levels = {f"{name}.level": Choice("token", row.levels)}
        named = {f"{name}.{key}": value for key, value in values.items()}
        settings = checked_settings(function, options, levels, named)
        out.numbers.update(settings.numbers)
        out.choices[name] = settings.choices.get(f"{name}.level", "token")
    return out


def objective_call(
    callee: str,
    tensors: Mapping[str, Tensor | None],
    objective: str,
    options: Mapping[str, Value],
    denominators: Mapping[str, Number],
    *,
    family: str = "policy",
    weights: Weights | None = None,
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
    of_weights = _weight_settings(function, weights)
    settings = settings._replace(
        numbers={**settings.numbers, **of_weights.numbers, **denominators},
        choices={"objective": objective, **settings.choices, **of_weights.choices},
    )
    return Call(loss, checked, settings)
