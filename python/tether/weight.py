"""Weights of tokens, `weights=` of the policy losses, as frozen dataclasses:

    tether.policy_loss(..., weights=tether.weight.TruncatedImportance(high=2.0))

A class for every row of `tether.weights()`; several go into a list. The classes are made from the
catalogue when they are asked for; `weight.pyi` tells type checkers.
"""

from __future__ import annotations

import functools
from typing import Any

from tether._catalogue import KNOWN_WEIGHTS, Weight
from tether._checks import Number
from tether._lists import Choice
from tether._typed import Chosen, class_name, common, dataclass_of, fields_of, literals

__all__ = ["Number", "TokenWeight"]


def _choices(row: Weight) -> dict[str, Choice]:
    return {"level": Choice(row.level, row.levels)}


_ROWS = {class_name(name): row for name, row in KNOWN_WEIGHTS.items()}
_CHOICES = literals(item for row in _ROWS.values() for item in _choices(row).items())
globals().update(_CHOICES)
TokenWeight = dataclass_of(
    "TokenWeight",
    common(fields_of(row.options, _choices(row)) for row in _ROWS.values()),
    Chosen,
    {"__module__": __name__, "__doc__": "What all weights have."},
)


@functools.cache
def _class_of(name: str) -> type:
    row = _ROWS[name]
    choices = _choices(row)
    text = {"__module__": __name__, "__doc__": f"{row.formula}. {row.paper}."}
    settings = {"name": row.name, "options": row.options, "choices": choices}
    return dataclass_of(name, fields_of(row.options, choices), TokenWeight, text | settings)


def __getattr__(name: str) -> Any:
    if name not in _ROWS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _class_of(name)


def __dir__() -> list[str]:
    return [*__all__, *_CHOICES, *_ROWS]
