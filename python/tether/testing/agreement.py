"""Of losses of every family: the objective that they are meant to be."""

from __future__ import annotations

from tether.testing.cases import Case
from tether.testing.probe import Failure, Probe, Subject
from tether.testing.properties import Property


def check_value(probe: Probe, case: Case) -> Failure:
    want = probe.reference()(case)
    return probe.close_losses(
        "beside the objective", probe(case).loss, want.loss, probe.magnitude(case)
    )


def check_gradient(probe: Probe, case: Case) -> Failure:
    want = probe.reference()(case)
    return probe.close_gradients("beside the objective", probe(case), want, probe.magnitude(case))


def _needs_reference(subject: Subject) -> str:
    return "" if subject.reference else "no objective named"


PROPERTIES = (
    Property(
        "reference_value",
        "The value is the objective's, to rounding",
        "what is trained is not the objective of that name, or not with its denominators",
        "shaped",
        check_value,
        _needs_reference,
    ),
    Property(
        "reference_gradient",
        "The gradient is the objective's, to rounding",
        "what is trained is not the objective of that name, or not with its denominators",
        "shaped",
        check_gradient,
        _needs_reference,
    ),
)
