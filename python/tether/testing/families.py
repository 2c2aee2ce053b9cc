"""The families of losses: what their batches are made of, and the objectives of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from tether import reference
from tether._catalogue import FAMILIES as CATALOGUE
from tether._checks import check_known, parameters_of
from tether._functions import Call
from tether._lists import Value
from tether._objectives import Weights, levels_of, named, objective_call
from tether.policy import Normalizer
from tether.reference.pair_losses import PREFERENCES
from tether.testing import policy, preference, value
from tether.testing.cases import DTYPES, Case, Random
from tether.testing.probe import (
    AS_NORMALIZER,
    AS_PAIRS,
    Loss,
    Observed,
    Probe,
    Step,
    moved_magnitude,
)
from tether.testing.properties import Property
from tether.testing.traits import ClipRange, Traits


class Family(NamedTuple):
    """What the batches of a kind of losses are made of, and what its formulas keep."""

    name: str  # of its objectives; its loss is called NAME_loss
    arrays: tuple[str, ...]
    simplest: Callable[[Traits], Case]
    drawn: Callable[[Random, Traits, int, int], Case]
    bounds: Callable[[Traits], list[Case]]
    runaways: Callable[[Traits], list[Case]]
    magnitude: Callable[[Probe, Case, Normalizer | None], Observed]
    properties: tuple[Property, ...]
    counts: Callable[[Case], Normalizer]
    step: Step
    clip: tuple[str, ...] = ()  # options that are a clip range


def counts_of(case: Case) -> Normalizer:
    tokens, sequences = case.mask.sum().item(), case.active.any(1).sum().item()
    return Normalizer(policy=tokens, kl=tokens, sequences=float(sequences))


def _of_answers(pairs: bool) -> Family:
    return Family(
        "preference",
        preference.PAIR_ARRAYS if pairs else preference.ANSWER_ARRAYS,
        preference.simplest(pairs),
        preference.drawn(pairs),
        lambda traits: [],
        preference.runaways(pairs),
        preference.magnitude,
        preference.PROPERTIES,
        preference.counts_of,
        AS_PAIRS,
    )


LABELLED = _of_answers(pairs=False)
FAMILIES = {
    "policy": Family(
        "policy",
        policy.ARRAYS,
        policy.simplest,
        policy.drawn,
        policy.bounds,
        policy.runaways,
        policy.magnitude,
        policy.PROPERTIES,
        counts_of,
        AS_NORMALIZER,
        ("epsilon_low", "epsilon_high", "dual_clip"),
    ),
    "preference": _of_answers(pairs=True),
    "value": Family(
        "value",
        value.ARRAYS,
        value.simplest,
        value.drawn,
        value.bounds,
        value.runaways,
        moved_magnitude,
        value.PROPERTIES,
        counts_of,
        AS_NORMALIZER,
        ("clip_range", "clip_range"),
    ),
}


def family_of(where: str, family: str | None, objective: Any, loss: Callable[..., Any]) -> Family:
    """By its name, or that of the objective."""
    name = named(objective, {})[0]
    if family is None:
        found = [each for each, rows in CATALOGUE.items() if isinstance(name, str) and name in rows]
        family = found[0] if found else "policy"
    check_known(where, "family", family, FAMILIES)
    if family != "preference":
        return FAMILIES[family]
    if isinstance(name, str) and name in PREFERENCES:
        labelled = PREFERENCES[name].takes_labels
    else:
        given = parameters_of(f"{where}: user_loss", loss)
        labelled = any(each.name == "labels" and each.default is each.empty for each in given)
    return LABELLED if labelled else FAMILIES[family]


class Oracle:
    """An objective of the catalogue by `tether.reference`."""

    def __init__(
        self,
        where: str,
        family: Family,
        objective: Any,
        options: Mapping[str, Value],
        weights: Weights | None,
        names: set[str],
    ):
        if weights is not None and family.name != "policy":
            raise ValueError(f"{where}: weights must be None for a {family.name} loss, got some")
        self.where, self.family, self.weights = where, family, weights
        self.objective, self.options = objective, options
        self.names = names - {"offsets", *family.step.names}

    def _call(self, tensors: Mapping[str, Tensor]) -> Call:
        call = objective_call(
            f"{self.family.name}_loss",
            tensors,
            self.objective,
            self.options,
            {},
            family=self.family.name,
            weights=self.weights,
            function=self.where,
        )
        call.check_settings(len(next(iter(call.tensors.values()))))
        return call

    def loss(self) -> Loss:
        loss, step = getattr(reference, f"{self.family.name}_loss"), self.family.step.names

        def evaluated(**given: Any) -> Tensor:
            of_step = {name: given.pop(name) for name in step if name in given}
            call = self._call(given)
            return loss(**call.tensors, **of_step, **call.named_settings())[0]

        return Loss(evaluated, self.names | {*step}, {*step, "offsets"}, self.where)

    def _call_of(self, case: Case) -> Call:
        arrays = {**case.arrays, "response_mask": case.mask}
        return self._call(
            {k: v.to(DTYPES.get(k, v.dtype)) for k, v in arrays.items() if k in self.names}
        )

    def counts(self, case: Case) -> Normalizer:
        if self.family.name != "policy":
            return self.family.counts(case)
        call = self._call_of(case)
        return Normalizer(*reference.local_counts(**call.tensors, **call.named_settings()).tolist())

    def narrowed(self, traits: Traits) -> Traits:
        """With what the objective says of its levels and clips."""
        call = self._call_of(self.family.simplest(traits))
        numbers, choices = call.settings
        rows = CATALOGUE[self.family.name]
        options = {} if call.own else rows[choices["objective"]].options
        values = {name: option.default for name, option in options.items()} | numbers
        ends = [float(values[each]) for each in self.family.clip if each in values]
        clip = ClipRange(*ends) if len(ends) > 1 else None
        is_per_token = self.family.name != "policy" or levels_of(choices) == {"token"}
        return dataclasses.replace(traits, clip=clip, is_per_token=is_per_token)
