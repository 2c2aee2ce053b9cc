"""Policy losses: their batches and the properties of their formulas."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tether.policy import Normalizer
from tether.testing.cases import Case, Random, rounded
from tether.testing.probe import Failure, Observed, Probe, Run, Subject, moved_magnitude
from tether.testing.properties import Property, all_of, needs_argument, unless
from tether.testing.traits import ClipRange, Traits

_LOGPS = ("logps", "old_logps", "ref_logps", "rollout_logps")
ARRAYS = (*_LOGPS, "entropies", "turn_ids", "advantages")


# ---- batches -------------------------------------------------------------------------------------


def of_tokens(traits: Traits, tokens: list[tuple[float, float, float, float]]) -> Case:
    """A row each: logp, old_logp, ref_logp, advantage."""
    numbers = torch.tensor(tokens, dtype=torch.float64)
    logps, old_logps, ref_logps, advantages = numbers.unsqueeze(2).unbind(1)
    ones = torch.ones_like(logps)
    arrays = (logps, old_logps, ref_logps, old_logps, ones, 0 * ones, advantages)
    arrays = dict(zip(ARRAYS, arrays, strict=True))
    if traits.row_advantages:
        arrays["advantages"] = advantages[:, 0]
    return Case(ones, arrays)


def simplest(traits: Traits) -> Case:
    return of_tokens(traits, [(-1, rounded(torch.tensor(-1.1)).item(), -1.5, 1)])


def _advantages(random: Random, *size: int) -> Tensor:
    kinds = random.integers(0, 5, *size)
    some = torch.where(kinds == 2, random.uniform(-10, 10, *size), random.uniform(-2, 2, *size))
    return torch.where(kinds == 0, 0.0, torch.where(kinds == 1, 1.0, some))


def drawn(random: Random, traits: Traits, rows: int, columns: int) -> Case:
    """Ragged rows of every kind, advantages with zeros among them."""
    shape = (rows, columns)
    logps = -random.uniform(0.05, 6, *shape)
    of_rows = _advantages(random, rows)
    of_tokens = _advantages(random, *shape)
    if random.integer(0, 1) == 0:
        of_tokens = of_rows[:, None].repeat(1, columns)
    arrays = {
        "logps": logps,
        **{name: rounded(logps - random.log_ratios(*shape)) for name in _LOGPS[1:]},
        "entropies": random.uniform(0, 3, *shape),
        "turn_ids": (random.integers(0, 2, *shape) == 0).cumsum(1).double(),
        "advantages": of_rows if traits.row_advantages else of_tokens,
    }
    return Case(random.mask(rows, columns, traits.takes_fractional_mask), arrays)


def bounds(traits: Traits) -> list[Case]:
    """Tokens on both sides of the bounds of a clip range."""
    clip = traits.clip or ClipRange()
    ratios = [bound * by for bound in (1 - clip.low, 1 + clip.high) for by in (0.97, 1.03)]
    return [
        of_tokens(traits, [(-1, -1 - math.log(ratio), -1, advantage)])
        for ratio in ratios
        if 0 < ratio < math.inf
        for advantage in (-1, 1)
    ]


def runaways(traits: Traits) -> list[Case]:
    """Log-ratios far beyond any clip range: a batch for each size, so that no sum of right terms is
    infinite."""
    out = []
    for size in (0.0, 1e-30, 1e-8, 1e-3, 1.0, 5.0, 20.0, 88.0, 89.0, 1e3, 3e38):
        advantages = (1.0, -1.0, 0.0, -0.0, 1e4, -1e4, 1e12, -1e12)
        tokens = [(-1, -1 - gap, -1, a) for gap in (size, -size) for a in advantages]
        tokens += [(-1, -1, -1 - gap, 0) for gap in (size, -size)]
        out.append(of_tokens(traits, tokens))
    return out


def magnitude(probe: Probe, case: Case, step: Normalizer | None) -> Observed:
    """Of the values with the advantages |A| + 1 and -(|A| + 1)."""
    if "advantages" not in probe.subject.loss.names:
        return moved_magnitude(probe, case, step)
    wide, larger = probe.reference(), case.arrays["advantages"].abs() + 1
    good, bad = (wide(case.changed(advantages=s * larger), Run(step)) for s in (1, -1))
    return Observed(abs(good.loss) + abs(bad.loss), good.gradient.abs() + bad.gradient.abs())


# ---- properties ----------------------------------------------------------------------------------


def _advantages_of(case: Case) -> Tensor:
    advantages = case.arrays["advantages"]
    return advantages[:, None].expand(case.mask.shape) if advantages.dim() == 1 else advantages


def _log_ratios(case: Case) -> Tensor:
    return case.arrays["logps"] - case.arrays["old_logps"]


def _at_reference(case: Case, **arrays: Tensor) -> Case:
    """Without the penalty: the policy is at its reference."""
    return case.changed(ref_logps=case.arrays["logps"], **arrays)


def _first(wrong: Tensor) -> tuple[int, ...] | None:
    places = wrong.nonzero().tolist()
    return tuple(places[0]) if places else None


def check_pull_back(probe: Probe, case: Case) -> Failure:
    case = _at_reference(case)
    gradient, advantages, log_ratios = probe(case).gradient, _advantages_of(case), _log_ratios(case)
    away = case.active & (advantages < 0) & (log_ratios > 0)
    place = _first(away & ~(gradient > 0))
    return place and (
        f"advantage {advantages[place]:g}, log-ratio {log_ratios[place]:g}, and a gradient of "
        f"{gradient[place]:g} at {list(place)}"
    )


def check_kl_pull(probe: Probe, case: Case) -> Failure:
    calm = {"advantages": 0 * case.arrays["advantages"], "old_logps": case.arrays["logps"]}
    case = case.changed(**calm)
    gradient = probe(case).gradient
    gap = case.arrays["logps"] - case.arrays["ref_logps"]
    asked = case.active & (gap.abs() >= 1e-3)
    if not probe.traits.survives_runaways:
        asked &= gap.abs() <= 20
    place = _first(asked & ~(gradient * gap.sign() > 0))
    return place and (
        f"logp - ref_logp {gap[place]:g}, and a gradient of {gradient[place]:g} at {list(place)}"
    )


def check_clip(probe: Probe, case: Case) -> Failure:
    case, clip = _at_reference(case), probe.traits.clip
    gradient, advantages, ratios = probe(case).gradient, _advantages_of(case), _log_ratios(case)
    ratios = ratios.exp()
    low, high = 1 - clip.low, 1 + clip.high
    at_bound = ((ratios - low).abs() < 1e-3) | ((ratios - high).abs() < 1e-3)
    bad = (advantages < 0) & ((ratios < low) | (ratios > clip.dual))
    clipped = (advantages == 0) | ((advantages > 0) & (ratios > high)) | bad
    place = _first(case.active & ~at_bound & (clipped != (gradient == 0)))
    return place and (
        f"advantage {advantages[place]:g}, ratio {ratios[place]:g}, and a gradient of "
        f"{gradient[place]:g} at {list(place)}"
    )


def check_on_policy(probe: Probe, case: Case) -> Failure:
    """What is left is -A times the token's weight, which is the gradient for A = 1."""
    advantages = case.arrays["advantages"]
    if not probe.traits.is_per_token and advantages.dim() == 2:
        advantages = advantages[:, :1].expand(case.mask.shape)
    case = _at_reference(case, old_logps=case.arrays["logps"], advantages=advantages)
    got = probe(case)
    of_ones = probe(case.changed(advantages=torch.ones_like(advantages))).gradient
    if place := _first(case.active & ~(of_ones < 0)):
        return f"advantage 1 and a gradient of {of_ones[place]:g} at {list(place)}"
    want = Observed(got.loss, of_ones * _advantages_of(case))
    what = "beside A times the gradient for A = 1"
    if failure := probe.close_gradients(what, got, want, probe.magnitude(case)):
        return failure
    if "old_logps" not in probe.loss.names & probe.loss.optional:
        return None
    return probe.same_or_close(
        "without old_logps", probe(case, Run(without="old_logps")), got, case
    )


def check_advantage_scale(probe: Probe, case: Case) -> Failure:
    case = _at_reference(case)
    want = probe(case)
    for scale in (8.0, 0.25):
        got = probe(case.changed(advantages=scale * case.arrays["advantages"]))
        times = Observed(scale * want.loss, scale * want.gradient)
        if failure := probe.same(f"advantages times {scale:g}", got, times):
            return failure
    return None


def check_shift(probe: Probe, case: Case) -> Failure:
    """On a grid on which every difference is exact."""
    grid = {name: (case.arrays[name] * 256).round() / 256 for name in _LOGPS}
    shifted = case.changed(**{name: each - 4 for name, each in grid.items()})
    return probe.same(
        "all log-probabilities lowered by 4", probe(shifted), probe(case.changed(**grid))
    )


def _needs_pull(subject: Subject) -> str:
    bounded = subject.traits.clip and subject.traits.clip.dual < math.inf
    if bounded or not subject.traits.pulls_back:
        return "the loss does not promise it for each token"
    survives = subject.traits.survives_runaways
    return "" if survives else "the loss promises nothing for a token that ran away"


_HAS_ADVANTAGES = needs_argument("advantages")
_HAS_RATIO = all_of(_HAS_ADVANTAGES, needs_argument("old_logps"))

PROPERTIES = (
    Property(
        "pull_back",
        "A token that became too likely and is bad has a gradient that makes it rarer",
        "a bad token that ran away stays where it is",
        "runaways",
        check_pull_back,
        all_of(_HAS_RATIO, _needs_pull),
        of_formula=True,
    ),
    Property(
        "kl_pull",
        "The penalty's gradient pulls to the reference from every distance",
        "tokens far from the reference are let go, or pushed away",
        "runaways",
        check_kl_pull,
        all_of(
            needs_argument("ref_logps"),
            unless("penalty_pulls", "the loss does not promise it for each token"),
        ),
        of_formula=True,
    ),
    Property(
        "clip",
        "The gradient is 0 exactly where the ratio is beyond the clip range, or A = 0",
        "tokens beyond the clip range still move, or tokens inside of it do not",
        "bounds",
        check_clip,
        all_of(_HAS_RATIO, unless("clip", "the loss does not clip")),
        of_formula=True,
    ),
    Property(
        "on_policy",
        "With the ratio at 1 and no penalty the gradient is -A times the token's weight",
        "the first step on fresh samples is not a policy gradient",
        "small",
        check_on_policy,
        _HAS_ADVANTAGES,
        of_formula=True,
    ),
    Property(
        "advantage_scale",
        "Advantages times a power of two give loss and gradient times it, exactly",
        "the scale of the rewards changes more than the size of the step",
        "small",
        check_advantage_scale,
        all_of(
            _HAS_ADVANTAGES,
            unless("scales_with_advantages", "the loss is not proportional to the advantages"),
        ),
        of_formula=True,
    ),
    Property(
        "shift",
        "A constant added to all log-probabilities changes nothing",
        "the loss sees how likely a token is, not how its probability moved",
        "small",
        check_shift,
        all_of(
            _HAS_RATIO,
            unless("is_function_of_log_ratio", "the loss is not a function of log-ratios"),
        ),
        of_formula=True,
    ),
)
