"""Advantages by recursions over tokens and rules of groups; whitening."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tether.reference.numbers import exp


def _deviations(rewards: Tensor) -> Tensor:
    """From the first: sums of them give exactly 0 for equal rewards."""
    first = rewards - rewards[0]
    return first - first.mean()


def _std(deviations: Tensor) -> Tensor:
    n = len(deviations)
    return (deviations.square().sum() / max(n - 1, 1)).sqrt()


def grpo(
    rewards: Tensor,
    lengths: Tensor | None,
    *,
    baseline: str = "mean",
    scale: str = "group_std",
    epsilon: float = 1e-6,
    batch_std: Tensor,
) -> Tensor:
    """(r - mean) / (std + epsilon), std with N - 1; baseline and scale as in group_advantage.

    Shao et al. 2024, arXiv:2402.03300, section 4.1.2; without the std: arXiv:2503.20783.
    """
    n = len(rewards)
    above = rewards if baseline == "none" else _deviations(rewards)
    if baseline == "leave_one_out":
        above = above * (n / (n - 1) if n > 1 else 0)
    if scale == "none":
        return above
    std = (_std(_deviations(rewards)) if scale == "group_std" else batch_std) + epsilon
    return above / std if std > 0 else torch.zeros_like(above)


def dr_grpo(rewards: Tensor, lengths: Tensor | None, *, scale: str = "none", **options) -> Tensor:
    """r - mean. Liu et al. 2025, arXiv:2503.20783."""
    return grpo(rewards, lengths, scale=scale, **options)


def rloo(
    rewards: Tensor,
    lengths: Tensor | None,
    *,
    baseline: str = "leave_one_out",
    scale: str = "none",
    **options,
) -> Tensor:
    """r - mean of the others. Ahmadian et al. 2024, arXiv:2402.14740, eq. 6."""
    return grpo(rewards, lengths, baseline=baseline, scale=scale, **options)


def opo(rewards: Tensor, lengths: Tensor, *, batch_std: Tensor) -> Tensor:
    """r - sum L r / sum L, L the tokens of an answer. Hao et al. 2025, arXiv:2505.23585."""
    first, tokens = rewards - rewards[0], lengths.sum()
    return first - ((lengths * first).sum() / tokens if tokens > 0 else first.mean())


GROUP_RULES = {each.__name__: each for each in (grpo, dr_grpo, rloo, opo)}


def group_advantage(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    estimator: str = "grpo",
    lengths: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Advantages of rewards [B] relative to their groups, in float64 inside.

    With a baseline a group of one gives 0, and so does a NaN reward, which is left out.
    """
    advantages = torch.zeros_like(rewards, dtype=torch.float64)
    there = ~torch.isnan(rewards)
    if there.any():
        options["batch_std"] = _std(_deviations(rewards[there].double()))
    for group in group_ids[there].unique():
        members = (group_ids == group) & there
        counts = None if lengths is None else lengths[members].double()
        advantages[members] = GROUP_RULES[estimator](rewards[members].double(), counts, **options)
    return advantages.to(rewards.dtype)


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

_NO_VALUES = ("returns",)


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
    gamma: float = 1,
    lambda_: float = 1,
    gap: str = "carry",
    **options: float,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns x + V by a recursion over rows [B, T].

    V after the last token is `bootstrap`, 0 after a token that is done, truncation_values at one
    that is truncated; x is 0 after all three. Over masked slots between tokens nothing passes; with
    gap="decay" each is a step without reward: V = gamma V_{t+1}, x = keep x_{t+1} at ratio 1.
    """
    dtype, rewards = rewards.dtype, rewards.double()
    zeros = torch.zeros_like(rewards)
    reads_values = values is not None and estimator not in _NO_VALUES
    value_of = values if reads_values else zeros
    log_ratio_of = zeros if log_ratios is None else log_ratios
    if lambdas is None:
        lambdas = torch.full_like(rewards, lambda_)
    lambdas = lambdas.reshape(len(rewards), -1).expand_as(rewards)
    carried = rewards.new_zeros(len(rewards))
    following = carried if bootstrap is None else bootstrap.double()
    behind = torch.full_like(carried, lambda_)
    in_response = carried.bool()
    advantages, returns = zeros.clone(), zeros.clone()
    for t in reversed(range(rewards.shape[1])):
        token = response_mask[:, t] != 0
        reward, value, log_ratio = (
            torch.where(token, each[:, t], 0.0) for each in (rewards, value_of, log_ratio_of)
        )
        behind = torch.where(token, lambdas[:, t], behind)
        step = RECURSIONS[estimator](reward, value, log_ratio, behind, gamma=gamma, **options)
        after, x_after = following, carried
        if truncated is not None:
            after = torch.where(truncated[:, t], truncation_values[:, t], after)
            x_after = torch.where(truncated[:, t], 0.0, x_after)
        if done is not None:
            after, x_after = (torch.where(done[:, t], 0.0, each) for each in (after, x_after))
        x = sum_of(step, after, x_after)
        own = x if step.own is None else sum_of(step.own, after, x_after)
        advantages[:, t] = torch.where(token, own, 0.0)
        returns[:, t] = torch.where(token, x + value, 0.0)
        decayed = ~token & in_response & (gap == "decay")
        following = torch.where(token, value, torch.where(decayed, gamma * following, following))
        carried = torch.where(token, x, torch.where(decayed, step.keep * carried, carried))
        in_response = in_response | token
    return advantages.to(dtype), returns.to(dtype)


def sum_of(step: Step, following: Tensor, carried: Tensor) -> Tensor:
    return step.base + step.next * following + step.keep * carried


def discounted_returns(rewards: Tensor, response_mask: Tensor, **options: Any) -> Tensor:
    """G_t = r_t + gamma G_{t+1}, with G = bootstrap after the last token; rewards [B, T]."""
    return advantage("returns", rewards, response_mask, **options)[1]


def generalized_advantage_estimation(
    rewards: Tensor, values: Tensor, response_mask: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """A and A + V, [B, T]: Schulman et al. 2015, arXiv:1506.02438, eq. 16."""
    return advantage("gae", rewards, response_mask, values=values, **options)


def whiten(
    values: Tensor, response_mask: Tensor, *, epsilon: float = 1e-8, shift_mean: bool = True
) -> Tensor:
    """(x - mean) / sqrt(variance + epsilon) at active slots [+ mean], variance with N - 1."""
    active = response_mask != 0
    weight = response_mask.double()
    x = torch.where(active, values, 0.0).double()
    count = weight.sum()
    mean = (weight * x).sum() / count
    centred = torch.where(count > 1, x - mean, 0.0)
    variance = (weight * centred.square()).sum() / torch.where(count > 1, count - 1, 1.0)
    out = centred / torch.sqrt(variance + epsilon) + (0 if shift_mean else mean)
    return torch.where(active, out, 0.0).to(values.dtype)
