"""Weights of tokens that need the whole batch (rl/batch_weight.h), of tokens side by side [N]."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tether.reference.numbers import Number, clamp, first_of, number_beside
from tether.reference.rows import Rows, segments_of

_LARGEST = 1e150  # a larger number counts as this: products of two stay finite


class BatchTokens(NamedTuple):
    """All slots of a batch, one row after the other, in float64; 0 where the weight is 0. Nothing
    here has a shape that numbers decide: devices are not waited for."""

    weight: Tensor
    rows: Rows
    last: Tensor  # where a row ends
    longest: int  # that a row may be
    turns: Callable[[], tuple[Rows, Tensor]]  # and the weights of each
    # What the rule reads.
    logp: Tensor | None = None
    old_logp: Tensor | None = None
    rollout_logp: Tensor | None = None
    advantage: Tensor | None = None
    entropy: Tensor | None = None

    def active(self) -> Tensor:
        return self.weight != 0

    def mean(self, column: Tensor) -> Tensor:
        """Each token counted by its weight; of equal numbers exactly that number."""
        first = first_of(column, self.active())
        count = self.weight.sum()
        gap = (self.weight * torch.where(self.active(), column - first, 0.0)).sum()
        return first + torch.where(count > 0, gap / count, 0.0)

    def ranks(self, column: Tensor) -> Tensor:
        """0 for the largest of the active tokens; of equal ones the first is before."""
        seen = torch.where(self.active(), column, -math.inf)
        order = seen.argsort(descending=True, stable=True)
        places = torch.arange(len(order), device=order.device)
        return torch.empty_like(order).scatter_(0, order, places)

    def share(self, share: Number) -> Tensor:
        """Of the batch in tokens: at least one, and as many as there are."""
        wanted = (share * self.weight.sum()).floor().clamp_min(1)
        return torch.minimum(wanted, self.active().sum())

    def covariances(self) -> Tensor:
        """(A - mean A) (logp - mean logp). Cui et al. 2025, arXiv:2505.22617, eq. 10."""
        A, logp = self.advantage, self.logp
        return (A - self.mean(A)) * (logp - self.mean(logp))


def _shifted_right(x: Tensor, bits: int) -> Tensor:
    """As of an unsigned number."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def lots(places: Tensor, seed: Number) -> Tensor:
    """Random numbers below 2^53: SplitMix64 (Steele et al. 2014, doi:10.1145/2714064.2660195)."""
    seed = seed.long() if isinstance(seed, Tensor) else int(seed)
    z = (places + 1) * -0x61C8864680B583EB + seed
    z = (z ^ _shifted_right(z, 30)) * -0x40A7B892E31B1A47
    z = (z ^ _shifted_right(z, 27)) * -0x6B2FB644ECCEEE15
    return _shifted_right(z ^ _shifted_right(z, 31), 11).double()


def clip_cov(
    tokens: BatchTokens,
    *,
    share: Number = 2e-4,
    low: Number = 1,
    high: Number = 5,
    epsilon_low: Number = 0.2,
    epsilon_high: Number = 0.2,
    seed: Number = 0,
) -> Tensor:
    """0 at random picks of low < C < high that PPO does not clip. arXiv:2505.22617, section 4.2."""
    C, A = tokens.covariances(), tokens.advantage
    ratio = torch.exp(tokens.logp - tokens.old_logp)
    clipped = ((A > 0) & (ratio > 1 + epsilon_high)) | ((A < 0) & (ratio < 1 - epsilon_low))
    candidates = tokens.active() & (low < C) & (high > C) & ~clipped
    lot = torch.where(candidates, lots(tokens.active().cumsum(0) - 1, seed), -1.0)
    return (~(candidates & (tokens.ranks(lot) < tokens.share(share)))).double()


def kl_cov(tokens: BatchTokens, *, share: Number = 2e-4) -> Tensor:
    """1 at the share of highest covariance, else 0. arXiv:2505.22617, section 4.2."""
    return (tokens.ranks(tokens.covariances()) < tokens.share(share)).double()


def top_entropy(tokens: BatchTokens, *, share: Number = 0.2) -> Tensor:
    """1 where H >= its quantile 1 - share, else 0. Wang et al. 2025, arXiv:2506.01939, eq. 5."""
    n = tokens.active().sum()
    ascending = torch.where(tokens.active(), tokens.entropy, math.inf).sort().values
    place = (1 - share) * (n - 1).double()
    below = place.long().clamp_min(0)
    above = torch.minimum(below + 1, (n - 1).clamp_min(0))
    a, b = (ascending.gather(0, each.reshape(1)) for each in (below, above))
    threshold = torch.minimum(a + place.frac() * (b - a), b)
    return (tokens.entropy >= threshold).double()


def m2po(tokens: BatchTokens, *, threshold: Number = 0.04) -> Tensor:
    """0 at the largest x^2, x = old_logp - rollout_logp, until the mean of the others is below
    threshold. Zheng et al. 2025, arXiv:2510.01161, eq. 4."""
    squares = (tokens.old_logp - tokens.rollout_logp).square()
    # From the last of equal ones on: the first leaves first. Masked slots come before all.
    order = torch.where(tokens.active(), squares, -1.0).flip(0).argsort(stable=True)
    weight = tokens.weight.flip(0)[order]
    sums = (weight * squares.flip(0)[order]).cumsum(0)
    places = torch.arange(len(order), device=order.device)
    below = torch.where(sums < threshold * weight.cumsum(0), places, -1).max()
    last = torch.maximum(below, (~tokens.active()).sum())  # one stays
    return torch.empty_like(weight).scatter_(0, order, (places <= last).double()).flip(0)


def fipo(
    tokens: BatchTokens,
    *,
    gamma: Number = 2 ** (-1 / 32),
    low: Number = 1,
    high: Number = 1.2,
    ratio_high: Number = math.inf,
    safe_ratio: Number = 4,
) -> Tensor:
    """clip(exp F, low, high), F_t = u_t + gamma F_{t+1}, u = logp - old_logp. arXiv:2603.19835."""
    u = tokens.logp - tokens.old_logp
    ratio = torch.exp(u)
    # Backwards by doubling: F = add + keep F of the slot behind, of two, of four ...
    add = torch.where(tokens.active() & ~(ratio > ratio_high), u, 0.0).flip(0)
    keep = torch.where(tokens.active(), number_beside(gamma, u), 1.0)
    keep = torch.where(tokens.last, 0.0, keep).flip(0)
    step = 1
    while step < tokens.longest:
        none = add.new_zeros(step)
        add = add + keep * torch.cat([none, add[:-step]])
        keep = keep * torch.cat([none, keep[:-step]])
        step *= 2
    weight = clamp(torch.exp(add.flip(0).clamp(-60, 60)), low, high)
    is_runaway = (tokens.advantage < 0) & (ratio > safe_ratio)
    return torch.where(is_runaway, weight.clamp(0.8, 1), weight)


def normalized_importance(
    tokens: BatchTokens,
    *,
    low: Number = 0,
    high: Number = 2,
    level: str = "token",
    beyond: str = "truncated",
) -> Tensor:
    """rho / mean rho, rho = clamp(e^x, low, high), x = old_logp - rollout_logp; masked: 0 beyond
    the bounds. verl."""
    x = tokens.old_logp - tokens.rollout_logp
    if level != "token":
        segments = tokens.turns()[0] if level.startswith("turn") else tokens.rows
        n = segments.sum(tokens.weight)
        n = segments.spread(torch.where(n > 0, n, 1.0))
        x = segments.spread(segments.sum(tokens.weight * x))
        x = x / n if level.endswith("mean") else x
        tokens = tokens._replace(weight=tokens.weight / n)  # those of a segment count as one
    ratio = torch.exp(x.clamp(-60, 60))
    rho = clamp(ratio, low, high)
    if beyond == "masked":
        rho = torch.where(ratio == rho, rho, 0.0)
    mean = tokens.mean(rho)
    return rho / torch.where(mean > 0, mean, 1.0)


def turn_mean(tokens: BatchTokens, *, over: str = "row") -> Tensor:
    """n / (turns n_turn): turns count alike, of their row or of the batch."""
    turns, turn_n = tokens.turns()
    if over == "batch":
        each = tokens.weight.sum() / (turn_n > 0).sum()
    else:
        ids, active = turns.index.double(), tokens.active()
        last = tokens.rows.largest(torch.where(active, ids, -math.inf), -math.inf)
        first = -tokens.rows.largest(torch.where(active, -ids, -math.inf), -math.inf)
        each = tokens.rows.spread(tokens.rows.sum(tokens.weight) / (last - first + 1))
    return each / turns.spread(turn_n)


class Rule(NamedTuple):
    formula: Callable[..., Tensor]
    reads: tuple[str, ...] = ()  # of BatchTokens


_OF_POLICIES = ("logp", "old_logp", "advantage")
_OF_MISMATCH = ("old_logp", "rollout_logp")
BATCH_WEIGHTS = {
    "clip_cov": Rule(clip_cov, _OF_POLICIES),
    "kl_cov": Rule(kl_cov, ("logp", "advantage")),
    "top_entropy": Rule(top_entropy, ("entropy",)),
    "m2po": Rule(m2po, _OF_MISMATCH),
    "fipo": Rule(fipo, _OF_POLICIES),
    "normalized_importance": Rule(normalized_importance, _OF_MISMATCH),
    "turn_mean": Rule(turn_mean),
}


def batch_weights(
    rule: str,
    logps: Tensor,
    response_mask: Tensor,
    *,
    advantages: Tensor | None = None,
    entropies: Tensor | None = None,
    turn_ids: Tensor | None = None,
    offsets: Tensor | None = None,
    **arrays_and_options: Tensor | Number | str | None,
) -> Tensor:
    """As tether.batch_weights: like logps, 1 in masked slots; NaN everywhere where a number that
    the rule needs is not finite."""
    if not logps.numel():
        return torch.ones_like(logps)
    formula, reads = BATCH_WEIGHTS[rule]
    options = arrays_and_options
    given = {"logp": logps, "advantage": advantages, "entropy": entropies}
    given |= {name[:-1]: options.pop(name, None) for name in ("old_logps", "rollout_logps")}
    rows = Rows.of("batch_weights", "logps", logps, offsets)
    weight = rows.weights(response_mask, torch.float64)
    if given["advantage"] is not None and advantages.shape != logps.shape:
        given["advantage"] = rows.spread(advantages.reshape(-1)).expand(logps.shape)
    active, finite, columns = weight != 0, weight.isfinite().all(), {}
    for name in reads:
        column = torch.where(active, given[name].double(), 0.0).reshape(-1)
        finite = finite & column.isfinite().all()
        columns[name] = column.clamp(-_LARGEST, _LARGEST)
    flat = _flat(rows, logps)

    def turns() -> tuple[Rows, Tensor]:
        ids = None if turn_ids is None else turn_ids.reshape(-1)
        n = flat[0].sum(tokens.weight)
        return segments_of(flat[0], tokens, n, "turn", response_mask.reshape(-1), ids)

    tokens = BatchTokens(weight.reshape(-1), *flat, turns, **columns)
    out = torch.where(finite, formula(tokens, **options), math.nan).reshape(logps.shape)
    return torch.where(active, out, 1.0).to(logps.dtype)


def _flat(rows: Rows, logps: Tensor) -> tuple[Rows, Tensor, int]:
    """The rows of slots side by side, where they end, and how long one may be."""
    index = rows.index
    if index is None:
        every = torch.arange(rows.count, device=logps.device)
        index = every[:, None].expand(logps.shape).reshape(-1)
    last = torch.cat([index[1:] != index[:-1], index.new_ones(1).bool()])
    return Rows(rows.count, index), last, logps.shape[-1]
