"""Policy losses: the product of an objective, weights, a penalty and an aggregation."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tether._checks import savable
from tether.reference.kl import KL_SETTINGS, k1, k3, kl_term
from tether.reference.numbers import (
    LARGEST_RATIO,
    Number,
    beside_ratio,
    bounded,
    exp,
    narrowed,
    spoil_of,
    wide_dtype,
    with_gradient_of,
)
from tether.reference.objectives import OBJECTIVES, Row
from tether.reference.rows import (
    LEVELS,
    LOG_RATIO_CLIP,
    Batch,
    Factors,
    Level,
    Rows,
    SharedRatio,
    Tokens,
    levelled,
    of_loss,
    row_factors,
    segments_of,
    with_factors,
    with_weights,
)
from tether.reference.surrogate import Formula
from tether.reference.weights import WEIGHTS, chosen_weights, kept_tokens, product_of_weights


class PolicyTotals(NamedTuple):
    loss: Tensor
    sums: Tensor  # [14, 2]: value and count of every metric, in the order of rl/policy_metrics.h
    maxima: Tensor  # [3]: largest log_ratio, -log_ratio and weight


def policy_loss(
    logps: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    objective: str | Any = "grpo",  # or a tether.Surrogate
    normalizer: Any = None,  # tether.Normalizer
    beta: float | Tensor | None = None,
    entropy_coef: float | Tensor = 0,
    constant: float | Tensor = 1,
    level: str | None = None,
    aggregation: str | None = None,
    allow_biased_gradient: str = "false",  # looked at by the operator's check
    **options: Tensor | float | str | None,
) -> PolicyTotals:
    """world_size (Agg[W S] + beta Agg[K] - entropy_coef Agg[H]), as tether.policy_loss.

    options: the further arrays of tether.policy_loss by name; options of the surrogate, choices of
    the penalty, and weights as they stand on the wire, the level by its name and the options
    behind: truncated_importance="token", **{"truncated_importance.high": 3}.
    """
    beta, entropy_coef = savable(beta), savable(entropy_coef)
    batch = Batch.of(logps, advantages, response_mask, options)
    rule = aggregation or row_of(objective).aggregation
    policy, kl_tokens, sequences, world_size = _step_counts(normalizer)
    step = {"lengths": savable(batch.row_tokens), "constant": constant, "sequences": sequences}

    def factors_of(rows: Rows, n: Tensor, beta: Number) -> Factors:
        def each(count: Number | None, coefficient: Number) -> Tensor:
            return of_loss(row_factors(rule, n, tokens=count, **step), world_size, coefficient)

        of_policy = each(policy, 1)
        return Factors(of_policy, each(kl_tokens, beta), of_loss(of_policy, entropy_coef))

    terms = _terms(
        batch,
        options,
        objective=objective,
        beta=beta,
        entropy_coef=entropy_coef,
        level=level,
        factors_of=factors_of,
    )
    factors = terms.factors
    total = terms.sum(terms.weighted() + terms.spoil(), factors.policy, through=terms.is_own)
    total = total + terms.sum(terms.kl, factors.kl)
    if terms.entropic:
        total = total - terms.sum(terms.entropy(), factors.entropy)
    elif batch.entropies is not None:  # a gradient of 0, as the kernels have it
        total = total + (0 * terms.tokens.entropy.nan_to_num(0, 0, 0)).sum()
    with torch.no_grad():
        sums, maxima = _metrics(terms)
    return PolicyTotals(narrowed(total, wide_dtype(logps.dtype)), sums, maxima)


def row_of(objective: str | Any) -> Row:
    return OBJECTIVES[objective] if isinstance(objective, str) else objective.reference


class Terms(NamedTuple):
    """What every token adds to a policy loss, before weights and aggregation."""

    tokens: Tokens
    level: Level
    segments: Rows  # of the level
    segment_n: Tensor
    logp: Tensor  # of the level, as the next
    log_ratio: Tensor
    loss: Tensor  # S
    weight: Tensor  # W
    clipped: Tensor
    inside: tuple  # of these ratios a truncated weight is the ratio itself
    kl: Tensor  # K
    sound: Tensor  # finite inputs, and nothing that is NaN
    beta: float | Tensor
    entropic: bool
    is_own: bool  # a formula of the caller's, which may have parameters with a gradient
    rows: Rows
    factors: Factors | None

    def sum(self, terms: Tensor, factors: Tensor, *, through: bool = False) -> Tensor:
        """What the terms add up to in the loss. Masks and factors are in the gradients of what the
        terms are made of, or `through`: go through the terms."""
        terms = torch.where(self.tokens.active(), terms, 0.0)
        sums = self.rows.sum((self.tokens.weight * terms).double())
        total = bounded(factors * sums).sum()
        return total if through else with_gradient_of(total, terms.sum().double())

    def spoil(self) -> Tensor:
        return spoil_of(self.sound, self.logp)

    def entropy(self) -> Tensor:
        weighted = self.tokens.entropy_weight * self.tokens.entropy
        return weighted + 0 * weighted.detach()  # infinity is NaN

    def weighted(self) -> Tensor:
        """W S. Its slope is W times that of S where the gradient of S arrives at a token: before,
        as torch would have it, the product with an advantage may overflow."""
        weighted = self.weight * self.loss
        return bounded(weighted, weighted if self.is_own else self.loss)


def _terms(
    batch: Batch, options: dict, *, objective, beta, entropy_coef, level, factors_of=None
) -> Terms:
    row = row_of(objective)
    beta = row.beta if beta is None else beta
    options = (row.weights or {}) | (row.kl or {}) | options
    of_penalty = (*KL_SETTINGS, "kl_reference")
    penalty = {name: savable(options.pop(name)) for name in of_penalty if name in options}
    weights = chosen_weights(options, batch)
    rows = Rows.of("policy_loss", "logps", batch.logps, batch.offsets)
    tokens, n = kept_tokens(rows, batch, weights)
    level = LEVELS[level or row.level]
    segments, segment_n = segments_of(
        rows, tokens, n, level.segment, batch.response_mask, batch.turn_ids
    )
    clip = {name: options.pop(name, row.log_ratio_clip) for name in LOG_RATIO_CLIP}
    is_own = isinstance(row.surrogate, Formula)
    factors = None if factors_of is None else factors_of(rows, n, beta)
    of_policy, of_kl, tokens = with_factors(rows, tokens, factors, level, is_own)
    logp, log_ratio = levelled(segments, of_policy, segment_n, level, **clip)
    staying = [each for each in weights if not each[0].leaves]
    weight = tokens.token_weight * product_of_weights(rows, tokens, n, batch, staying)
    seen = tokens._replace(advantage=beside_ratio(tokens.advantage, log_ratio))
    sources = [logp, log_ratio]
    if not is_own:
        of_shared = tokens.weight if level.shared and factors is not None else None
        sources = [with_weights(each, of_shared, weight) for each in sources]
    loss, clipped = _surrogate(row, batch, seen, *sources, options)
    sharing = (segments, tokens.weight, segment_n, level, factors is not None)
    kl, seen_by_kl = _penalty(batch, of_kl, log_ratio, beta, sharing, **penalty)
    entropic = _needs("entropies", "entropy_coef", "not 0", entropy_coef, batch.entropies)
    sound = _sound(tokens, weight, log_ratio, loss, kl, seen_by_kl)
    return Terms(
        tokens=tokens,
        level=level,
        segments=segments,
        segment_n=segment_n,
        logp=logp,
        log_ratio=log_ratio,
        loss=loss,
        weight=weight,
        clipped=clipped,
        inside=_inside(row, {**row.surrogate_options, **options}),
        kl=kl,
        sound=sound,
        beta=beta,
        entropic=entropic,
        is_own=is_own,
        rows=rows,
        factors=factors,
    )


def _surrogate(
    row: Row, batch: Batch, tokens: Tokens, logp: Tensor, log_ratio: Tensor, options: dict
) -> tuple[Tensor, Tensor]:
    """S, and where it is clipped."""
    options = row.surrogate_options | options
    if isinstance(row.surrogate, Formula):
        has_reference = batch.ref_logps is not None
        loss, clipped = row.surrogate.of_tokens(
            logp, log_ratio, tokens, options, has_reference=has_reference
        )
    else:
        loss, clipped = row.surrogate(logp, log_ratio, tokens.advantage, **options)
    return bounded(loss), clipped


def _inside(row: Row, options: dict) -> tuple:
    ends = ("ratio_low", "ratio_high") if "ratio_low" in options else (0, math.inf)
    ends = row.surrogate.truncation if isinstance(row.surrogate, Formula) else ends
    return tuple(options[end] if isinstance(end, str) else end for end in ends)


def _penalty(
    batch: Batch,
    tokens: Tokens,
    log_ratio: Tensor,
    beta: float | Tensor,
    sharing: tuple,
    kl_reference: str = "reference",
    kl_correction: str = "none",
    **settings: Any,
) -> tuple[Tensor, list[Tensor]]:
    """K, and the constants that it is made of, if there is a penalty."""
    anchor = _logp_of(kl_reference, batch, tokens, beta)
    if anchor is None:
        return torch.zeros_like(log_ratio), []
    sampler = _logp_of("rollout" if "rollout" in kl_correction else "old", batch, tokens, beta)
    kl = kl_term(
        *(tokens.logp, sampler, anchor),
        kl_correction=kl_correction,
        kl_weight=tokens.kl_weight,
        level_log_ratio=log_ratio,
        shared=SharedRatio.of(*sharing),
        **settings,
    )
    return bounded(kl), [anchor, sampler, tokens.kl_weight]


def _logp_of(policy: str, batch: Batch, tokens: Tokens, beta: float | Tensor) -> Tensor | None:
    """Under one of the policies that a penalty looks at, if there is a penalty."""
    logp, needed = {
        "reference": (tokens.ref_logp, batch.ref_logps),
        "old": (tokens.old_logp, batch.logps),
        "rollout": (tokens.rollout_logp, batch.rollout_logps),
    }[policy]
    name = "rollout_logps" if policy == "rollout" else "ref_logps"
    return logp if _needs(name, "beta", "greater than 0", beta, needed) else None


def policy_token_losses(
    logps: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    objective: str | Any = "grpo",
    beta: float | Tensor | None = None,
    entropy_coef: float | Tensor = 0,
    level: str | None = None,
    constant: float | Tensor = 1,  # of the aggregation, as are these two
    aggregation: str | None = None,
    allow_biased_gradient: str = "false",
    **options: Tensor | float | str | None,
) -> Tensor:
    """W S + beta K - entropy_coef H at each token, like logps; 0 in masked slots."""
    beta, entropy_coef = savable(beta), savable(entropy_coef)
    batch = Batch.of(logps, advantages, response_mask, options)
    terms = _terms(
        batch,
        options,
        objective=objective,
        beta=beta,
        entropy_coef=entropy_coef,
        level=level,
    )
    each = terms.weighted() + terms.spoil() + terms.beta * terms.kl
    if terms.entropic:
        each = each - entropy_coef * terms.entropy()
    return torch.where(terms.tokens.active(), each, 0.0)


def local_counts(
    logps: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    objective: str | Any = "grpo",
    **options: Tensor | float | str | None,
) -> Tensor:
    """[tokens under the surrogate, tokens under the penalty, rows with a token], float64.

    Arguments as policy_loss; of the options only the weights that take tokens out change a count.
    """
    gates = [name for name, row in WEIGHTS.items() if row.leaves]
    options = (row_of(objective).weights or {}) | options
    batch = Batch.of(logps, advantages, response_mask, options)
    options = {name: value for name, value in options.items() if name.split(".")[0] in gates}
    weights = chosen_weights(options, batch)
    rows = Rows.of("local_counts", "logps", logps, batch.offsets)
    if weights:
        n = kept_tokens(rows, batch, weights)[1]
    else:
        n = rows.sum(rows.weights(response_mask, torch.float64))
    sequences = torch.where(torch.isnan(n), n, (n > 0).double()).sum()
    return torch.stack([n.sum(), n.sum(), sequences])


def _needs(array: str, option: str, rule: str, value: float | Tensor, given: Tensor | None) -> bool:
    """Whether the option asks for the array. A value in a tensor is not looked at and does."""
    needed = isinstance(value, Tensor) or value != 0
    if needed and given is None:
        raise ValueError(
            f"policy_loss: {array} must be given when {option} is {rule}, got {option} "
            f"{value} and none. Pass {array} or {option} = 0"
        )
    return needed


def _step_counts(normalizer: Any) -> tuple:
    if normalizer is None:
        return None, None, None, 1
    kl = normalizer.policy if normalizer.kl is None else normalizer.kl
    return normalizer.policy, kl, normalizer.sequences, normalizer.factor


def _sound(
    tokens: Tokens,
    weight: Tensor,
    log_ratio: Tensor,
    loss: Tensor,
    kl: Tensor,
    seen_by_kl: list[Tensor],
) -> Tensor:
    """Whether the inputs of a token are finite and nothing that comes of them is NaN."""
    seen = (tokens.weight, weight, log_ratio, tokens.logp, tokens.old_logp, tokens.advantage)
    finite = [torch.isfinite(each) for each in (*seen, *seen_by_kl)]
    return torch.stack([*finite, ~torch.isnan(loss), ~torch.isnan(kl)]).all(0)


def _of_ratio(terms: Terms) -> list[Tensor]:
    """What is averaged over ratios, in the order of PolicyMetrics."""
    log_ratio, clipped, advantage = terms.log_ratio, terms.clipped, terms.tokens.advantage
    ratio, (low, high) = exp(log_ratio), terms.inside
    seen = ratio.clamp_max(LARGEST_RATIO[log_ratio.dtype])
    # CISPO truncates for either sign, on either side of 1.
    is_below = (ratio < low) | (~(ratio > high) & (log_ratio < 0))
    is_above = (ratio > high) | (~(ratio < low) & (log_ratio > 0))
    return [
        clipped & (advantage != 0) & is_below,
        clipped & (advantage > 0) & is_above,
        clipped & (advantage < 0) & is_above,
        k1(log_ratio),
        k3(log_ratio),
        seen,
        seen**2,
    ]


def _metrics(terms: Terms) -> tuple[Tensor, Tensor]:
    tokens, log_ratio = terms.tokens, terms.log_ratio
    largest_weight = LARGEST_RATIO[log_ratio.dtype]
    weight = terms.weight.clamp(-largest_weight, largest_weight)
    count = tokens.weight.sum(dtype=torch.float64)
    # What is said of the ratio of a segment counts the segment: each token for 1 / n of it.
    ratio_weight, ratio_count = tokens.weight, count
    if terms.level.segment != "token":
        ratio_weight = tokens.weight / terms.segments.spread(terms.segment_n)
        ratio_count = (terms.segment_n > 0).sum().double()

    def total(values: Tensor, weight: Tensor = tokens.weight) -> Tensor:
        return torch.where(tokens.active(), weight * values, 0.0).sum(dtype=torch.float64)

    def largest(values: Tensor, sound: Tensor = terms.sound) -> Tensor:
        seen = torch.where(tokens.active() & sound, values, -math.inf).reshape(-1)
        return torch.cat([seen, seen.new_full((1,), -math.inf)]).max().double()

    of_ratio = _of_ratio(terms)
    broken = (terms.sound, torch.isfinite(terms.entropy()))
    spoilt = terms.weighted() + terms.spoil()
    sums = [total(each) for each in (spoilt, terms.kl, terms.entropy())]
    sums += [total(each, ratio_weight) for each in of_ratio]
    sums += [sum((tokens.active() & ~each).sum(dtype=torch.float64) for each in broken)]
    sums += [total(each) for each in (weight, weight**2, (weight == 0).to(weight.dtype))]
    counts = [count] * 3 + [ratio_count] * len(of_ratio) + [count] * 4
    return torch.stack([torch.stack(sums), torch.stack(counts)], 1), torch.stack(
        [largest(log_ratio), largest(-log_ratio), largest(weight, ~weight.isnan())]
    )
