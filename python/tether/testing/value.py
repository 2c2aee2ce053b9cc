"""Losses of value heads: their batches and the properties of their formulas."""

from __future__ import annotations

import math

import torch

from tether.testing.cases import Case, Random, rounded
from tether.testing.probe import Failure, Probe
from tether.testing.properties import Property, all_of, needs_argument, unless
from tether.testing.traits import ClipRange, Traits

ARRAYS = ("values", "old_values", "returns")


# ---- batches -------------------------------------------------------------------------------------


def _one_token(*numbers: float) -> Case:
    """Its value, old value and return."""
    each = rounded(torch.tensor(numbers, dtype=torch.float64)).view(3, 1, 1)
    return Case(torch.ones(1, 1, dtype=torch.float64), dict(zip(ARRAYS, each, strict=True)))


def simplest(traits: Traits) -> Case:
    return _one_token(1, 0.9, 2.5)


def drawn(random: Random, traits: Traits, rows: int, columns: int) -> Case:
    """Ragged rows of every kind."""
    shape = (rows, columns)
    values = random.uniform(-2, 2, *shape)
    arrays = (values, rounded(values + random.log_ratios(*shape)), random.uniform(-2, 2, *shape))
    mask = random.mask(rows, columns, traits.takes_fractional_mask)
    return Case(mask, dict(zip(ARRAYS, arrays, strict=True)))


def bounds(traits: Traits) -> list[Case]:
    """On both sides of a bound, with the return on either side of both."""
    clip = traits.clip or ClipRange()
    return [
        _one_token(1 + bound * by, 1, target)
        for bound in (-clip.low, clip.high)
        if math.isfinite(bound)
        for by in (0.97, 1.03)
        for target in (-10, 10)
    ]


def runaways(traits: Traits) -> list[Case]:
    out = []
    for size in (0.0, 1e-30, 1e-8, 1e-3, 1.0, 88.0, 1e3, 1e6, 1e18):
        for gap in (size, -size):
            for old_value in (0.0, gap):
                out += [_one_token(gap, old_value, 1), _one_token(1, old_value, gap)]
    return out


# ---- properties ----------------------------------------------------------------------------------


def check_clip(probe: Probe, case: Case) -> Failure:
    """Without a gradient is the value that left the interval around the old one to the side of
    which the interval's end is farther from the return."""
    clip, gradient = probe.traits.clip, probe(case).gradient
    value, old, target = (case.arrays[name] for name in ARRAYS)
    inside = torch.maximum(torch.minimum(value, old + clip.high), old - clip.low)
    farther = (inside - target).abs() - (value - target).abs()
    asked = case.active & ((inside == value) | (farther.abs() >= 1e-3))
    still = ((inside != value) & (farther > 0)) | (value == target)
    right = torch.where(still, gradient == 0, gradient * (value - target) > 0)
    for place in (asked & ~right).nonzero().tolist()[:1]:
        row, column = place
        return (
            f"value {value[row, column]:g}, old {old[row, column]:g}, return "
            f"{target[row, column]:g}, and a gradient of {gradient[row, column]:g} at {place}"
        )
    return None


def check_shift(probe: Probe, case: Case) -> Failure:
    """Only differences of the three count; on a grid on which those are exact."""
    grid = {name: (case.arrays[name] * 256).round() / 256 for name in ARRAYS}
    shifted = case.changed(**{name: each - 4 for name, each in grid.items()})
    what, want = "values and returns lowered by 4", probe(case.changed(**grid))
    return probe.close(what, probe(shifted), want, probe.magnitude(shifted))


PROPERTIES = (
    Property(
        "clip",
        "The gradient pulls to the return, and is 0 exactly where the clipped error counts",
        "values beyond the clip range still move, or values inside of it do not",
        "bounds",
        check_clip,
        all_of(needs_argument("old_values"), unless("clip", "the loss does not clip")),
        of_formula=True,
    ),
    Property(
        "shift",
        "A constant added to values and returns changes nothing",
        "the size of the returns sets the size of the step",
        "small",
        check_shift,
        of_formula=True,
    ),
)
