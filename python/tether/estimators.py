"""Whitening and KL estimates. Constants all: nothing here has a gradient."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tether import _cuda, reference
from tether._checks import (
    Number,
    check_merged,
    check_positive,
    check_strings,
    kind_of,
    scalar,
)
from tether._functions import FUNCTIONS, Call
from tether._lists import Numbers, Settings, check_range
from tether._ops import gives_numbers


class Moments(NamedTuple):
    """Count, mean and sum of squared deviations; merge() adds micro-batches and ranks."""

    count: Number
    mean: Number
    squares: Number

    def merge(self, other: Moments) -> Moments:
        check_merged(self, other)
        count = self.count + other.count
        total = torch.where(count == 0, 1.0, count) if isinstance(count, Tensor) else count or 1
        gap, share = other.mean - self.mean, other.count / total
        squares = self.squares + other.squares + gap * gap * self.count * share
        return Moments(count, self.mean + gap * share, squares)


class KlReport(NamedTuple):
    """Of kl_report; see estimators/kl/report.h."""

    mean: Number  # per token [nats]
    standard_error: Number  # over sequences; NaN for fewer than two
    lambda_: Number  # that k_lambda took
    ratio_excess: Number  # mean r - 1: 0 in expectation
    ess: Number  # tokens that carry the ratios
    tokens: Number
    sequences: Number


class RatioSpread(NamedTuple):
    """Of the ratios r = trainer / engine at one level; see estimators/kl/mismatch.h."""

    mean: Number  # 1 in expectation
    min: Number
    max: Number
    chi2: Number  # mean r^2 - 1
    ess: Number  # (sum r)^2 / (n sum r^2), in (0, 1]


class MismatchReport(NamedTuple):
    """Of mismatch_report; see estimators/kl/mismatch.h."""

    tokens: Number
    sequences: Number
    k1: Number  # of KL(engine || trainer), mean over tokens [nats]
    k3: Number
    perplexity: Number  # mean over sequences of e^-(mean log-probability)
    rollout_perplexity: Number
    probability_gap: Number  # mean |p_trainer - p_engine| of the tokens
    probability_gap_max: Number
    token: RatioSpread
    sequence_mean: RatioSpread  # of geometric means
    sequence_sum: RatioSpread  # of whole sequences


def moments(values: Tensor, response_mask: Tensor) -> Moments:
    """Of the values at active slots; [B, T] or [N].

    Numbers; tensors of one number on other devices than the CPU, so that nothing waits for them,
    under torch.func and in compiled code.
    """
    tensors = {"values": values, "response_mask": response_mask}
    call = FUNCTIONS["moments"].call(tensors, {}).detached()
    on_cuda = _cuda.call_on_cuda(call)
    if on_cuda is not None:
        return Moments(*on_cuda.run().unbind())
    if gives_numbers(values):
        return Moments(*call.run().tolist())
    call.check_settings()
    return Moments(*reference.moments(**call.tensors))


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
    tensor. shift_mean=False keeps the mean. Equal values give exactly 0. Nothing waits for a
    device.
    """
    function = "whiten"
    tensors = {"values": values, "response_mask": response_mask}
    settings = {"epsilon": epsilon, "shift_mean": shift_mean}
    call = FUNCTIONS[function].call(tensors, settings).detached()
    settings |= call.settings.numbers
    sums = {} if step is None else _checked_moments(function, step)
    on_cuda = _cuda.call_on_cuda(call.with_numbers(sums))
    if on_cuda is not None:
        return (on_cuda if sums else _cuda.by_moments_of_batch(on_cuda)).run()
    if not gives_numbers(values):
        call.check_settings()
        step = Moments(*sums.values()) if sums else None
        return reference.whiten(**call.tensors, step=step, **settings)
    if step is None:
        of_step = Call(FUNCTIONS["moments"], call.tensors, Settings({}, {}), caller=function)
        step = Moments(*of_step.run().tolist())
        if not all(map(math.isfinite, step)):
            return reference.whiten(**call.tensors, **settings)
        sums = {f"step.{name}": each for name, each in step._asdict().items()}
    return call.with_numbers(sums).run()


def _checked_moments(function: str, step: Moments) -> dict[str, Number]:
    if not isinstance(step, Moments):
        raise TypeError(f"{function}: step must be Moments, got {kind_of(step)}")
    sums = {f"step.{name}": each for name, each in step._asdict().items()}
    for name, each in sums.items():
        check_range(function, name, each, FUNCTIONS[function].options[name])
    return {name: scalar(each) for name, each in sums.items()}


def kl_report(
    log_ratios: Tensor,
    response_mask: Tensor,
    *,
    estimator: str = "k3",
    lambda_: float | None = None,
    offsets: Numbers | None = None,
) -> KlReport:
    """KL(sampled || other) per token, and how far to trust it, from d = log other - log sampled.

    log_ratios  [B, T], or packed [N] with offsets
    estimator   k1, k2, k3 or k_lambda = -d + lambda (e^d - 1); its lambda None: fitted on the batch

    Numbers; tensors of one number on other devices than the CPU, so that nothing waits for them,
    under torch.func and in compiled code.
    """
    function = "kl_report"
    tensors = {"log_ratios": log_ratios, "response_mask": response_mask, "offsets": offsets}
    settings = {"estimator": estimator}
    if lambda_ is not None:
        check_strings(function, estimator=estimator)
        check_positive(function, "lambda_", lambda_, zero=True)
        if estimator != "k_lambda":
            raise ValueError(f"{function}: lambda_ must not be given for {estimator}, got one")
        settings["lambda_"] = lambda_
    call = FUNCTIONS[function].call(tensors, settings).detached()
    if gives_numbers(log_ratios):
        return KlReport(*call.run().tolist())
    call.check_settings()
    return KlReport(*reference.kl_report(**call.tensors, **call.named_settings()))


def mismatch_report(
    old_logps: Tensor,
    rollout_logps: Tensor,
    response_mask: Tensor,
    *,
    offsets: Numbers | None = None,
) -> MismatchReport:
    """How far the trainer's policy is from the engine that sampled, at the level of tokens and of
    sequences.

    old_logps        [B, T], or packed [N] with offsets [nats]: the trainer's, before the step
    rollout_logps    like it, of the engine

    Numbers; tensors of one number on other devices than the CPU, so that nothing waits for them,
    under torch.func and in compiled code.
    """
    tensors = {
        "old_logps": old_logps,
        "rollout_logps": rollout_logps,
        "response_mask": response_mask,
        "offsets": offsets,
    }
    call = FUNCTIONS["mismatch_report"].call(tensors, {}).detached()
    if gives_numbers(old_logps):
        out = call.run().tolist()
    else:
        call.check_settings()
        out = reference.mismatch_report(**call.tensors).unbind()
    levels = (RatioSpread(*out[begin : begin + 5]) for begin in (8, 13, 18))
    return MismatchReport(*out[:8], *levels)
