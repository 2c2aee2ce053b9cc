"""What a property is, and who it is asked of."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tether.testing.cases import Case
from tether.testing.probe import Failure, Probe, Subject


class Property(NamedTuple):
    id: str
    statement: str  # what should hold
    meaning: str  # what follows in training where it does not
    batches: str  # that it is tried on: small, shaped, bounds, runaways, large
    check: Callable[[Probe, Case], Failure]  # holds for any batch, so that one can be made smaller
    excluded: Callable[[Subject], str] = lambda subject: ""  # why it is not asked
    of_formula: bool = False  # asked only where the reference, if there is one, keeps it


def unless(promise: str, why: str) -> Callable[[Subject], str]:
    """Excluded where the traits do not say `promise`."""
    return lambda subject: "" if getattr(subject.traits, promise) else why


def needs_argument(name: str) -> Callable[[Subject], str]:
    return lambda subject: "" if name in subject.loss.names else f"the loss takes no {name}"


def all_of(*rules: Callable[[Subject], str]) -> Callable[[Subject], str]:
    return lambda subject: next(filter(None, (rule(subject) for rule in rules)), "")
