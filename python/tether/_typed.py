"""Rows of the catalogue as frozen dataclasses, whose fields are their options and choices."""

from __future__ import annotations

import dataclasses
import functools
import keyword
import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

from tether._checks import hint
from tether._lists import Choice, Option, Value, checked_settings

_FLAG = ("false", "true")


class Chosen:
    """A row by its name, with settings of its own over the defaults."""

    name: ClassVar[str]
    options: ClassVar[dict[str, Option]]
    choices: ClassVar[dict[str, Choice]]

    def __new__(cls, *_: Any, **settings: Any) -> Chosen:
        known = cls.__dataclass_fields__
        for name in settings:
            if name not in known:
                raise TypeError(
                    f'{cls.__name__}: option must be one of {", ".join(known)}, got "{name}"'
                    f"{hint(name, known)}"
                )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        checked_settings(type(self).__name__, self.options, self.choices, self.settings())

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.settings().items())
        return f"{type(self).__name__}({settings})"

    def __reduce__(self) -> tuple:
        """With what was given, which is told from defaults by identity."""
        return functools.partial(type(self), **self.settings()), ()

    def settings(self) -> dict[str, Value]:
        """What was given."""
        given = {each: getattr(self, each.name) for each in dataclasses.fields(self)}
        return {each.name: value for each, value in given.items() if value is not each.default}


def class_name(row: str) -> str:
    """verl.geo_mean: VerlGeoMean"""
    return "".join(part[:1].upper() + part[1:] for part in re.split("[._]", row))


def literals(choices: Iterable[tuple[str, Choice]]) -> dict[str, Any]:
    """The types of choices, by their names as types."""
    return {class_name(k): Literal[each.legal] for k, each in choices if each.legal != _FLAG}


def fields_of(
    options: Mapping[str, Option], choices: Mapping[str, Choice]
) -> dict[str, tuple[str, Value]]:
    """Types and defaults, by names as Python writes them. Those of an objective's own weights are
    set by `weights=`."""
    out: dict[str, tuple[str, Value]] = {}
    for name, option in options.items():
        if "." not in name:
            out[name + "_" * keyword.iskeyword(name)] = ("Number", option.default)
    for name, choice in choices.items():
        flag = choice.legal == _FLAG
        default = choice.default == "true" if flag else choice.default
        out[name] = ("bool" if flag else class_name(name), default)
    return out


def dataclass_of(
    name: str, fields: Mapping[str, tuple[str, Value]], base: type, namespace: dict[str, Any]
) -> type:
    """A dataclass with these fields; those that the base has alike are inherited."""
    known = dataclasses.is_dataclass(base)
    inherited = {f.name: (f.type, f.default) for f in dataclasses.fields(base)} if known else {}
    out = dataclasses.make_dataclass(
        name,
        [(k, *each) for k, each in fields.items() if inherited.get(k) != each],
        bases=(base,),
        namespace=namespace,
        frozen=True,
        kw_only=True,
        repr=False,
    )
    out.__module__ = namespace["__module__"]  # which make_dataclass forgets
    return out


def common(rows: Iterable[Mapping[str, tuple[str, Value]]]) -> dict[str, tuple[str, Value]]:
    """The fields that all rows have, with the defaults of the first."""
    first, *others = rows
    return {k: each for k, each in first.items() if all(k in other for other in others)}
