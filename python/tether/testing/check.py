"""A loss against every property that its signature, its objective and its traits allow."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tether import reference
from tether._catalogue import FAMILIES
from tether._checks import check_integers, kind_of, names_of
from tether._functions import Call
from tether._lists import Value
from tether._objectives import Weights, levels_of, objective_call
from tether.objective import PolicyObjective
from tether.policy import Normalizer
from tether.surrogate import Surrogate
from tether.testing import aggregation, gradient, memory, policy
from tether.testing.cases import Case, Random
from tether.testing.probe import Failure, Loss, Observed, Probe, Subject, as_code
from tether.testing.properties import Property
from tether.testing.report import FAILS, NOT_APPLICABLE, PropertyReport, Report
from tether.testing.shrink import shrunk
from tether.testing.traits import ClipRange, Traits

_WHERE = "check_loss"


class Family(NamedTuple):
    """What the batches of a kind of losses are made of, and what its formulas keep."""

    arrays: tuple[str, ...]
    simplest: Callable[[Traits], Case]
    drawn: Callable[[Random, Traits, int, int], Case]
    bounds: Callable[[Traits], list[Case]]
    runaways: Callable[[Traits], list[Case]]
    magnitude: Callable[[Probe, Case, Normalizer | None], Observed]
    properties: tuple[Property, ...]


POLICY = Family(
    policy.ARRAYS,
    policy.simplest,
    policy.drawn,
    policy.bounds,
    policy.runaways,
    policy.magnitude,
    policy.PROPERTIES,
)


def check_loss(
    user_loss: Callable[..., Any],
    objective: str | PolicyObjective | Surrogate | None = None,
    *,
    traits: Traits | None = None,
    seed: int = 1,
    batches: int = 12,
    skip: Iterable[str] = (),
    weights: Weights | None = None,
    **options: Value,
) -> Report:
    """Tries a policy loss of one's own on random ragged batches: is it right?

        report = check_loss(my_loss, objective="ppo", aggregation="token_mean")
        report.assert_ok()

    user_loss   gives a tensor of one number, or a tuple that begins with it, differentiable in
                logps. It is given by name what its signature names, and nothing else:
                logps, old_logps, ref_logps, rollout_logps [B, T], nats; advantages [B, T], or [B]
                with Traits(row_advantages=True); entropies [B, T]; turn_ids [B, T] int64;
                response_mask [B, T], weights in [0, 1] of the dtype of logps, bool or int64;
                normalizer, a tether.Normalizer with the counts of the optimizer step: the sum of
                the calls with it is the loss of the step. With a default, calls for a whole batch
                leave it out;
                offsets: packed rows are tried too, everything [N]; a padded call leaves it out.
                Where old_logps has a default, leaving it out means that the ratio is 1
    objective   which objective it is meant to be, with options, choices and weights, all as in
                `policy_loss`: value and gradient must be those of `tether.reference`,
                and properties of a formula are asked where the objective keeps them. None: traits
                say what is asked
    traits      what the loss promises; None: Traits()
    seed        of the batches: the same gives the same ones
    batches     random small ones; a few of fixed, larger shape are added
    skip        properties that are not asked

    Raises ValueError or TypeError where the loss cannot be called so at all; its errors on the
    simplest batch are its own. Everything else is in the report. torch's number of threads is
    restored.
    """
    skip = names_of(f"{_WHERE}: skip", skip)
    traits = Traits() if traits is None else traits
    if not isinstance(traits, Traits):
        raise TypeError(f"{_WHERE}: traits must be tether.testing.Traits, got {kind_of(traits)}")
    loss = Loss.of(user_loss, (*POLICY.arrays, "response_mask", "normalizer", "offsets"), _WHERE)
    oracle = None
    if objective is not None:
        oracle = _Oracle(objective, options, weights, loss.names)
        traits = oracle.narrowed(traits)
    elif options or weights is not None:
        named = next(iter(options), "weights")
        raise ValueError(f'{_WHERE}: objective must be given with options, got "{named}" alone')
    subject = Subject(
        loss,
        traits,
        POLICY.magnitude,
        counts=oracle.counts if oracle else counts_of,
        reference=oracle and oracle.loss(),
    )
    return checked(subject, POLICY, seed, batches, skip, _WHERE)


def counts_of(case: Case) -> Normalizer:
    tokens, sequences = case.mask.sum().item(), case.active.any(1).sum().item()
    return Normalizer(policy=tokens, kl=tokens, sequences=float(sequences))


class _Oracle:
    """An objective of the catalogue by `tether.reference`."""

    def __init__(
        self,
        objective: str | PolicyObjective | Surrogate,
        options: Mapping[str, Value],
        weights: Weights | None,
        names: set[str],
    ):
        self.objective, self.options, self.weights = objective, options, weights
        self.names = names - {"offsets", "normalizer"}

    def _call(self, tensors: Mapping[str, Tensor]) -> Call:
        call = objective_call(
            "policy_loss",
            tensors,
            self.objective,
            self.options,
            {},
            weights=self.weights,
            function=_WHERE,
        )
        call.check_settings(_WHERE)
        return call

    def loss(self) -> Loss:
        def evaluated(*, normalizer: Normalizer | None = None, **tensors: Tensor) -> Tensor:
            call = self._call(tensors)
            return reference.policy_loss(
                **call.tensors, normalizer=normalizer, **call.named_settings()
            )[0]

        return Loss(evaluated, self.names | {"normalizer"}, {"normalizer", "offsets"}, _WHERE)

    def _call_of(self, case: Case) -> Call:
        arrays = {**case.arrays, "response_mask": case.mask}
        arrays["turn_ids"] = arrays["turn_ids"].long()
        return self._call({name: each for name, each in arrays.items() if name in self.names})

    def counts(self, case: Case) -> Normalizer:
        call = self._call_of(case)
        return Normalizer(*reference.local_counts(**call.tensors, **call.named_settings()).tolist())

    def narrowed(self, traits: Traits) -> Traits:
        """With what the objective says of its levels and clips."""
        call = self._call_of(policy.simplest(traits))
        numbers, choices = call.settings
        options = {} if call.own else FAMILIES["policy"][choices["objective"]].options
        values = {name: option.default for name, option in options.items()} | numbers
        names = [each for each in ("epsilon_low", "epsilon_high", "dual_clip") if each in values]
        clip = ClipRange(*(float(values[each]) for each in names)) if len(names) > 1 else None
        return dataclasses.replace(traits, clip=clip, is_per_token=levels_of(choices) == {"token"})


# ---- every property ------------------------------------------------------------------------------


def checked(
    subject: Subject, family: Family, seed: int, batches: int, skip: Sequence[str], where: str
) -> Report:
    check_integers(where, seed=seed, batches=batches)
    if batches < 0:
        raise ValueError(f"{where}: batches must be at least 0, got {batches}")
    properties = (
        *family.properties,
        *gradient.PROPERTIES,
        *aggregation.PROPERTIES,
        *memory.PROPERTIES,
    )
    known = [each.id for each in properties]
    for each in skip:
        if each not in known:
            raise ValueError(f'{where}: skip must be of {", ".join(known)}, got "{each}"')
    with torch.inference_mode(False), torch.enable_grad():
        Probe(subject, subject.traits.dtypes[0])(family.simplest(subject.traits))
        cases = _drawn_cases(subject.traits, family, seed, batches)
        found = [_report_of(each, subject, cases[each.batches], skip) for each in properties]
    return Report(tuple(found), seed, batches)


def _drawn_cases(traits: Traits, family: Family, seed: int, batches: int) -> dict[str, list[Case]]:
    """Of every kind, once for all properties."""
    random = Random(seed)

    def drawn(items: int, columns: int) -> Case:
        return family.drawn(random, traits, items, columns)

    small = [family.simplest(traits), drawn(3, 5)]
    small += [drawn(random.integer(1, 5), random.integer(1, 9)) for _ in range(batches)]
    return {
        "small": small,
        "shaped": [*small, drawn(2, 37), drawn(3, 1100)],
        "bounds": [*small, *family.bounds(traits)],
        "runaways": [*small, *family.runaways(traits)],
        "large": [drawn(40, 1700)],  # enough for several threads
    }


def _guarded(property: Property, probe: Probe, case: Case) -> Failure:
    """Batches without a token are a matter of one property: 0 / 0 would break all others."""
    if property.id != "empty" and not case.active.any():
        return None
    try:
        return property.check(probe, case)
    except Exception as error:  # of the loss, whatever it is
        return f"it raised {type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _why_not(
    property: Property, subject: Subject, cases: Iterable[Case], skip: Sequence[str]
) -> str:
    if property.id in skip:
        return "skipped"
    if why := property.excluded(subject):
        return why
    if property.of_formula and subject.reference:
        formula = Probe(subject, torch.float64).reference()
        if any(_guarded(property, formula, case) for case in cases):
            return "the objective does not keep it"
    return ""


def _report_of(
    property: Property, subject: Subject, cases: Sequence[Case], skip: Sequence[str]
) -> PropertyReport:
    report = PropertyReport(property.id, property.statement)
    if why := _why_not(property, subject, cases, skip):
        return dataclasses.replace(report, outcome=NOT_APPLICABLE, detail=why)
    for dtype in subject.traits.dtypes:
        probe = Probe(subject, dtype)
        for case in cases:
            if _guarded(property, probe, case):
                return _failure(report, property, probe, case)
    return report


def _failure(
    report: PropertyReport, property: Property, probe: Probe, case: Case
) -> PropertyReport:
    """By the smallest batch; where only large ones may fail, by the one that was found."""
    is_small = property.batches != "large"
    if is_small:
        case = shrunk(case, lambda candidate: bool(_guarded(property, probe, candidate)))
    dtype = str(probe.dtype).removeprefix("torch.")
    what = _guarded(property, probe, case) or "not every time"
    return dataclasses.replace(
        report,
        outcome=FAILS,
        detail=f"{dtype}, [B, T] = [{case.rows}, {case.columns}], {what}",
        meaning=property.meaning,
        batch=as_code(case, probe.subject.loss, probe.dtype) if is_small else "",
        rows=case.rows,
        columns=case.columns,
    )
