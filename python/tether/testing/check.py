"""A loss against every property that its signature, its objective and its traits allow."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from tether._checks import check_integers, kind_of, names_of
from tether._lists import Value
from tether._objectives import Weights
from tether.objective import PolicyObjective, PreferenceObjective, ValueObjective
from tether.surrogate import Surrogate
from tether.testing import aggregation, agreement, gradient, memory
from tether.testing.cases import Case, Random
from tether.testing.families import Family, Oracle, family_of
from tether.testing.probe import Failure, Loss, Probe, Subject, as_code
from tether.testing.properties import Property
from tether.testing.report import FAILS, NOT_APPLICABLE, PropertyReport, Report
from tether.testing.shrink import shrunk
from tether.testing.traits import Traits

_WHERE = "check_loss"
Objective = str | PolicyObjective | PreferenceObjective | ValueObjective | Surrogate


def check_loss(
    user_loss: Callable[..., Any],
    objective: str
    | PolicyObjective
    | PreferenceObjective
    | ValueObjective
    | Surrogate
    | None = None,
    *,
    family: str | None = None,
    traits: Traits | None = None,
    seed: int = 1,
    batches: int = 12,
    skip: Iterable[str] = (),
    weights: Weights | None = None,
    **options: Value,
) -> Report:
    """Tries a loss of one's own on random ragged batches: is it right?

        report = check_loss(my_loss, objective="ppo", aggregation="token_mean")
        report.assert_ok()

    user_loss   gives a tensor without dimensions, or a tuple that begins with it, differentiable in
                the first of its arrays. It is given by name what its signature names, and nothing
                else:
                response_mask [B, T], weights in [0, 1] of the dtype of the rest, bool or int64;
                offsets: packed rows are tried too, everything [N]; a padded call leaves it out
      policy    logps, old_logps, ref_logps, rollout_logps [B, T], nats; advantages [B, T], or [B]
                with Traits(row_advantages=True); entropies [B, T]; turn_ids [B, T] int64;
                normalizer, a tether.Normalizer with the counts of the optimizer step: the sum of
                the calls with it is the loss of the step. With a default, calls for a whole batch
                leave it out. Where old_logps has a default, leaving it out means that the ratio
                is 1
      preference  logps, ref_logps [2 B, T], chosen answers first, then the rejected ones in the
                same order; or, where labels [B] bool are named without a default, answers [B, T];
                baselines and answer_weights, one each; the counts of the step as pairs, tokens (of
                the chosen) and world_size
      value     values, old_values, returns [B, T]; normalizer
    objective   which objective it is meant to be, with options, choices and weights, all as in
                `policy_loss`, `preference_loss` or `value_loss`: value and gradient must be those
                of `tether.reference`, and properties of a formula are asked where the objective
                keeps them. None: traits say what is asked
    family      "policy", "preference" or "value"; None: the objective's, "policy" without one
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
    kind = family_of(_WHERE, family, objective, user_loss)
    names = (*kind.arrays, "response_mask", *kind.step.names, "offsets")
    loss = Loss.of(user_loss, kind.name, names, _WHERE)
    oracle = None
    if objective is not None:
        oracle = Oracle(_WHERE, kind, objective, options, weights, loss.names)
        traits = oracle.narrowed(traits)
    elif options or weights is not None:
        named = next(iter(options), "weights")
        raise ValueError(f'{_WHERE}: objective must be given with options, got "{named}" alone')
    subject = Subject(
        loss,
        traits,
        kind.magnitude,
        counts=oracle.counts if oracle else kind.counts,
        step=kind.step,
        reference=oracle and oracle.loss(),
    )
    return checked(subject, kind, seed, batches, skip, _WHERE)


# ---- every property ------------------------------------------------------------------------------


def checked(
    subject: Subject, family: Family, seed: int, batches: int, skip: Sequence[str], where: str
) -> Report:
    check_integers(where, seed=seed, batches=batches)
    if batches < 0:
        raise ValueError(f"{where}: batches must be at least 0, got {batches}")
    properties = (
        *agreement.PROPERTIES,
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
