"""Objectives with their options as frozen dataclasses, which editors complete and mypy checks:

    tether.policy_loss(..., objective=tether.objective.Dapo(epsilon_high=0.3, level="turn_mean"))

A class for every row of `tether.objectives()`, in all families, and of `tether.dialects()`:
`VerlGeoMean` is "verl.geo_mean". A keyword of the loss wins over a field. The classes are made from
the catalogue when they are asked for; `objective.pyi` tells type checkers.
"""

from __future__ import annotations

import functools
from typing import Any

from tether._catalogue import FAMILIES, KNOWN_DIALECTS, Objective
from tether._checks import Number
from tether._typed import Chosen, class_name, common, dataclass_of, fields_of, literals

__all__ = ["Number", "PolicyObjective", "PreferenceObjective", "ValueObjective"]


def _base(family: str) -> type:
    rows = FAMILIES[family].values()
    return dataclass_of(
        f"{class_name(family)}Objective",
        common(fields_of(row.options, row.choices) for row in rows),
        Chosen,
        {"__module__": __name__, "__doc__": f"What all {family} objectives have."},
    )


PolicyObjective, PreferenceObjective, ValueObjective = map(_base, FAMILIES)
_BASES = dict(zip(FAMILIES, (PolicyObjective, PreferenceObjective, ValueObjective), strict=True))
_ROWS = {class_name(name): row for rows in FAMILIES.values() for name, row in rows.items()}
_OF_DIALECTS = {class_name(name): row for name, row in KNOWN_DIALECTS.items()}
_CHOICES = literals(item for row in _ROWS.values() for item in row.choices.items())
globals().update(_CHOICES)


def _class_of_row(name: str, row: Objective) -> type:
    fields = fields_of(row.options, row.choices)
    text = {"__module__": __name__, "__doc__": f"{row.formula}. {row.paper}."}
    settings = {"name": row.name, "options": row.options, "choices": row.choices}
    return dataclass_of(name, fields, _BASES[row.family], text | settings)


@functools.cache
def _class_of(name: str) -> type:
    if name in _ROWS:
        return _class_of_row(name, _ROWS[name])
    dialect = _OF_DIALECTS[name]
    base = _class_of(class_name(dialect.objective))
    fields = fields_of(base.options, base.choices)
    fields |= {k: (fields[k][0], value) for k, value in dialect.options.items() if k in fields}
    text = f"{dialect.objective} with the defaults of a trainer: {dialect.name}."
    namespace = {"__module__": __name__, "__doc__": text, "name": dialect.name}
    return dataclass_of(name, fields, base, namespace)


def __getattr__(name: str) -> Any:
    if name not in _ROWS and name not in _OF_DIALECTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _class_of(name)


def __dir__() -> list[str]:
    return [*__all__, *_CHOICES, *_ROWS, *_OF_DIALECTS]
