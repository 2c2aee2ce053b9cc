"""Preference losses, of pairs and of answers with labels."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tether._checks import number_of, savable
from tether.reference.numbers import (
    LARGEST_INPUT,
    Number,
    bounded,
    narrowed,
    number_beside,
    saturated,
    wide_dtype,
    widened,
    with_gradient_of,
    with_scaled_gradient,
    with_slope,
    within,
)
from tether.reference.pair_losses import (
    LARGEST_VALUE,
    PREFERENCES,
    LabelledAnswer,
    Pair,
    PreferenceRow,
    double,
)
from tether.reference.rows import Rows, of_loss


def forward_kl(score: Tensor) -> Tensor:
    """-e^-S, saturated at 40. Wang et al. 2023, arXiv:2309.16240, table 1."""
    return -torch.exp(with_gradient_of((-score).clamp(-40, 40), -score))


def alphapo(score: Tensor, *, alpha: Number = 0.25) -> Tensor:
    """(1 - e^(-alpha S)) / alpha, saturated at 40; S at alpha 0. Gupta et al., arXiv:2501.03884."""
    alpha = number_beside(alpha, score)
    straight = alpha.abs() < 1e-150
    bent = (-alpha * score.detach()).clamp(-40, 40)
    reward = torch.expm1(bent) / -torch.where(straight, 1.0, alpha)
    value = torch.where(straight, score.detach(), reward)
    return with_slope(value, torch.where(straight, 1.0, torch.exp(bent)), score)


def log_odds(score: Tensor) -> Tensor:
    """S - log(1 - e^S), saturated at S = -2^-24. Hong et al. 2024, arXiv:2403.07691, eq. 4."""
    below_0 = with_gradient_of(score.clamp(max=-(2.0**-24)), score)
    p = below_0.detach()
    complement = torch.where(p > -math.log(2), (-torch.expm1(p)).log(), torch.log1p(-p.exp()))
    # Above 0, but for rounding, it is no log-probability.
    value = torch.where(score.detach() > 1e-3, math.nan, p - complement)
    return with_slope(value, -1 / torch.expm1(p), below_0)


# Of an f-divergence in place of the reverse KL: arXiv:2309.16240, table 1.
LINKS = {
    "reverse_kl": lambda score: score,
    "forward_kl": forward_kl,
    "js": torch.nn.functional.logsigmoid,
    "alphapo": alphapo,
    "log_odds": log_odds,
}


OPTIONS = {"beta": 0.1, "loss_weight": 1.0, "nll_coef": 0.0, "ld_alpha": 1.0}
CHOICES = {"score": "sum", "reference": "true", "link": "reverse_kl", "nll_mean": "token"}


class PreferenceTotals(NamedTuple):
    loss: Tensor
    sums: Tensor  # [9, 2]: value and count of every metric, in the order of preference_metrics.h


def preference_loss(
    logps: Tensor,
    response_mask: Tensor,
    ref_logps: Tensor | None = None,
    nll_mask: Tensor | None = None,
    labels: Tensor | None = None,
    baselines: Tensor | None = None,
    answer_weights: Tensor | None = None,
    offsets: Tensor | None = None,
    *,
    objective: str = "dpo",
    pairs: Number | None = None,
    tokens: Number | None = None,
    world_size: Number = 1,
    loss_scale: Number = 1,
    **settings: Number | str,
) -> PreferenceTotals:
    """The loss of pairs, or of answers with labels, as tether.preference_loss."""
    row = PREFERENCES[objective]
    settings = OPTIONS | CHOICES | row.options | row.choices | settings
    settings["reference"] = str(settings["reference"]).lower()  # True and False as choices
    settings = {name: savable(each) for name, each in settings.items()}
    rows = Rows.of("preference_loss", "logps", logps, offsets)
    labelled = row.takes_labels
    answers = _answers(rows, logps, ref_logps, response_mask, nll_mask, labelled, settings)
    present = _present(row, answers.n)
    count = present.sum().double()
    share = of_loss(_share(pairs, count), world_size, loss_scale)
    examples = _examples(row, answers, labels, baselines, answer_weights, share, settings)
    spoil = torch.where(examples.finite, 1.0, math.nan)
    terms = torch.where(present, spoil * examples.loss, 0.0)
    nll = torch.where(present & examples.good, spoil * examples.nll, 0.0)
    of_tokens = settings["nll_mean"] == "token"
    nll_count = torch.where(present, examples.nll_n, 0.0).sum() if of_tokens else count
    loss = with_gradient_of(within(share * terms).sum(), terms.sum())
    with_nll = number_of(settings["nll_coef"]) != 0
    if with_nll:
        nll_share = _share(tokens if of_tokens else pairs, nll_count)
        nll_share = of_loss(nll_share, world_size, loss_scale, settings["nll_coef"])
        loss = loss + with_gradient_of(within(nll_share * nll).sum(), (nll_share * nll).sum())
    with torch.no_grad():
        blocks = _metrics(answers, examples, terms, settings["beta"], pairs=not labelled)
        zero = torch.zeros_like(count)
        block = torch.stack([nll.sum(), nll_count] if with_nll else [zero, zero])
        blocks.insert(-1, block)
        sums = torch.stack(blocks)
    largest = torch.finfo(loss.dtype).max  # what overflows counts as this
    loss = with_gradient_of(loss.clamp(-largest, largest), loss)
    return PreferenceTotals(narrowed(loss, wide_dtype(logps.dtype)), sums)


def _share(of_step: Number | None, local: Tensor) -> Tensor:
    """1 / the count of the step; NaN where that divides nothing, 0 where there is nothing."""
    count = local if of_step is None else double(of_step, local)
    legal = (count > 0) & count.isfinite()
    return torch.where(legal, 1 / count, torch.where(local > 0, math.nan, 0.0))


class _Answers(NamedTuple):
    """Of every row."""

    n: Tensor
    logp: Tensor
    score: Tensor
    nll: Tensor
    nll_n: Tensor


def _answers(
    rows: Rows,
    logps: Tensor,
    ref_logps: Tensor | None,
    response_mask: Tensor,
    nll_mask: Tensor | None,
    labelled: bool,
    settings: dict[str, Number | str],
) -> _Answers:
    """Sums over the tokens w x: w the response mask, that of the score, or that of the NLL."""
    wide = wide_dtype(logps.dtype)
    weight = rows.weights(response_mask, wide)

    def row_sums(tensor: Tensor, of: Tensor, active: Tensor) -> Tensor:
        each = torch.where(active != 0, tensor.to(wide), 0.0)
        if wide == torch.float64:  # sums of float32 do not overflow there
            each = saturated(each, LARGEST_INPUT[wide])
        terms = of.double() * widened(each)
        if of is not active:  # what ld_alpha = 0 takes out has no slope, in a broken answer too
            terms = with_gradient_of(terms, torch.where(of != 0, terms, 0.0))
        return rows.sum(terms)

    def over(sums: Tensor, n: Tensor) -> Tensor:
        return sums / torch.where(n > 0, n, 1.0)

    n = rows.sum(weight.double())
    logp = row_sums(logps, weight, weight)
    of_score = weight if labelled else _score_weights(rows, weight, settings["ld_alpha"])
    score = logp if of_score is weight else row_sums(logps, of_score, weight)
    if settings["reference"] == "true":
        score = score - row_sums(ref_logps, of_score, weight)
    if settings["score"] == "mean":
        score = over(score, n)
    nll, nll_n = -logp, n
    if nll_mask is not None and number_of(settings["nll_coef"]) != 0:
        of_nll = rows.weights(nll_mask, wide)
        nll, nll_n = -row_sums(logps, of_nll, of_nll), rows.sum(of_nll.double())
    if settings["nll_mean"] == "sequence_mean":
        nll = over(nll, nll_n)
    return _Answers(n, logp, score, nll, nll_n)


def _score_weights(rows: Rows, weight: Tensor, ld_alpha: Number) -> Tensor:
    """ld_alpha w from the end of the shorter answer of a pair on. arXiv:2409.06411."""
    if number_of(ld_alpha) == 1:
        return weight
    active = (weight != 0).long()
    lengths = rows.sum(active)
    shorter = lengths.view(2, -1).amin(0).repeat(2)
    before = active.cumsum(-1) - active
    if rows.index is not None:
        before = before - rows.spread(lengths.cumsum(0) - lengths)
    return torch.where(before >= rows.spread(shorter), weight * ld_alpha, weight).to(weight.dtype)


class _Examples(NamedTuple):
    loss: Tensor
    nll: Tensor
    nll_n: Tensor
    good: Tensor  # whether the first answer is one of the chosen
    present: Tensor  # not padding
    finite: Tensor


def _examples(
    row: PreferenceRow,
    answers: _Answers,
    labels: Tensor | None,
    baselines: Tensor | None,
    answer_weights: Tensor | None,
    share: Tensor,
    settings: dict[str, Number | str],
) -> _Examples:
    """share: of the loss of each in that of the batch. It is in their gradients, not values."""
    n, score = answers.n, answers.score
    count = n.shape[0] if row.takes_labels else n.shape[0] // 2
    first, second = slice(count), slice(count, None)

    def given(tensor: Tensor | None, absent: float) -> Tensor:
        return torch.full_like(n, absent) if tensor is None else savable(tensor).double()

    of_link = {k.removeprefix("link_"): v for k, v in settings.items() if k.startswith("link_")}
    shared = {*(f"link_{name}" for name in of_link), *OPTIONS, *CHOICES}
    own = {k: v for k, v in settings.items() if k not in shared}
    baseline = saturated(given(baselines, 0), LARGEST_VALUE)
    weight, label = given(answer_weights, 1), given(labels, 1)
    weights = weight if row.takes_labels else within(weight[first] * weight[second])
    weights = within(weights * settings["loss_weight"])
    # With slopes that are known: on its way the product may overflow beside a 0.
    live = with_scaled_gradient(score, share)
    live = with_scaled_gradient(live, weights if row.takes_labels else weights.repeat(2)[: len(n)])
    above = LINKS[settings["link"]](live, **of_link) - baseline
    beta, good = settings["beta"], label[first] > 0.5
    if row.takes_labels:
        loss = row.loss(LabelledAnswer(above, label, beta), **own)
    else:
        loss = row.loss(Pair(above[first], above[second], beta), **own)
    loss = bounded(loss)
    sound = torch.isfinite(loss)
    loss = bounded(loss * weights, loss)
    nll = torch.where(good, answers.nll[first], 0.0)
    nll_n = torch.where(good, answers.nll_n[first], 0.0)
    inputs = torch.stack([score, baseline, label, weight]).isfinite().all(0)
    finite = sound & inputs[first]
    if not row.takes_labels:
        finite = finite & inputs[second]
    if number_of(settings["nll_coef"]) != 0:
        finite = finite & torch.isfinite(nll)
    return _Examples(loss, nll, nll_n, good, _present(row, n), finite)


def _present(row: PreferenceRow, n: Tensor) -> Tensor:
    """Which examples are not padding."""
    if row.takes_labels:
        return n != 0
    count = n.shape[0] // 2
    return (n[:count] != 0) | (n[count:] != 0)


def _metrics(
    answers: _Answers, examples: _Examples, loss: Tensor, beta: Number, *, pairs: bool
) -> list[Tensor]:
    """[value, count] of each metric in the order of preference_metrics.h, without the NLL."""
    present, good = examples.present, examples.good
    count = loss.shape[0]
    rewards = (beta * answers.score).clamp(-LARGEST_VALUE, LARGEST_VALUE)
    other = slice(count, None) if pairs else slice(count)
    chosen, rejected = (slice(count), present & good), (other, present & (pairs | ~good))

    def block(values: Tensor, of: Tensor) -> Tensor:
        return torch.stack([torch.where(of, values, 0.0).sum(), of.sum().double()])

    scores = answers.score
    margin = (beta * (scores[:count] - scores[other])).clamp(-LARGEST_VALUE, LARGEST_VALUE)
    compared = present if pairs else torch.zeros_like(present)
    return [
        block(loss, present),
        *(block(rewards[rows], of) for rows, of in (chosen, rejected)),
        block(margin, compared),
        block((margin > 0).double(), compared),
        *(block(answers.logp[rows], of) for rows, of in (chosen, rejected)),
        block((~examples.finite).double(), present),
    ]
