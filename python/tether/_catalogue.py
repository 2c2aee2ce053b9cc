"""The catalogue: objectives, weights and dialects by name."""

from __future__ import annotations

import copy
from typing import NamedTuple

from tether._checks import check_strings
from tether._functions import DIALECTS, LINKS, OBJECTIVES, WEIGHTS
from tether._lists import Choice, Option, Value


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
    reads_policy: bool  # looks at the log-probabilities of the step
    level: str  # unless said
    options: dict[str, Option]
    levels: tuple[str, ...]


class Dialect(NamedTuple):
    """A trainer's policy loss under its name there: an objective with the trainer's defaults."""

    name: str
    objective: str
    options: dict[str, Value]  # and choices
    weights: dict[str, dict[str, Value]]


# Every policy objective has them among its choices: none, or a level.
_WEIGHT_LEVELS = OBJECTIVES[0][2][WEIGHTS[0][0][0]].legal[1:]
KNOWN_WEIGHTS = {row[0]: Weight(*row, options, _WEIGHT_LEVELS) for row, options in WEIGHTS}
# Every preference objective has the options of a link once it is chosen.
_OF_LINKS = {f"link_{name}": option for link in LINKS for name, option in link.items()}
_CATALOGUE = {
    row[1]: Objective(
        *row,
        options | (_OF_LINKS if row[0] == "preference" else {}),
        {k: v for k, v in choices.items() if k not in KNOWN_WEIGHTS},
        {k: v.default for k, v in choices.items() if k in KNOWN_WEIGHTS and v.default != "none"},
    )
    for row, options, choices in OBJECTIVES
}
FAMILIES = {
    family: {name: row for name, row in _CATALOGUE.items() if row.family == family}
    for family in dict.fromkeys(row.family for row in _CATALOGUE.values())
}


def objectives(family: str = "policy") -> dict[str, Objective]:
    """Every objective of a family by name, with its formula, paper, options and choices."""
    check_strings("objectives", family=family)
    if family not in FAMILIES:
        raise ValueError(f'objectives: family must be one of {", ".join(FAMILIES)}, got "{family}"')
    return copy.deepcopy(FAMILIES[family])


def weights() -> dict[str, Weight]:
    """Every weight by name, for `weights=` of the policy losses."""
    return copy.deepcopy(KNOWN_WEIGHTS)


def _dialect(name: str, objective: str, settings: list[tuple[str, str]]) -> Dialect:
    options, weights = {}, {}
    for key, text in settings:
        weight, _, option = key.rpartition(".")
        if key in KNOWN_WEIGHTS:
            weights.setdefault(key, {})["level"] = text
        elif weight:
            weights.setdefault(weight, {})[option] = float(text)
        else:
            options[key] = float(text) if key in _CATALOGUE[objective].options else text
    return Dialect(name, objective, options, weights)


KNOWN_DIALECTS = {row[0]: _dialect(*row) for row in DIALECTS}


def dialects() -> dict[str, Dialect]:
    """Every dialect by name, `objective="verl.vanilla"` of the policy losses."""
    return copy.deepcopy(KNOWN_DIALECTS)
