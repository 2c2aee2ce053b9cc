"""Advantages, returns, whitening and KL estimates. Constants all: nothing here has a gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tether._checks import check_number, check_positive, number_of, result_dtype
from tether._functions import FUNCTIONS, Call
from tether._lists import Settings


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
    tensors = {
        "rewards": rewards,
        "values": values,
        "response_mask": response_mask,
        "bootstrap": bootstrap,
        "done": done,
        "truncated": truncated,
        "truncation_values": truncation_values,
        "lambdas": lambdas,
        "offsets": offsets,
    }
    call = FUNCTIONS["generalized_advantage_estimation"].call(
        tensors, {"gamma": gamma, "lambda_": lambda_, "gap": gap}
    )
    return AdvantagesAndReturns(*(each.to(rewards.device) for each in call.on_cpu().run()))


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
    tensors = {
        "rewards": rewards,
        "response_mask": response_mask,
        "bootstrap": bootstrap,
        "offsets": offsets,
    }
    call = FUNCTIONS["discounted_returns"].call(tensors, {"gamma": gamma, "gap": gap})
    return call.on_cpu().run().to(rewards.device)


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

    With a baseline, equal rewards give exactly 0, and so does a group of one.
    """
    function = "group_advantage"
    settings = {
        "baseline": baseline,
        "scale": scale,
        "epsilon": epsilon,
        "nan_reward": nan_reward,
    }
    ids = groups if isinstance(groups, Tensor) else None
    if ids is None:
        if not isinstance(groups, int) or isinstance(groups, bool):
            raise TypeError(
                f"{function}: groups must be a size or a tensor of ids, got {type(groups).__name__}"
            )
        if not 1 <= groups <= 2**53:
            rule = "at least 1" if groups < 1 else f"at most {2**53}"
            raise ValueError(f"{function}: groups must be {rule}, got {groups}")
        settings["group_size"] = groups
    group_advantages = FUNCTIONS[function].naming(group_ids="groups")
    call = group_advantages.call({"rewards": rewards, "groups": ids}, settings).on_cpu()
    call.tensors["rewards"] = call.tensors["rewards"].to(result_dtype(rewards)).contiguous()
    if ids is not None:
        call.tensors["groups"] = call.tensors["groups"].to(torch.int64).contiguous()
    return call.run().to(rewards)


def moments(values: Tensor, response_mask: Tensor) -> Moments:
    """Of the values at active slots; [B, T] or [N]."""
    tensors = {"values": values, "response_mask": response_mask}
    return Moments(*FUNCTIONS["moments"].call(tensors, {}).on_cpu().run().tolist())


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
    function = "whiten"
    tensors = {"values": values, "response_mask": response_mask}
    settings = {"epsilon": epsilon, "shift_mean": shift_mean}
    call = FUNCTIONS[function].call(tensors, settings).on_cpu()
    if step is None:
        step = Moments(*Call(FUNCTIONS["moments"], call.tensors, Settings({}, {})).run().tolist())
    if not isinstance(step, Moments):
        raise TypeError(f"{function}: step must be Moments, got {type(step).__name__}")
    sums = {f"step.{name}": each for name, each in step._asdict().items()}
    for name, each in sums.items():
        check_number(function, name, each)
        negative = name != "step.mean" and (number_of(each) or 0) < 0
        if negative:
            raise ValueError(f"{function}: {name} must be at least 0, got {number_of(each):g}")
    return call.with_numbers(sums).run().to(values.device)


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
    tensors = {"log_ratios": log_ratios, "response_mask": response_mask, "offsets": offsets}
    settings = {"estimator": estimator}
    if lambda_ is not None:
        check_positive(function, "lambda_", lambda_, zero=True)
        settings["lambda_"] = lambda_
    return KlReport(*FUNCTIONS[function].call(tensors, settings).on_cpu().run().tolist())
