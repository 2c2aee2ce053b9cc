"""Advantages by recursions over tokens and rules of groups."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tether.reference.numbers import Number, bounded, exp
from tether.reference.rows import Rows


class Members:
    """The groups of rewards [B]: what is of a group, at each of its members that are there."""

    def __init__(self, group_ids: Tensor, there: Tensor):
        # A sort in place of a look at the ids, which would wait for a device.
        order = torch.argsort(group_ids, stable=True)
        ordered = group_ids[order]
        last = torch.cat([ordered[:1], ordered])[: len(ordered)]
        self.index = torch.zeros_like(order).scatter(0, order, (ordered != last).cumsum(0))
        self.there = there
        self.n = self.sum(torch.ones_like(there, dtype=torch.float64))

    def sum(self, x: Tensor) -> Tensor:
        x = torch.where(self.there, x, 0.0)
        return torch.zeros_like(x).index_add(0, self.index, x)[self.index]

    def first(self, x: Tensor) -> Tensor:
        """Of its first member."""
        places = torch.arange(len(x), device=x.device)
        late = torch.where(self.there, places, len(x) - 1)
        first = torch.full_like(late, len(x) - 1).scatter_reduce(0, self.index, late, "amin")
        return torch.where(self.there, x, 0.0)[first[self.index]]

    def largest(self, x: Tensor) -> Tensor:
        low = torch.full_like(x, -math.inf)
        x = torch.where(self.there, x, -math.inf)
        return low.scatter_reduce(0, self.index, x, "amax")[self.index]

    def best_of_others(self, x: Tensor) -> Tensor:
        """The largest of the other members; of a group of one its own."""
        best = self.largest(x)
        second = self.largest(torch.where(x == best, -math.inf, x))
        leads = (x == best) & (self.sum((x == best).double()) == 1)
        return torch.where(self.n < 2, x, torch.where(leads, second, best))

    def mean(self, x: Tensor) -> Tensor:
        return self.first(x) + self.sum(x - self.first(x)) / self.n

    def deviations(self, x: Tensor) -> Tensor:
        """From the mean, by way of the first: sums of these give exactly 0 for equal numbers."""
        gap = x - self.first(x)
        return gap - self.sum(gap) / self.n

    def std(self, x: Tensor) -> Tensor:
        """In units of the largest deviation, so that no square overflows."""
        gap = torch.where(self.there, self.deviations(x), 0.0)
        largest = torch.zeros_like(gap).scatter_reduce(0, self.index, gap.abs(), "amax")
        unit = torch.where(largest == 0, 1.0, largest)[self.index]
        return unit * (self.sum((gap / unit).square()) / (self.n - 1).clamp_min(1)).sqrt()


def grpo(
    rewards: Tensor,
    lengths: Tensor | None,
    of: Members,
    *,
    baseline: str = "mean",
    scale: str = "group_std",
    epsilon: Number = 1e-6,
    batch_std: Tensor,
) -> Tensor:
    """(r - mean) / (std + epsilon), std with N - 1; baseline and scale as in group_advantage.

    Shao et al. 2024, arXiv:2402.03300, section 4.1.2; without the std: arXiv:2503.20783.
    """
    above = rewards if baseline == "none" else of.deviations(rewards)
    if baseline == "leave_one_out":
        above = above * torch.where(of.n > 1, of.n / (of.n - 1).clamp_min(1), 0.0)
    if baseline == "best_of_others":
        above = (rewards - of.best_of_others(rewards)).clamp_min(0)
    if scale == "none":
        return above
    if scale == "group_mean":
        mean = of.mean(rewards)
        size = torch.where(mean <= 0, 0.0, mean + epsilon)
    else:
        size = (of.std(rewards) if scale == "group_std" else batch_std) + epsilon
    return torch.where(size == 0, 0 * above, above / torch.where(size == 0, 1.0, size))


def dr_grpo(
    rewards: Tensor, lengths: Tensor | None, of: Members, *, scale: str = "none", **options
) -> Tensor:
    """r - mean. Liu et al. 2025, arXiv:2503.20783."""
    return grpo(rewards, lengths, of, scale=scale, **options)


def rloo(
    rewards: Tensor,
    lengths: Tensor | None,
    of: Members,
    *,
    baseline: str = "leave_one_out",
    scale: str = "none",
    **options,
) -> Tensor:
    """r - mean of the others. Ahmadian et al. 2024, arXiv:2402.14740, eq. 6."""
    return grpo(rewards, lengths, of, baseline=baseline, scale=scale, **options)


def pass_at_k(
    rewards: Tensor,
    lengths: Tensor | None,
    of: Members,
    *,
    baseline: str = "best_of_others",
    scale: str = "none",
    **options,
) -> Tensor:
    """max - max of the others, k the size of the group. Tang et al. 2025, arXiv:2503.19595."""
    return grpo(rewards, lengths, of, baseline=baseline, scale=scale, **options)


def max_rl(
    rewards: Tensor, lengths: Tensor | None, of: Members, *, scale: str = "group_mean", **options
) -> Tensor:
    """(r - mean) / (mean + epsilon), 0 where the mean is not above 0.

    Tajwar et al. 2026, arXiv:2602.02710.
    """
    return grpo(rewards, lengths, of, scale=scale, **options)


def opo(rewards: Tensor, lengths: Tensor, of: Members, *, batch_std: Tensor) -> Tensor:
    """r - sum L r / sum L, L the tokens of an answer. Hao et al. 2025, arXiv:2505.23585."""
    lengths = torch.where(lengths >= 0, lengths, math.nan)
    gap, tokens = rewards - of.first(rewards), of.sum(lengths)
    weighted = of.sum(lengths * gap) / torch.where(tokens == 0, 1.0, tokens)
    return gap - torch.where(tokens == 0, of.sum(gap) / of.n, weighted)


GROUP_RULES = {each.__name__: each for each in (grpo, dr_grpo, rloo, pass_at_k, max_rl, opo)}


def group_advantage(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    estimator: str = "grpo",
    lengths: Tensor | None = None,
    nan_reward: str = "missing",
    **options: Any,
) -> Tensor:
    """Advantages of rewards [B] relative to their groups, in float64 inside.

    With a baseline a group of one gives 0. A NaN reward is left out, which gives 0 too, or with
    nan_reward="error" spoils its group, as do an infinite one and a length that is none. Nothing
    waits for a device.
    """
    missing = torch.isnan(rewards) & (nan_reward == "missing")
    wide, there = _finite(rewards.double()), ~missing
    batch_std = Members(torch.zeros_like(group_ids), there).std(wide)
    counts = None if lengths is None else lengths.double()
    of = Members(group_ids, there)
    out = GROUP_RULES[estimator](wide, counts, of, batch_std=batch_std, **options)
    return torch.where(there, out, 0.0).to(rewards.dtype)


class Step(NamedTuple):
    """x_t = base + next V_{t+1} + keep x_{t+1}; the advantage is x, or as `own` says likewise."""

    base: Tensor
    next: Tensor | float
    keep: Tensor | float
    own: Step | None = None


def gae(reward: Tensor, value: Tensor, log_ratio: Tensor, lambda_: Tensor, *, gamma: float) -> Step:
    """A_t = r_t + gamma V_{t+1} - V_t + gamma lambda A_{t+1}.

    Schulman et al. 2015, arXiv:1506.02438, eq. 16.
    """
    return Step(reward - value, gamma, gamma * lambda_)


def returns(
    reward: Tensor, value: Tensor, log_ratio: Tensor, lambda_: Tensor, *, gamma: float
) -> Step:
    """G_t = r_t + gamma G_{t+1}, whatever the values."""
    return Step(reward, gamma, gamma)


def vtrace(
    reward: Tensor,
    value: Tensor,
    log_ratio: Tensor,
    lambda_: Tensor,
    *,
    gamma: float,
    rho_bar: float = 1,
    c_bar: float = 1,
    pg_rho_bar: float = 1,
) -> Step:
    """v = V + rho (r + gamma V' - V) + gamma c (v' - V'), with ratios truncated to rho and c.

    The advantage is that of the return r + gamma (V' + lambda (v' - V')), by a ratio of its own.
    Espeholt et al. 2018, arXiv:1802.01561, eq. 1 and section 4.2; with lambda below 1 as in rlax.
    """
    ratio, delta = exp(log_ratio), reward - value

    def step(rho: Tensor, c: Tensor, own: Step | None = None) -> Step:
        return Step(rho * delta, gamma * rho, gamma * lambda_ * c, own)

    rho, c, pg_rho = (ratio.clamp_max(bar) for bar in (rho_bar, c_bar, pg_rho_bar))
    return step(rho, c, step(pg_rho, pg_rho))


RECURSIONS = {each.__name__: each for each in (gae, returns, vtrace)}

# What each reads of a token beside its reward.
_READS = {"gae": ("values",), "returns": (), "vtrace": ("values", "log_ratios")}


class Scan(NamedTuple):
    """The slots of rows, side by side [R, C], and which are the last of their row."""

    last: Tensor

    def behind(self, y: Tensor, end: Tensor) -> Tensor:
        """What is one slot later; behind the last of a row, its end."""
        return torch.where(self.last, end, torch.cat([y[:, 1:], y[:, :1]], 1))

    def backwards(self, base: Tensor, keep: Tensor, end: Tensor) -> Tensor:
        """y_t = base + keep y_{t+1}, with y = end behind a row. In log C steps, each of which puts
        two stretches together: base + keep (base' + keep' y). What is not kept may be NaN."""
        base = torch.where(self.last, base + _product(keep, end), base)
        keep = torch.where(self.last, 0.0, keep)
        size, reach = base.shape[1], 1
        while reach < size:
            later, kept = (
                torch.nn.functional.pad(each[:, reach:], (0, reach)) for each in (base, keep)
            )
            base, keep, reach = base + _product(keep, later), _product(keep, kept), 2 * reach
        return base


def _product(keep: Tensor, y: Tensor) -> Tensor:
    return torch.where(keep == 0, 0.0, bounded(keep * y))


def _finite(x: Tensor) -> Tensor:
    """Bounded; NaN where it is no finite number."""
    return bounded(x) + 0 * x


def advantage(
    estimator: str,
    rewards: Tensor,
    response_mask: Tensor,
    *,
    values: Tensor | None = None,
    bootstrap: Tensor | None = None,
    done: Tensor | None = None,
    truncated: Tensor | None = None,
    truncation_values: Tensor | None = None,
    lambdas: Tensor | None = None,
    log_ratios: Tensor | None = None,
    offsets: Tensor | None = None,
    gamma: Number = 1,
    lambda_: Number = 1,
    gap: str = "carry",
    **options: Number,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns x + V by a recursion over rows [B, T], or [N] with offsets.

    V after the last token is `bootstrap`, 0 after a token that is done, truncation_values at one
    that is truncated; x is 0 after all three. Over masked slots between tokens nothing passes; with
    gap="decay" each is a step without reward: V = gamma V_{t+1}, x = keep x_{t+1} at ratio 1. What
    overflows is bounded. What is no finite number makes its token and those before it NaN, up to an
    end. Nothing waits for a device.
    """
    rows = Rows.of("advantage", "rewards", rewards, offsets)

    def slots(each: Tensor | Number | None, *, of_rows: bool = False) -> Tensor:
        """[R, C] in float64, of numbers of tokens, of rows or of all."""
        each = 0.0 if each is None else each
        if of_rows:
            each = rows.spread(each.reshape(-1))
        wide = torch.zeros_like(rewards, dtype=torch.float64) + each
        return wide if offsets is None else wide[None]

    weight = slots(rows.weights(response_mask, torch.float64))
    token, scan = weight != 0, Scan(_is_last(rows, rewards))
    given = {"values": values, "log_ratios": log_ratios}
    read = (each if name in _READS[estimator] else None for name, each in given.items())
    numbers = [torch.where(token, slots(each), 0.0) for each in (rewards, *read)]
    unsound = sum(0 * each for each in (weight, *numbers))
    reward, value, log_ratio = map(bounded, numbers)
    zero, one = torch.zeros_like(weight), torch.ones_like(weight)
    masked = torch.where(token, zero, one)
    inside = scan.behind(scan.backwards(1 - masked, masked, zero), zero) != 0
    decays = ~token & inside & (gap == "decay")
    own_lambda = slots(lambda_)
    if lambdas is not None:
        own_lambda = slots(lambdas, of_rows=lambdas.shape != rewards.shape)
    lambda_at = scan.backwards(torch.where(token, own_lambda, 0.0), masked, slots(lambda_))
    end = _finite(slots(bootstrap, of_rows=bootstrap is not None))
    kept = torch.where(decays, gamma * one, masked)
    after = scan.behind(scan.backwards(value, kept, end), end)
    step = RECURSIONS[estimator](reward, value, log_ratio, lambda_at, gamma=gamma, **options)
    ends = torch.zeros_like(token)
    if truncated is not None:
        ends = slots(truncated) != 0
        after = torch.where(ends, _finite(slots(truncation_values)), after)
    if done is not None:
        is_done = slots(done) != 0
        ends, after = ends | is_done, torch.where(is_done, 0.0, after)
    keep = torch.where(token, torch.where(ends, 0.0, step.keep * one), one)
    keep = torch.where(decays, step.keep * one, keep)
    base = torch.where(token, _base_of(step, after) + unsound, 0.0)
    # NaN passes what is kept of nothing, as 0 NaN, but no end.
    passes = torch.where(token & ends, zero, one)
    spoiled = scan.backwards((base + 0 * keep).isnan().to(base.dtype), passes, zero) > 0
    x = torch.where(spoiled, math.nan, scan.backwards(base, keep, zero))
    own = x
    if step.own is not None:
        x_after = torch.where(ends, 0.0, scan.behind(x, zero))
        own = _base_of(step.own, after) + bounded(step.own.keep * x_after) + unsound
    out = (torch.where(token, each, 0.0) for each in (own, x + value))
    return tuple(each.reshape(rewards.shape).to(rewards.dtype) for each in out)


def _base_of(step: Step, following: Tensor) -> Tensor:
    return bounded(step.base) + bounded(step.next * following)


def _is_last(rows: Rows, rewards: Tensor) -> Tensor:
    places = torch.arange(rewards.shape[-1], device=rewards.device)
    last = places == rewards.shape[-1] - 1
    if rows.index is None:
        return last.expand(rewards.shape)
    following = torch.cat([rows.index[1:], rows.index[:1]])
    return (last | (rows.index != following))[None]


def discounted_returns(rewards: Tensor, response_mask: Tensor, **options: Any) -> Tensor:
    """G_t = r_t + gamma G_{t+1}, with G = bootstrap after the last token; rewards [B, T]."""
    return advantage("returns", rewards, response_mask, **options)[1]


def generalized_advantage_estimation(
    rewards: Tensor, values: Tensor, response_mask: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """A and A + V, [B, T]: Schulman et al. 2015, arXiv:1506.02438, eq. 16."""
    return advantage("gae", rewards, response_mask, values=values, **options)
