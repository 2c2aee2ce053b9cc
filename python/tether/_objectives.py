"""Calls of the losses that take an objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tether._catalogue import FAMILIES, KNOWN_DIALECTS, KNOWN_WEIGHTS, Objective
from tether._checks import Number, check_known, hint, kind_of
from tether._functions import FUNCTIONS, Call
from tether._lists import Choice, Settings, Value, checked_settings
from tether._typed import Chosen
from tether.surrogate import Surrogate
from tether.weight import TokenWeight

Weights = Mapping[str, Mapping[str, Value]] | TokenWeight | Sequence[TokenWeight]


def named(objective: Any, options: Mapping[str, Value]) -> tuple[Any, Mapping[str, Value]]:
    """The name of one of tether.objective, with its settings beneath the caller's."""
    if not isinstance(objective, Chosen):
        return objective, options
    return objective.name, {**objective.settings(), **options}


def resolved(
    objective: Any, options: Mapping[str, Value], weights: Weights | None, function: str
) -> tuple[Any, Mapping[str, Value], Weights | None]:
    """The objective of a dialect with its settings, beneath the caller's, likewise of a surrogate
    of one's own; another as it is. Weights by name."""
    objective, options = named(objective, options)
    weights = _weights_by_name(function, weights)
    if isinstance(objective, Surrogate):
        return objective, {**objective.settings, **options}, _beneath(objective.weights, weights)
    if not isinstance(objective, str) or objective not in KNOWN_DIALECTS:
        return objective, options, weights
    own = KNOWN_DIALECTS[objective]
    return own.objective, {**own.options, **options}, _beneath(own.weights, weights)


def _weights_by_name(function: str, weights: Weights | None) -> Weights | None:
    """Those of tether.weight as a dict; all else as it is."""
    given = [weights] if isinstance(weights, TokenWeight) else weights
    if not isinstance(given, (list, tuple)):
        return given
    out: dict[str, Mapping[str, Value]] = {}
    for each in given:
        if not isinstance(each, TokenWeight):
            raise TypeError(
                f"{function}: weights must be a list of those of tether.weight, or a dict, got "
                f"{kind_of(each)} in it{_call_of(each)}"
            )
        if each.name in out:
            raise ValueError(f"{function}: weights must be different ones, got {each.name} twice")
        out[each.name] = each.settings()
    return out


def _beneath(own: Weights, weights: Weights | None) -> Weights | None:
    """The weights of an objective with those of the caller over them."""
    if weights is not None and not isinstance(weights, Mapping):
        return weights
    given = weights or {}
    names = dict.fromkeys((*own, *given))
    return {k: _merged(own.get(k, {}), given.get(k, {})) for k in names} or None


def _merged(own: dict[str, Value], given: Any) -> Any:
    return {**own, **given} if isinstance(given, Mapping) else given


def _weight_settings(function: str, weights: Weights, own: Mapping[str, str]) -> Settings:
    """As the operators take them: the level under the weight's name, its options behind it. Of a
    weight that the objective has, the level is the objective's unless said."""
    if not isinstance(weights, Mapping):
        raise TypeError(
            f"{function}: weights must be a list of those of tether.weight, or a dict, got "
            f"{kind_of(weights)}{_call_of(weights)}"
        )
    out = Settings({}, {})
    for name, values in weights.items():
        if not isinstance(name, str):
            raise TypeError(f"{function}: weights must be named, got {kind_of(name)} as a name")
        if name not in KNOWN_WEIGHTS:
            raise ValueError(
                f'{function}: weights must be of {", ".join(KNOWN_WEIGHTS)}, got "{name}"'
                f"{hint(name, KNOWN_WEIGHTS)}"
            )
        if not isinstance(values, Mapping):
            raise TypeError(
                f"{function}: weights of {name} must be a dict of its options, got "
                f"{kind_of(values)}"
            )
        row = KNOWN_WEIGHTS[name]
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


def weights_of(choices: Mapping[str, str]) -> dict[str, str]:
    """The weights of a call with their levels, those of the objective and the caller's."""
    own = FAMILIES["policy"][choices["objective"]].weights
    return own | {name: level for name, level in choices.items() if name in KNOWN_WEIGHTS}


def takes_tokens_out(choices: Mapping[str, str]) -> bool:
    """Whether a weight of the call leaves."""
    return any(KNOWN_WEIGHTS[name].leaves for name in weights_of(choices))


def levels_of(choices: Mapping[str, str]) -> set[str]:
    """At which the objective of a call takes its ratio and its weights."""
    of_weights = weights_of(choices)
    leaving = {name for name in of_weights if KNOWN_WEIGHTS[name].leaves}
    needed = {
        level
        for name, level in of_weights.items()
        if name not in leaving or level.startswith("turn")  # ids of turns are not among the chunks
    }
    row = FAMILIES["policy"][choices["objective"]]
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
        objective, options, weights = resolved(objective, options, weights, function)
    else:
        objective, options = named(objective, options)
    loss = FUNCTIONS[callee]
    checked = loss.checked(tensors, function)
    row = row_of(function, objective, family)
    numbers, choices = checked_settings(function, row.options, row.choices, options)
    _check_denominators(function, row, choices, denominators)
    own = {}
    if isinstance(objective, Surrogate):
        own = {k: numbers.pop(k) for k in objective.defaults if k in numbers}
        own["objective"] = objective
    if weights is not None:
        of_weights = _weight_settings(function, weights, row.weights)
        numbers, choices = numbers | of_weights.numbers, choices | of_weights.choices
    settings = Settings({**numbers, **denominators}, {"objective": row.name, **choices})
    return Call(loss, checked, settings, own, caller=function)


def _check_denominators(
    function: str, row: Objective, choices: Mapping[str, str], denominators: Mapping[str, Number]
) -> None:
    """A count that is not the one that the aggregation divides by would be of no use."""
    if not denominators or "aggregation" not in row.choices:
        return
    counts = {"normalizer.policy", "normalizer.kl", "normalizer.sequences"}
    if not counts & set(denominators):
        return
    aggregation = choices.get("aggregation", row.choices["aggregation"].default)
    needed = {"token_mean": "normalizer.policy", "token_sum": None}
    name = needed.get(aggregation, "normalizer.sequences")
    if name is not None and name not in denominators:
        raise ValueError(
            f"{function}: {name} must be given where other counts are, for {aggregation}, got none"
        )


def _call_of(value: Any) -> str:
    """For the end of an error: a class where one of it is meant."""
    meant = isinstance(value, type) and issubclass(value, Chosen)
    return f". Call it: {value.__name__}()" if meant else ""


def row_of(function: str, objective: Any, family: str) -> Objective:
    if isinstance(objective, Surrogate) and family == "policy":
        return objective.row
    if not isinstance(objective, str):
        more = (
            ", one of tether.objective or a Surrogate"
            if family == "policy"
            else (" or one of tether.objective")
        )
        raise TypeError(
            f"{function}: objective must be a string{more}, got {kind_of(objective)}"
            f"{_call_of(objective)}"
        )
    rows = FAMILIES[family]
    if objective not in rows:
        of_dialects = family == "policy" and "." in objective
        check_known(function, "objective", objective, KNOWN_DIALECTS if of_dialects else rows)
    return rows[objective]
