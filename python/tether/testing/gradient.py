"""Of losses of every family: the gradient as a derivative, and the range of numbers."""

from __future__ import annotations

import math

import torch

from tether.testing.cases import Case
from tether.testing.probe import Failure, Observed, Probe, Subject, gradient_of
from tether.testing.properties import Property, unless

_STEP = 1e-5


def check_finite_difference(probe: Probe, case: Case) -> Failure:
    """Tokens at a kink, where the one-sided differences disagree, are passed over."""
    if probe.dtype != torch.float64:
        return None
    at, magnitude = probe(case), probe.magnitude(case)

    def moved(place: tuple[int, ...], by: float) -> float:
        values = case.arrays[case.leaf].clone()
        values[place] += by
        return probe(case.changed(**{case.leaf: values})).loss

    for place in case.active.nonzero().tolist()[:24]:
        slot = tuple(place)
        up, down = (sign * (moved(slot, sign * _STEP) - at.loss) / _STEP for sign in (1, -1))
        noise = 1e-9 * magnitude.loss + 1e-6 * magnitude.gradient[slot].item()
        if abs(up - down) > 1e-3 * (abs(up) + abs(down)) + noise:
            continue
        got, want = at.gradient[slot].item(), (up + down) / 2
        if not abs(got - want) <= noise:
            return f"gradient at {place} {probe.changed(want, got)}"
    return None


def check_upstream(probe: Probe, case: Case) -> Failure:
    one, magnitude = probe(case), probe.magnitude(case)
    for upstream in (-1.0, 2.0, 0.0, 0.37):
        given = probe.arguments(case)
        loss = probe.loss(given)
        gradient = gradient_of(loss, given[case.leaf], torch.full_like(loss, upstream))
        want = Observed(one.loss, upstream * one.gradient)
        what = f"upstream gradient {upstream:g}"
        got = Observed(one.loss, gradient)
        if failure := probe.close_gradients(what, got, want, magnitude):
            return failure
    return None


def check_finite(probe: Probe, case: Case) -> Failure:
    got = probe(case)
    if not math.isfinite(got.loss):
        return f"loss {got.loss:g}"
    broken = (~got.gradient.isfinite()).nonzero().tolist()
    if broken:
        value = got.gradient[tuple(broken[0])].item()
        return f"gradient at {broken[0]} {value:g}, loss {got.loss:g}"
    return None


def _needs_derivative(subject: Subject) -> str:
    if not subject.traits.gradient_is_derivative:
        return "the gradient is not the derivative of the value"
    wide = torch.float64 in subject.traits.dtypes
    return "" if wide else "the loss takes no float64"


PROPERTIES = (
    Property(
        "finite_difference",
        "The gradient is the central difference of the value, away from kinks",
        "training goes down another function than the one that is logged",
        "small",
        check_finite_difference,
        _needs_derivative,
        of_formula=True,
    ),
    Property(
        "upstream",
        "The gradient is linear in the upstream gradient",
        "a loss scaler, a coefficient or gradient accumulation has no effect, or a wrong one",
        "small",
        check_upstream,
    ),
    Property(
        "finite",
        "No finite input gives a NaN or infinity",
        "one token whose probability ran away ends the run",
        "runaways",
        check_finite,
        unless("survives_runaways", "the loss promises nothing for a token that ran away"),
    ),
)
