"""One-sample estimators of a KL divergence, the penalty made of them, their report."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tether.reference.numbers import (
    Number,
    exp,
    first_of,
    minimum,
    number_beside,
    saturate,
    with_gradient_of,
)
from tether.reference.rows import Rows, SharedRatio

_LARGEST_SUM = 1e140

# x ~ sampled, log_ratio = log other(x) - log sampled(x), of KL(sampled || other).
# Schulman 2020, joschu.net/blog/kl-approx.html.


def k1(log_ratio: Tensor) -> Tensor:
    """-d: unbiased, of either sign."""
    return -log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """d^2 / 2: biased; its gradient is the one of KL(sampled || other)."""
    return log_ratio**2 / 2


def k3(log_ratio: Tensor) -> Tensor:
    """e^d - 1 - d: unbiased, never negative. arXiv:2402.03300, eq. 4.

    By its series d^2/2 (1 + d/3 (1 + d/4 (...))) for |d| < 1/2, where the difference cancels.
    """
    d = saturate(log_ratio, below=False)
    near = d.abs() < 0.5
    small = torch.where(near, d, 0.0)
    series = torch.ones_like(small)
    for n in range(16, 2, -1):
        series = 1 + small / n * series
    return torch.where(near, small**2 / 2 * series, torch.expm1(d) - d)


def low_var_kl(log_ratio: Tensor) -> Tensor:
    """min(e^d - 1 - d, 10): k3 up to a bound, beyond which it has no gradient. verl."""
    return minimum(k3(log_ratio), number_beside(10.0, log_ratio))


# Each form and its score, K + dK / dlogp.
_KL = {
    "k1": (k1, lambda d: 1 - d),
    "k2": (k2, lambda d: d * (d / 2 - 1)),
    "k3": (k3, lambda d: -d),
    "low_var_kl": (low_var_kl, lambda d: torch.where(k3(d) > 10, 10.0, -d)),
    "abs": (torch.abs, lambda d: d.abs() - d.sign()),
}

KL_SETTINGS = ("kl_estimator", "kl_gradient", "kl_correction", "kl_ratio_high")


def kl_term(
    logp: Tensor,
    sampler_logp: Tensor,
    ref_logp: Tensor,
    *,
    kl_weight: Tensor | float = 1.0,
    level_log_ratio: Tensor | None = None,
    shared: SharedRatio | None = None,
    kl_estimator: str = "k3",
    kl_gradient: str = "k3",
    kl_correction: str = "none",
    kl_ratio_high: Number = math.inf,
) -> Tensor:
    """v rho K(ref_logp - logp) with the gradient of v rho G(ref_logp - logp), v = kl_weight.

    rho = policy / sampler with kl_correction "ratio", of the old policy (DeepSeek-V3.2,
    arXiv:2512.02556, eq. 7), and "rollout_ratio", of the engine (NeMo-RL); 1 with "none" (GRPO,
    arXiv:2402.03300, eq. 4); of the log-ratio that the surrogate sees with
    "level_ratio" (TRL's use_bias_correction_kl); its value alone with "detached_...". A ratio
    beyond kl_ratio_high, or e^20 (float64: e^100), weighs as this one. With "on_policy" the samples
    count as the policy's own: rho = e^(logp - sg logp) = 1, with its gradient.

    The derivative of rho G by logp is rho (G + dG / dlogp), of k3 exactly -rho d: by that closed
    form, as the sum would cancel. Where a segment shares its log-ratio, each token gets its part.
    """
    d = ref_logp - logp
    value, source = (kl_weight * _KL[each][0](d) for each in (kl_estimator, kl_gradient))
    score = kl_weight * _KL[kl_gradient][1](d.detach())
    if kl_correction == "none":
        return with_gradient_of(value, source)
    if kl_correction == "on_policy":
        return with_gradient_of(value, score * logp)
    log_ratio = level_log_ratio if "level" in kl_correction else logp - sampler_logp
    bound = 100.0 if logp.dtype == torch.float64 else 20.0
    weighed = minimum(log_ratio.detach().clamp(-bound, bound), _log(kl_ratio_high, log_ratio))
    rho = torch.exp(weighed)
    if kl_correction.startswith("detached"):
        return with_gradient_of(rho * value, rho * source)
    slope = rho * score
    if kl_correction == "level_ratio" and shared is not None:
        own = rho * source.detach()
        share = (shared.share() - 1).to(own.dtype)
        if shared.is_aggregated:
            slope = slope + (shared.of_others(own) + own * share)
        else:  # each token's own upstream gradient: by the product rule, where it does not cancel
            slope = slope + own * share
            live = torch.exp(with_gradient_of(weighed, log_ratio))
            return with_gradient_of(
                rho * value, torch.where(shared.is_alone(), slope * logp, live * source)
            )
    return with_gradient_of(rho * value, slope * logp)


def _log(value: Number, like: Tensor) -> Tensor:
    return number_beside(value, like).log()


def kl_report(
    log_ratios: Tensor,
    response_mask: Tensor,
    *,
    estimator: str = "k3",
    lambda_: Number = -1,
    offsets: Tensor | None = None,
) -> Tensor:
    """[7] float64: the numbers of tether.KlReport in its order. Nothing waits for a device.

    The mean of k1, k2, k3 or k_lambda = -d + lambda (e^d - 1) over tokens, and its standard error
    over sequences: of a ratio of sums, sqrt(n / (n - 1) sum_i (S_i - mean n_i)^2) / sum_i n_i. A
    lambda below 0 is fitted on the batch, Cov(d, r) / Var(r). A log-ratio that is no finite number
    makes all NaN but the counts and a lambda that was given.
    """
    rows = Rows.of("kl_report", "log_ratios", log_ratios, offsets)
    weight = rows.weights(response_mask, torch.float64)
    seen = weight != 0
    d = torch.where(seen, log_ratios.double(), 0.0)
    d = d.clamp(-_LARGEST_SUM, _LARGEST_SUM) + 0 * d
    ends = torch.cat([torch.where(seen, d, -math.inf).reshape(-1), d.new_full((1,), -math.inf)])
    top = ends.max()
    # Ratios in units of the largest one, so that no square overflows.
    unit = exp(-top.clamp_min(0))
    tokens = weight.sum()

    def mean(terms: Tensor) -> Tensor:
        return (weight * terms).sum() / tokens

    excess = torch.expm1(saturate(d, below=False)) * unit
    r = torch.where(seen, exp(d - top), 0.0)
    ess = (weight * r).sum().square() / (weight * r.square()).sum()

    def deviations(x: Tensor) -> Tensor:
        """From the first active token: those of equal ones are exactly 0."""
        gap = torch.where(seen, x - first_of(x, seen), 0.0)
        return gap - mean(gap)

    deviation = deviations(excess)
    variance = mean(deviation.square())
    slope = mean(deviations(d) * deviation) / torch.where(variance == 0, 1.0, variance) * unit
    fitted = torch.where(variance == 0, 1.0, slope)
    given = torch.zeros_like(tokens) + lambda_
    is_fitted = (given < 0) & (estimator == "k_lambda")
    weight_of_r = torch.where(is_fitted, fitted, given.clamp_min(0))
    k = {"k1": k1, "k2": k2, "k3": k3}.get(
        estimator, lambda x: weight_of_r * torch.expm1(saturate(x, below=False)) - x
    )(d)
    sums = rows.sum(weight * k.clamp(-_LARGEST_SUM, _LARGEST_SUM))
    n_of = rows.sum(weight)
    n = (n_of > 0).sum().double()
    average = sums.sum() / tokens
    residuals = (sums - average * n_of).square().sum()
    error = torch.where(n > 1, (n / (n - 1) * residuals).sqrt() / tokens, math.nan)
    out = torch.stack([average, error, weight_of_r, mean(excess) / unit, ess, tokens, n])
    return torch.where(tokens == 0, 0.0, out)
