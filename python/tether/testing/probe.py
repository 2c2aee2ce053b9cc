"""One loss under test: how it is called, looked at and compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tether._checks import kind_of, parameters_of, shape_text
from tether.policy import Normalizer
from tether.testing.cases import DTYPES, Case
from tether.testing.traits import Traits

Failure = str | None  # something that does not hold, as a sentence


class Observed(NamedTuple):
    """What a run of a loss gave; float32 numbers as doubles, so that equal means equal bits."""

    loss: float
    gradient: Tensor  # [B, T]


@dataclasses.dataclass(frozen=True)
class Run:
    """How a batch is handed over."""

    normalizer: Normalizer | None = None
    layout: str = "contiguous"  # transposed, sliced, misaligned, expanded, packed
    dtype: torch.dtype | None = None  # None: the probe's
    mask_dtype: torch.dtype | None = None
    without: str = ""  # an array that is not given


@dataclasses.dataclass(frozen=True)
class Loss:
    function: Callable
    names: set[str]  # of its arguments
    optional: set[str]  # those with a default
    where: str  # for its errors

    @classmethod
    def of(cls, function: Callable, family: str, doors: tuple[str, ...], where: str) -> Loss:
        """Its signature may name any of `doors`, those of the family, and must name the first."""
        named = [
            each
            for each in parameters_of(f"{where}: user_loss", function)
            if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
        ]
        names = {each.name for each in named if each.name in doors}
        optional = {each.name for each in named if each.default is not each.empty}
        unknown = [each.name for each in named if each.name not in names | optional]
        if unknown or doors[0] not in names:
            got = f'"{unknown[0]}" without a default' if unknown else f"none named {doors[0]}"
            raise ValueError(
                f"{where}: arguments of a {family} loss must be {doors[0]} and any of "
                f"{', '.join(doors[1:])}, got {got}"
            )
        return cls(function, names, optional, where)

    def __call__(self, given: Mapping[str, Any]) -> Tensor:
        out = self.function(**{name: given[name] for name in self.names if name in given})
        loss = out[0] if isinstance(out, tuple) else out
        # [1] may be a loss that does not add rows up, of a batch of one.
        if not isinstance(loss, Tensor) or loss.dim() > 0:
            got = shape_text(loss) if isinstance(loss, Tensor) else kind_of(loss)
            raise TypeError(
                f"{self.where}: the loss must return a tensor without dimensions, or a tuple that "
                f"begins with it, got {got}"
            )
        return loss


class Step(NamedTuple):
    """How the counts of an optimizer step are handed over."""

    names: tuple[str, ...]  # of arguments: the first says that they are taken
    given: Callable[[Normalizer], dict[str, Any]]


AS_NORMALIZER = Step(("normalizer",), lambda step: {"normalizer": step})
AS_PAIRS = Step(
    ("pairs", "tokens", "world_size"),
    lambda step: {"pairs": step.sequences, "tokens": step.kl, "world_size": step.world_size},
)


@dataclasses.dataclass(frozen=True)
class Subject:
    """A loss with what it promises, and the same by other means."""

    loss: Loss
    traits: Traits
    magnitude: Callable[[Probe, Case, Normalizer | None], Observed]
    counts: Callable[[Case], Normalizer]
    step: Step
    reference: Loss | None = None

    @property
    def takes_normalizer(self) -> bool:
        return self.step.names[0] in self.loss.names


class Probe:
    def __init__(self, subject: Subject, dtype: torch.dtype, *, of_reference: bool = False):
        self.subject, self.traits, self.dtype = subject, subject.traits, dtype
        self.of_reference = of_reference
        self.loss = subject.reference if of_reference else subject.loss

    def reference(self) -> Probe:
        """The loss by other means, in float64; itself if there are none."""
        if self.subject.reference is None:
            return self
        return Probe(self.subject, torch.float64, of_reference=True)

    def arguments(self, case: Case, run: Run = Run()) -> dict[str, Any]:
        dtype = run.dtype or self.dtype
        slots = slots_of(case) if run.layout == "packed" else None

        def tensor(values: Tensor, of: torch.dtype) -> Tensor:
            values = values.to(of, copy=True)
            if slots is not None:
                return values[slots] if values.dim() == 2 else values
            return laid_out(values, run.layout)

        out = {"response_mask": tensor(case.mask, run.mask_dtype or dtype)}
        for name, values in case.arrays.items():
            out[name] = tensor(values, DTYPES.get(name, dtype))
        out[case.leaf] = out[case.leaf].detach().requires_grad_()
        if slots is not None:
            lengths = torch.cat([torch.zeros(1, dtype=torch.int64), slots.sum(1)])
            out["offsets"] = lengths.cumsum(0).to(torch.int32 if case.rows % 2 else torch.int64)
        elif "offsets" not in self.loss.optional:
            out["offsets"] = None
        normalizer = run.normalizer
        step = self.subject.step
        if normalizer is None and step.names[0] not in self.loss.optional:
            normalizer = self.subject.counts(case)
        if normalizer is not None:
            out |= step.given(normalizer)
        out.pop(run.without, None)
        return out

    def __call__(self, case: Case, run: Run = Run()) -> Observed:
        key = (run, self.dtype, self.of_reference)
        if key not in case.found:
            given = self.arguments(case, run)
            loss = self.loss(given)
            gradient = gradient_of(loss, given[case.leaf])
            if run.layout == "packed":
                slots = slots_of(case)
                gradient = torch.zeros_like(case.mask).masked_scatter(slots, gradient)
            case.found[key] = Observed(loss.item(), gradient)
        return case.found[key]

    def magnitude(self, case: Case, step: Normalizer | None = None) -> Observed:
        """Bounds for the terms of the loss and of each slot of its gradient."""
        key = ("magnitude", step, self.dtype, self.of_reference)
        if key not in case.found:
            case.found[key] = self.subject.magnitude(self, case, step)
        return case.found[key]

    # ---- comparisons: None where all is well -----------------------------------------------------

    def same(self, what: str, got: Observed, want: Observed) -> Failure:
        """Not one bit differs."""
        if not equal(got.loss, want.loss):
            return f"{what}: loss {self.changed(want.loss, got.loss)}"
        return self.difference(what, got, want, equal(got.gradient, want.gradient))

    def close_losses(self, what: str, got: float, want: float, magnitude: Observed) -> Failure:
        """No more than rounding."""
        bound = self.traits.tolerance * self.epsilon * magnitude.loss
        if abs(got - want) <= bound or equal(got, want):
            return None
        return f"{what}: loss {self.changed(want, got)}"

    def close_gradients(
        self, what: str, got: Observed, want: Observed, magnitude: Observed
    ) -> Failure:
        bound = self.traits.tolerance * self.epsilon * magnitude.gradient
        near = (got.gradient - want.gradient).abs() <= bound
        return self.difference(what, got, want, near | equal(got.gradient, want.gradient))

    def close(self, what: str, got: Observed, want: Observed, magnitude: Observed) -> Failure:
        return self.close_losses(what, got.loss, want.loss, magnitude) or self.close_gradients(
            what, got, want, magnitude
        )

    def same_or_close(self, what: str, got: Observed, want: Observed, case: Case) -> Failure:
        """The first if the loss promises bits, else the second."""
        if self.traits.bitwise:
            return self.same(what, got, want)
        return self.close(what, got, want, self.magnitude(case))

    def difference(self, what: str, got: Observed, want: Observed, right: Tensor) -> Failure:
        if right.all():
            return None
        place = (~right).nonzero()[0].tolist()
        values = [each.gradient[tuple(place)].item() for each in (want, got)]
        return f"{what}: gradient at {place} {self.changed(*values)}"

    @property
    def epsilon(self) -> float:
        return torch.finfo(self.dtype).eps

    def number(self, value: float) -> str:
        return f"{value:.{17 if self.dtype == torch.float64 else 9}g}"

    def changed(self, want: float, got: float) -> str:
        return f"{self.number(got)}, not {self.number(want)}"


def equal(a, b):
    """Numbers or tensors; NaN is NaN."""
    return (a == b) | ((a != a) & (b != b))


def gradient_of(loss: Tensor, of: Tensor, upstream: Tensor | None = None, **settings) -> Tensor:
    """As doubles, like `of`; zeros where the loss does not depend on it."""
    gradient = None
    if loss.requires_grad:
        gradient = torch.autograd.grad(loss, of, upstream, allow_unused=True, **settings)[0]
    return torch.zeros_like(of).double() if gradient is None else gradient.double()


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another place of memory."""
    if layout == "transposed":
        return tensor.t().contiguous().t()
    if layout == "sliced":
        buffer = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.shape[-1] + 1)
        return buffer[..., 1::2].copy_(tensor)
    if layout == "misaligned":
        return tensor.new_zeros(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)
    shared = layout == "expanded" and tensor.dim() == 2 and tensor.numel() > 0
    if shared and (tensor == tensor[:, :1]).all():
        return tensor[:, :1].expand(tensor.shape)
    return tensor


def slots_of(case: Case) -> Tensor:
    """What a packed batch holds: each row up to its last active token."""
    return case.active.flip(1).cumsum(1).flip(1) > 0


def moved_magnitude(probe: Probe, case: Case, step: Normalizer | None) -> Observed:
    """For losses without advantages: what the result is, and how it moves, by what its differences
    are worth, when log-probabilities or values become larger by 2^-8."""
    larger = case.changed(**{case.leaf: case.arrays[case.leaf] * (1 + 2**-8)})
    at, by = (probe(each, Run(normalizer=step)) for each in (case, larger))
    return Observed(
        abs(at.loss) + 2**8 * abs(by.loss - at.loss),
        at.gradient.abs() + 2**8 * (by.gradient - at.gradient).abs(),
    )


def as_code(case: Case, loss: Loss, dtype: torch.dtype) -> str:
    """Python that makes this batch."""
    arrays = {**case.arrays, "response_mask": case.mask}
    lines = []
    for name, values in arrays.items():
        if name in loss.names:
            kind = DTYPES.get(name, dtype)
            lines.append(f"{name} = torch.tensor({values.to(kind).tolist()}, dtype={kind})")
    return "\n".join(lines)
