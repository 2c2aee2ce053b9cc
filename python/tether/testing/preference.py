"""Preference losses, of pairs and of answers with labels: their batches and what formulas keep."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tether.policy import Normalizer
from tether.testing.cases import Case, Random, rounded
from tether.testing.probe import Failure, Observed, Probe, Subject, moved_magnitude
from tether.testing.properties import Property, all_of, needs_argument
from tether.testing.traits import Traits

PAIR_ARRAYS = ("logps", "ref_logps", "baselines", "answer_weights")
ANSWER_ARRAYS = (*PAIR_ARRAYS, "labels")


# ---- batches -------------------------------------------------------------------------------------


def _two_answers(first: float, second: float, *, pairs: bool) -> Case:
    """Of one token each, with these log-ratios: a pair, or as labelled ones good and bad."""
    log_ratios = rounded(torch.tensor([[first], [second]], dtype=torch.float64))
    logps = torch.tensor([[-1.0], [-2.0]], dtype=torch.float64)
    return _case(torch.ones_like(logps), logps, log_ratios, torch.zeros(2), torch.ones(2), pairs)


def _case(
    mask: Tensor,
    logps: Tensor,
    log_ratios: Tensor,
    baselines: Tensor,
    answer_weights: Tensor,
    pairs: bool,
    labels: Tensor | None = None,
) -> Case:
    if labels is None:
        labels = torch.arange(len(mask)) % 2 == 0
    arrays = (logps, rounded(logps - log_ratios), baselines, answer_weights, labels)
    arrays = {k: v.double() for k, v in zip(ANSWER_ARRAYS, arrays, strict=True)}
    if pairs:
        del arrays["labels"]
    return Case(mask, arrays, pairs)


def simplest(pairs: bool) -> Callable[[Traits], Case]:
    return lambda traits: _two_answers(0.5, -0.25, pairs=pairs)


def drawn(pairs: bool) -> Callable[[Random, Traits, int, int], Case]:
    """Ragged answers of every kind."""

    def draw(random: Random, traits: Traits, items: int, columns: int) -> Case:
        rows = 2 * items if pairs else items
        return _case(
            random.mask(rows, columns, traits.takes_fractional_mask),
            -random.uniform(0.05, 6, rows, columns),
            random.log_ratios(rows, columns),
            random.uniform(-1, 1, rows),
            0.5 * random.integers(0, 4, rows),
            pairs,
            random.integers(0, 1, rows),
        )

    return draw


def runaways(pairs: bool) -> Callable[[Traits], list[Case]]:
    """Margins of every size: a batch each, so that no sum of right terms is infinite."""

    def made(traits: Traits) -> list[Case]:
        gaps = (0.0, 1e-30, 1e-8, 1e-3, 1.0, 5.0, 20.0, 88.0, 89.0, 1e3, 1e6, 1e15)
        both = [(sign * gap, by) for gap in gaps for sign in (1, -1) for by in (0, -1)]
        ends = [(one, by * one) for one, by in both] + [(0.0, one) for one, by in both if by == 0]
        return [_two_answers(*each, pairs=pairs) for each in ends]

    return made


def magnitude(probe: Probe, case: Case, step: Normalizer | None) -> Observed:
    """Formulas of two sigmoids round more than their difference moves."""
    loss, gradient = moved_magnitude(probe, case, step)
    return Observed(4 * loss, 4 * gradient)


def counts_of(case: Case) -> Normalizer:
    """Examples with a token as `sequences`, the tokens of the chosen as `kl`."""
    tokens, present = case.mask.sum(1), case.active.any(1)
    chosen = case.arrays["labels"] > 0.5 if "labels" in case.arrays else None
    if chosen is None:
        chosen = torch.arange(case.rows) < case.items
        present = present.view(2, -1).any(0)
    return Normalizer(kl=tokens[chosen].sum().item(), sequences=float(present.sum()))


# ---- properties ----------------------------------------------------------------------------------


def check_pull_back(probe: Probe, case: Case) -> Failure:
    """Where the rejected answer has the higher score, by whatever margin, chosen tokens become more
    likely and rejected ones rarer; labelled answers likewise, whose score is on the wrong side."""
    gradient, arrays = probe(case).gradient, case.arrays
    gaps = torch.where(case.active, arrays["logps"] - arrays["ref_logps"], 0.0)
    good = torch.arange(case.rows) < case.items
    if "labels" in arrays:
        good = arrays["labels"] > 0.5
    toward = torch.where(good, 1.0, -1.0)
    wrong = (toward * (case.mask * gaps).sum(1) < 0) & (arrays["answer_weights"] > 0)
    if case.pairs:
        below = arrays["baselines"].view(2, -1)
        wrong = (wrong.view(2, -1).all(0) & (below[0] >= below[1])).repeat(2)
    for row, column in case.active.nonzero().tolist():
        slope = gradient[row, column].item()
        if wrong[row] and not toward[row] * slope < 0:
            return (
                f"{'chosen' if good[row] else 'rejected'}, log-ratio {gaps[row, column]:g}, and a "
                f"gradient of {slope:g} at {[row, column]}"
            )
    return None


def check_shift(probe: Probe, case: Case) -> Failure:
    """On a grid on which every difference is exact."""
    grid = {name: (case.arrays[name] * 256).round() / 256 for name in ("logps", "ref_logps")}
    shifted = case.changed(**{name: each - 4 for name, each in grid.items()})
    what = "policy and reference lowered by 4"
    return probe.same(what, probe(shifted), probe(case.changed(**grid)))


def _needs_pull(subject: Subject) -> str:
    if not subject.traits.pulls_back:
        return "the loss does not promise it"
    survives = subject.traits.survives_runaways
    return "" if survives else "the loss promises nothing for a token that ran away"


def _needs_ratio(subject: Subject) -> str:
    of_ratio = subject.traits.is_function_of_log_ratio
    return "" if of_ratio else "the loss is not a function of log-ratios"


PROPERTIES = (
    Property(
        "pull_back",
        "Answers in the wrong order have a gradient that puts them right, from any distance",
        "a pair that went far wrong stays so",
        "runaways",
        check_pull_back,
        all_of(needs_argument("ref_logps"), _needs_pull),
        of_formula=True,
    ),
    Property(
        "shift",
        "A constant added to the log-probabilities of policy and reference changes nothing",
        "the loss sees how likely an answer is, not how its probability moved",
        "small",
        check_shift,
        all_of(needs_argument("ref_logps"), _needs_ratio),
        of_formula=True,
    ),
)
