"""Advantages, returns, whitening and KL estimates. Constants all: nothing here has a gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tether._checks import (
    check_constant,
    check_constants,
    check_device,
    check_flags,
    check_floating,
    check_given,
    check_numbers,
    check_offsets,
    check_rows,
    check_strings,
    checked_mask,
    dtype_text,
    shape_text,
)
from tether._objectives import packed
from tether._ops import ops


@torch.library.register_fake("tether::gae")
def _(rewards, *_):
    return torch.empty_like(rewards), torch.empty_like(rewards)


@torch.library.register_fake("tether::discounted_returns")
def _(rewards, *_):
    return torch.empty_like(rewards)


@torch.library.register_fake("tether::group_advantage")
def _(rewards, *_):
    return torch.empty_like(rewards)


class AdvantagesAndReturns(NamedTuple):
    advantages: Tensor  # like rewards, in their dtype; 0 at masked slots
    returns: Tensor  # advantages + values


class Moments(NamedTuple):
    """Count, mean and sum of squared deviations; merge() adds micro-batches and ranks."""

    count: float
    mean: float
    squares: float

    def merge(self, other: Moments) -> Moments:
        count = self.count + other.count
        if count == 0:
            return self
        gap, share = other.mean - self.mean, other.count / count
        squares = self.squares + other.squares + gap * gap * self.count * share
        return Moments(count, self.mean + gap * share, squares)


class KlReport(NamedTuple):
    """Of kl_report; see estimators/kl/report.h."""

    mean: float  # per token [nats]
    standard_error: float  # over sequences; NaN for fewer than two
    lambda_: float  # that k_lambda took
    ratio_excess: float  # mean r - 1: 0 in expectation
    ess: float  # tokens that carry the ratios
    tokens: float
    sequences: float


def generalized_advantage_estimation(
    rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    *,
    gamma: float = 1.0,
    lambda_: float = 1.0,
    gap: str = "carry",
    bootstrap: Tensor | None = None,
    done: Tensor | None = None,
    truncated: Tensor | None = None,
    truncation_values: Tensor | None = None,
    lambdas: Tensor | None = None,
    offsets: Tensor | None = None,
) -> AdvantagesAndReturns:
    """A_t = delta_t + gamma lambda A_{t+1}, delta_t = r_t + gamma V_{t+1} - V_t; returns A + V.

    Schulman et al. 2015, arXiv:1506.02438, eq. 16.

    rewards, values    [B, T], or packed [N] with offsets
    response_mask      like rewards; slots that are 0 may hold anything and come out as 0
    gap                over masked slots between tokens: "carry", nothing passes; "decay", each is a
                       step without reward
    bootstrap          [B], the value after the last token; None: 0
    done, truncated    like rewards, bool: the episode ends at this token; it is cut off, and the
                       value after it is truncation_values, like rewards
    lambdas            [B] or like rewards, goes before lambda_

    Recursions are in float64 on the CPU; tensors elsewhere come over and the results go back.
    """
    function = "generalized_advantage_estimation"
    _check_rewards(function, rewards, offsets)
    check_constants(function, "rewards", rewards, values=values)
    mask = checked_mask(function, response_mask, rewards, "rewards")
    rows = rewards.shape[0] if offsets is None else offsets.shape[0] - 1
    _check_per_row(function, "bootstrap", bootstrap, rewards, rows)
    for name, each in (("done", done), ("truncated", truncated)):
        _check_bool(function, name, each, rewards)
    if truncated is not None:
        check_constants(function, "rewards", rewards, truncation_values=truncation_values)
    if isinstance(lambdas, Tensor) and lambdas.shape == rewards.shape:
        check_constants(function, "rewards", rewards, lambdas=lambdas)
    else:
        _check_per_row(function, "lambdas", lambdas, rewards, rows)
    check_numbers(function, gamma=gamma, lambda_=lambda_)
    check_strings(function, gap=gap)
    on_cpu = (
        rewards,
        values,
        mask,
        bootstrap,
        done,
        truncated,
        truncation_values if truncated is not None else None,
        lambdas,
        offsets,
    )
    out = ops.gae(*map(_on_cpu, on_cpu), float(gamma), float(lambda_), gap)
    return AdvantagesAndReturns(*(each.to(rewards.device) for each in out))


def discounted_returns(
    rewards: Tensor,
    response_mask: Tensor,
    *,
    gamma: float = 1.0,
    gap: str = "carry",
    bootstrap: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """G_t = r_t + gamma G_{t+1}, with G = bootstrap [B] after the last token; 0 at masked slots.

    rewards [B, T], or packed [N] with offsets; `gap` as in generalized_advantage_estimation.
    """
    function = "discounted_returns"
    _check_rewards(function, rewards, offsets)
    mask = checked_mask(function, response_mask, rewards, "rewards")
    rows = rewards.shape[0] if offsets is None else offsets.shape[0] - 1
    _check_per_row(function, "bootstrap", bootstrap, rewards, rows)
    check_numbers(function, gamma=gamma)
    check_strings(function, gap=gap)
    on_cpu = map(_on_cpu, (rewards, mask, bootstrap, offsets))
    return ops.discounted_returns(*on_cpu, float(gamma), gap).to(rewards.device)


def group_advantage(
    rewards: Tensor,
    groups: Tensor | int,
    *,
    baseline: str = "mean",
    scale: str = "group_std",
    epsilon: float = 1e-6,
    nan_reward: str = "error",
) -> Tensor:
    """(r - baseline) / (std + epsilon), one reward per sequence; [B] in the dtype of the rewards.

    groups      a size, of consecutive rewards, or ids [B], int32 or int64, in any order
    baseline    "mean" of the group (GRPO), "leave_one_out" (RLOO), "none"
    scale       "group_std" (GRPO), "batch_std", "none" (Dr. GRPO, RLOO); with N - 1
    nan_reward  "error", or "missing": 0, and the group is as if it were absent

    Equal rewards give exactly 0, and so does a group of one with a baseline.
    """
    function = "group_advantage"
    check_given(f"{function}: rewards", rewards)
    check_floating(f"{function}: rewards", rewards)
    if rewards.dim() != 1:
        raise ValueError(f"{function}: rewards must be [B], got {shape_text(rewards)}")
    check_constant(f"{function}: rewards", "rewards", rewards)
    wide = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    check_strings(function, baseline=baseline, scale=scale, nan_reward=nan_reward)
    check_numbers(function, epsilon=epsilon)
    ids = None
    if not isinstance(groups, Tensor):
        if not isinstance(groups, int) or isinstance(groups, bool):
            raise TypeError(
                f"{function}: groups must be a size or a tensor of ids, got {type(groups).__name__}"
            )
        if groups < 1:
            raise ValueError(f"{function}: groups must be at least 1, got {groups}")
    else:
        if groups.dtype not in (torch.int32, torch.int64):
            raise TypeError(
                f"{function}: groups must be int32 or int64, got {dtype_text(groups.dtype)}"
            )
        check_device(f"{function}: groups", groups, "rewards", rewards)
        if groups.shape != rewards.shape:
            raise ValueError(
                f"{function}: groups must be {shape_text(rewards)} like rewards, got "
                f"{shape_text(groups)}"
            )
        ids = groups.cpu().to(torch.int64).contiguous()
    out = ops.group_advantage(
        rewards.detach().cpu().to(wide).contiguous(),
        ids,
        0 if ids is not None else groups,
        baseline,
        scale,
        float(epsilon),
        nan_reward,
    )
    return out.to(rewards)


def moments(values: Tensor, response_mask: Tensor) -> Moments:
    """Of the values at active slots; [B, T] or [N]."""
    rows, mask = _as_rows("moments", values, response_mask)
    return Moments(*ops.moments(rows, mask).tolist())


def whiten(
    values: Tensor,
    response_mask: Tensor,
    *,
    step: Moments | None = None,
    epsilon: float = 1e-8,
    shift_mean: bool = True,
) -> Tensor:
    """(x - mean) / sqrt(variance + epsilon) at active slots, [+ mean]; 0 at the others.

    values [B, T] or [N]. step: moments of the whole step, merged by the caller; None: of this
    tensor. shift_mean=False keeps the mean. Equal values give exactly 0.
    """
    rows, mask = _as_rows("whiten", values, response_mask)
    if step is not None:
        if not isinstance(step, Moments):
            raise TypeError(f"whiten: step must be Moments, got {type(step).__name__}")
        check_numbers("whiten", **{f"step.{name}": each for name, each in step._asdict().items()})
    check_numbers("whiten", epsilon=epsilon)
    check_flags("whiten", shift_mean=shift_mean)
    found = step or Moments(*ops.moments(rows, mask).tolist())
    out = ops.whiten(rows, mask, packed(list(found)), float(epsilon), shift_mean)
    return out.view(values.shape).to(values.device)


def kl_report(
    log_ratios: Tensor,
    response_mask: Tensor,
    *,
    estimator: str = "k3",
    lambda_: float | None = None,
    offsets: Tensor | None = None,
) -> KlReport:
    """KL(sampled || other) per token, and how far to trust it, from d = log other - log sampled.

    log_ratios  [B, T], or packed [N] with offsets
    estimator   k1, k2, k3 or k_lambda = -d + lambda (e^d - 1); its lambda None: fitted on the batch
    """
    function = "kl_report"
    check_rows(function, "log_ratios", log_ratios, offsets)
    check_offsets(function, offsets, "log_ratios", log_ratios)
    mask = checked_mask(function, response_mask, log_ratios, "log_ratios")
    check_constant(f"{function}: log_ratios", "log_ratios", log_ratios)
    check_strings(function, estimator=estimator)
    if lambda_ is not None:
        check_numbers(function, lambda_=lambda_)
        if not lambda_ >= 0:
            raise ValueError(f"{function}: lambda_ must be at least 0, got {float(lambda_):g}")
    on_cpu = map(_on_cpu, (log_ratios, mask, offsets))
    fitted = -1.0 if lambda_ is None else float(lambda_)
    return KlReport(*ops.kl_report(*on_cpu, estimator, fitted).tolist())


# ---- tensors -------------------------------------------------------------------------------------


def _on_cpu(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    return tensor.detach().cpu()


def _as_rows(function: str, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """On the CPU, [B, T] or [1, N]."""
    check_given(f"{function}: values", values)
    check_floating(f"{function}: values", values)
    if values.dim() not in (1, 2):
        raise ValueError(f"{function}: values must be [B, T] or [N], got {shape_text(values)}")
    check_constant(f"{function}: values", "values", values)
    mask = checked_mask(function, mask, values, "values")
    rows = [_on_cpu(each if each.dim() == 2 else each[None]) for each in (values, mask)]
    return rows[0], rows[1]


def _check_rewards(function: str, rewards: Tensor, offsets: Tensor | None) -> None:
    check_rows(function, "rewards", rewards, offsets)
    check_offsets(function, offsets, "rewards", rewards)
    check_constant(f"{function}: rewards", "rewards", rewards)


def _check_per_row(
    function: str, name: str, tensor: Tensor | None, rewards: Tensor, rows: int
) -> None:
    if tensor is None:
        return
    check_given(f"{function}: {name}", tensor)
    check_device(f"{function}: {name}", tensor, "rewards", rewards)
    check_floating(f"{function}: {name}", tensor)
    check_constant(f"{function}: {name}", name, tensor)
    if tensor.shape != (rows,):
        raise ValueError(f"{function}: {name} must be [{rows}], got {shape_text(tensor)}")


def _check_bool(function: str, name: str, tensor: Tensor | None, rewards: Tensor) -> None:
    if tensor is None:
        return
    check_given(f"{function}: {name}", tensor)
    if tensor.dtype != torch.bool:
        raise TypeError(f"{function}: {name} must be bool, got {dtype_text(tensor.dtype)}")
    check_device(f"{function}: {name}", tensor, "rewards", rewards)
    if tensor.shape != rewards.shape:
        raise ValueError(
            f"{function}: {name} must be {shape_text(rewards)} like rewards, got "
            f"{shape_text(tensor)}"
        )
