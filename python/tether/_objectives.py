"""Objectives by name: the catalogue, and calls of the losses that take one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from tether._checks import Number, check_strings, hint
from tether._functions import DIALECTS, FUNCTIONS, LINKS, OBJECTIVES, WEIGHTS, Call
from tether._lists import Choice, Option, Settings, Value, checked_settings


class Objective(NamedTuple):
    family: str  # policy or preference
    name: str
    formula: str
    paper: str
    agreement: str  # who computes the same in the tests
    options: dict[str, Option]
    choices: dict[str, Choice]
    weights: dict[str, str]  # its own weights of tokens, with their levels


class Weight(NamedTuple):
    """A weight of tokens, never differentiated: W S in place of the surrogate S."""

    name: str
    formula: str
    paper: str
    leaves: bool  # changes the mask instead: what it takes out is counted by nothing
    level: str  # unless said
    options: dict[str, Option]
    levels: tuple[str, ...]


class Dialect(NamedTuple):
    """A trainer's policy loss under its name there: an objective with the trainer's defaults."""

    name: str
    objective: str
    options: dict[str, Value]  # and choices
    weights: dict[str, dict[str, Value]]


Weights = Mapping[str, Mapping[str, Value]]

# Every policy objective has them among its choices: none, or a level.
_WEIGHT_LEVELS = OBJECTIVES[0][2][WEIGHTS[0][0][0]].legal[1:]
_WEIGHTS = {row[0]: Weight(*row, options, _WEIGHT_LEVELS) for row, options in WEIGHTS}
# Every preference objective has the options of a link once it is chosen.
_OF_LINKS = {f"link_{name}": option for link in LINKS for name, option in link.items()}
_CATALOGUE = {
    row[1]: Objective(
        *row,
        options | (_OF_LINKS if row[0] == "preference" else {}),
        {k: v for k, v in choices.items() if k not in _WEIGHTS},
        {k: v.default for k, v in choices.items() if k in _WEIGHTS and v.default != "none"},
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
    return copy.deepcopy(_FAMILIES[family])


def weights() -> dict[str, Weight]:
    """Every weight by name, for `weights=` of the policy losses."""
    return copy.deepcopy(_WEIGHTS)


def _dialect(name: str, objective: str, settings: list[tuple[str, str]]) -> Dialect:
    options, weights = {}, {}
    for key, text in settings:
        weight, _, option = key.rpartition(".")
        if key in _WEIGHTS:
            weights.setdefault(key, {})["level"] = text
        elif weight:
            weights.setdefault(weight, {})[option] = float(text)
        else:
            options[key] = float(text) if key in _CATALOGUE[objective].options else text
    return Dialect(name, objective, options, weights)


_DIALECTS = {row[0]: _dialect(*row) for row in DIALECTS}


def dialects() -> dict[str, Dialect]:
    """Every dialect by name, `objective="verl.vanilla"` of the policy losses."""
    return copy.deepcopy(_DIALECTS)


def resolved(
    objective: str, options: Mapping[str, Value], weights: Weights | None
) -> tuple[str, Mapping[str, Value], Weights | None]:
    """The objective of a dialect with its settings, beneath the caller's; another as it is."""
    if not isinstance(objective, str) or objective not in _DIALECTS:
        return objective, options, weights
    own = _DIALECTS[objective]
    options = {**own.options, **options}
    if weights is None or isinstance(weights, Mapping):
        given = weights or {}
        names = dict.fromkeys((*own.weights, *given))
        weights = {k: _merged(own.weights.get(k, {}), given.get(k, {})) for k in names}
    return own.objective, options, weights or None


def _merged(own: dict[str, Value], given: Any) -> Any:
    return {**own, **given} if isinstance(given, Mapping) else given


def _weight_settings(function: str, weights: Weights | None, own: Mapping[str, str]) -> Settings:
    """As the operators take them: the level under the weight's name, its options behind it. Of a
    weight that the objective has, the level is the objective's unless said."""
    if weights is not None and not isinstance(weights, Mapping):
        raise TypeError(f"{function}: weights must be a dict, got {type(weights).__name__}")
    out = Settings({}, {})
    for name, values in (weights or {}).items():
        if name not in _WEIGHTS:
            raise ValueError(
                f'{function}: weights must be of {", ".join(_WEIGHTS)}, got "{name}"'
                f"{hint(name, _WEIGHTS)}"
            )
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
        level = own.get(name, row.level)
        levels = {f"{name}.level": Choice(level, row.levels)}
        named = {f"{name}.{key}": value for key, value in values.items()}
        settings = checked_settings(function, options, levels, named)
        out.numbers.update(settings.numbers)
        out.choices[name] = settings.choices.get(f"{name}.level", level)
    return out


def takes_tokens_out(objective: str, weights: Weights | None) -> bool:
    """Whether a weight of the objective leaves, or one of the caller's."""
    names = {*_FAMILIES["policy"][objective].weights, *(weights or ())}
    return any(_WEIGHTS[name].leaves for name in names)


def levels_of(objective: str, choices: dict[str, str], weights: Weights | None) -> set[str]:
    """At which an objective takes its ratio and its weights."""
    row = _FAMILIES["policy"][objective]
    of_weights = row.weights | {name: choices[name] for name in weights or ()}
    leaving = {name for name in of_weights if _WEIGHTS[name].leaves}
    needed = {
        level
        for name, level in of_weights.items()
        if name not in leaving or level.startswith("turn")  # ids of turns are not among the chunks
    }
    return needed | {choices.get("level", row.choices["level"].default)}


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
    if family == "policy":
        objective, options, weights = resolved(objective, options, weights)
    loss = FUNCTIONS[callee]
    checked = loss.checked(tensors, function)
    check_strings(function, objective=objective)
    rows = _FAMILIES[family]
    if objective not in rows:
        known = _DIALECTS if family == "policy" and "." in objective else rows
        raise ValueError(
            f'{function}: objective must be one of {", ".join(known)}, got "{objective}"'
            f"{hint(objective, known)}"
        )
    row = rows[objective]
    settings = checked_settings(function, row.options, row.choices, options)
    of_weights = _weight_settings(function, weights, row.weights)
    settings = settings._replace(
        numbers={**settings.numbers, **of_weights.numbers, **denominators},
        choices={"objective": objective, **settings.choices, **of_weights.choices},
    )
    return Call(loss, checked, settings)
