"""Of losses of every family: denominators in micro-batches, ranks, empty masks, weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from tether.policy import Normalizer
from tether.testing.cases import PADDING, Case, gathered, returned
from tether.testing.probe import Failure, Observed, Probe, Run, Subject
from tether.testing.properties import Property, all_of, needs_argument, unless


def _part(
    probe: Probe, case: Case, items: Sequence[int], step: Normalizer | None, share: float = 1
) -> Observed:
    """Some items as a batch of their own; the gradient in its old place."""
    columns = range(case.columns)
    out = probe(gathered(case, items, columns), Run(normalizer=step))
    gradient = returned(case, items, columns, out.gradient)
    return Observed(share * out.loss, share * gradient)


def _sum(parts: Sequence[Observed]) -> Observed:
    return Observed(sum(e.loss for e in parts), torch.stack([e.gradient for e in parts]).sum(0))


def _compositions(items: int) -> Iterator[list[tuple[int, int]]]:
    """Every way to cut the items into runs: bit i of `cuts` cuts after item i."""
    places = min(items - 1, 6)
    for cuts in range(1, 1 << max(places, 0)):
        ends = [i + 1 for i in range(places) if cuts >> i & 1]
        yield list(zip([0, *ends], [*ends, items], strict=True))


def _sizes(runs: Sequence[tuple[int, int]]) -> list[int]:
    return [last - first for first, last in runs]


def check_split(probe: Probe, case: Case) -> Failure:
    """Without a normalizer: micro-batches of as many rows each, whose losses are averaged, or added
    up."""
    takes = probe.subject.takes_normalizer
    step = probe.subject.counts(case) if takes else None
    whole, magnitude = probe(case), probe.magnitude(case)
    if takes:
        what = "with the counts of this batch given"
        if failure := probe.close(what, probe(case, Run(normalizer=step)), whole, magnitude):
            return failure
    parts = {}
    for runs in _compositions(case.items):
        sizes = _sizes(runs)
        if not takes and len(set(sizes)) > 1:
            continue
        for run in runs:
            if run not in parts:
                parts[run] = _part(probe, case, range(*run), step)
        total = _sum([parts[run] for run in runs])
        mean = Observed(total.loss / len(runs), total.gradient / len(runs))
        what = f"micro-batches of {' + '.join(map(str, sizes))} rows"
        tries = (
            {"with the counts of all": total} if takes else {"added up": total, "averaged": mean}
        )
        failures = [probe.close(f"{what} {k}", v, whole, magnitude) for k, v in tries.items()]
        if all(failures):
            return failures[-1]
    return None


def check_ranks(probe: Probe, case: Case) -> Failure:
    """Each rank multiplies by their number, and the gradients are averaged."""
    for ranks in (2, 3):
        step = dataclasses.replace(probe.subject.counts(case), world_size=ranks)
        shares = [range(rank, case.items, ranks - 1) for rank in range(ranks - 1)]
        parts = [_part(probe, case, items, step, 1 / ranks) for items in [*shares, [PADDING]]]
        what = f"{ranks} ranks, one of them without a token"
        if failure := probe.close(what, _sum(parts), probe(case), probe.magnitude(case)):
            return failure
    return None


def check_empty(probe: Probe, case: Case) -> Failure:
    masked = case.changed(mask=torch.zeros_like(case.mask))
    elsewhere = Run(normalizer=Normalizer(policy=10.0, kl=10.0, sequences=2.0))
    takes = probe.subject.takes_normalizer
    # A normalizer that must be given is that of a step with tokens.
    given = probe.subject.step.names[0] in probe.loss.optional
    alone = Run() if not takes or given else elsewhere
    tries = [
        ("nothing active", masked, alone),
        ("no rows", gathered(case, [], range(case.columns)), alone),
        ("no columns", gathered(case, range(case.items), []), alone),
        ("nothing active here, 10 tokens elsewhere", masked, elsewhere if takes else alone),
    ]
    for what, batch, run in tries:
        got = probe(batch, run)
        if got.loss != 0:
            return f"{what}: loss {probe.changed(0, got.loss)}"
        wrong = got.gradient[got.gradient != 0]
        if wrong.numel():
            return f"{what}: gradient {probe.changed(0, wrong[0].item())}"
    return None


def check_fractional_mask(probe: Probe, case: Case) -> Failure:
    """The rows keep their counts."""
    items = range(case.items)
    twice = [column for column in range(case.columns) for _ in range(2)]
    doubled = gathered(case, items, twice)
    got = probe(doubled.changed(mask=doubled.mask / 2))
    got = Observed(got.loss, returned(case, items, twice, got.gradient))
    what = "every token twice, at half its weight"
    return probe.close(what, got, probe(case), probe.magnitude(case))


def _needs_world_size(subject: Subject) -> str:
    """The first and the last of what says the step: they may be one."""
    names = subject.step.names
    return all_of(needs_argument(names[0]), needs_argument(names[-1]))(subject)


def _needs_parts(subject: Subject) -> str:
    return "the loss sees whole batches" if subject.traits.is_of_whole_batch else ""


PROPERTIES = (
    Property(
        "split",
        "Any split into micro-batches gives the loss and gradient of one",
        "with gradient accumulation, a token in a short micro-batch counts for more than one in a "
        "long micro-batch",
        "small",
        check_split,
        _needs_parts,
    ),
    Property(
        "ranks",
        "Any split over ranks, times world_size and averaged, gives the loss and gradient of one",
        "the number of GPUs changes the learning rate",
        "small",
        check_ranks,
        _needs_world_size,
    ),
    Property(
        "empty",
        "Without an active token the loss is 0 and so is its gradient",
        "one rank or micro-batch without a token turns every weight into NaN",
        "small",
        check_empty,
    ),
    Property(
        "fractional_mask",
        "Two copies of half weight are one of weight 1",
        "weights of tokens in the mask are not the weights that were meant",
        "small",
        check_fractional_mask,
        unless("takes_fractional_mask", "the loss takes no weights between 0 and 1"),
    ),
)
