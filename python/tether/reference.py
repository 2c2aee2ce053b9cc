"""Every formula once more, in plain torch: the oracle of the tests, and the path of other devices.

Written from the papers, not from the C++ code, to be read. Log-probabilities are in nats. Two rules
hold throughout (core/number.h):

  ties         minimum(a, b) and maximum(a, b) take a; clamp passes the gradient on [low, high]
  saturation   x enters exp clamped to +-60 (float64: +-600), and the derivative is the one there,
               not 0: a token that ran away is still pulled back, and nothing overflows

Arithmetic is in float32, in float64 for float64 log-probabilities or logits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tether._checks import check_offset_values, savable

Number = float | Tensor


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- numbers -------------------------------------------------------------------------------------


def minimum(a: Tensor, b: Tensor) -> Tensor:
    return torch.where((b < a) | torch.isnan(b), b, a)


def maximum(a: Tensor, b: Tensor) -> Tensor:
    return torch.where((b > a) | torch.isnan(b), b, a)


def clamp(x: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    floor = torch.as_tensor(low, dtype=x.dtype, device=x.device)
    ceiling = torch.as_tensor(high, dtype=x.dtype, device=x.device)
    return minimum(maximum(x, floor), ceiling)


def saturate(x: Tensor, *, below: bool) -> Tensor:
    """x, at most 60 (600), and with `below` at least -60 (-600), with derivative 1 everywhere."""
    bound = 600.0 if x.dtype == torch.float64 else 60.0
    return x.detach().clamp(-bound if below else -math.inf, bound) + (x - x.detach())


def exp(x: Tensor) -> Tensor:
    """e^x, saturated on both sides."""
    return torch.exp(saturate(x, below=True))


# ---- KL estimators -------------------------------------------------------------------------------
#
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


# ---- surrogates: the loss of a token, and whether it was clipped: its gradient, or its weight ----


def ppo_clip(
    logp: Tensor,
    log_ratio: Tensor,
    advantage: Tensor,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    dual_clip: float = math.inf,
) -> tuple[Tensor, Tensor]:
    """-min(ratio A, clip(ratio, 1 - epsilon_low, 1 + epsilon_high) A); A < 0: at most -dual_clip A.

    Schulman et al. 2017, arXiv:1707.06347, eq. 7. Two epsilons: arXiv:2503.14476, eq. 10.
    Dual clip: Ye et al. 2020, arXiv:1912.09729, eq. 5.
    """
    ratio = exp(log_ratio)
    low, high = 1 - epsilon_low, 1 + epsilon_high
    loss = -minimum(ratio * advantage, clamp(ratio, low, high) * advantage)
    loss = torch.where(advantage < 0, minimum(loss, -dual_clip * advantage), loss)
    punished = (advantage < 0) & ((ratio < low) | (ratio > dual_clip))
    return loss, ((advantage > 0) & (ratio > high)) | punished


def reinforce(logp: Tensor, log_ratio: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
    """-A logp. Williams 1992, eq. 4."""
    return -advantage * logp, torch.zeros_like(logp, dtype=torch.bool)


def is_reinforce(
    logp: Tensor,
    log_ratio: Tensor,
    advantage: Tensor,
    *,
    ratio_low: float = 0,
    ratio_high: float = 5,
) -> tuple[Tensor, Tensor]:
    """-sg(clip(ratio, ratio_low, ratio_high)) A logp. CISPO, arXiv:2506.13585, eq. 4."""
    ratio = exp(log_ratio)
    weight = clamp(ratio, ratio_low, ratio_high).detach()
    return -weight * advantage * logp, (ratio < ratio_low) | (ratio > ratio_high) | (weight == 0)


def soft_gate(
    logp: Tensor,
    log_ratio: Tensor,
    advantage: Tensor,
    *,
    tau_pos: float = 1,
    tau_neg: float = 1.05,
) -> tuple[Tensor, Tensor]:
    """-(4 / tau) sigmoid(tau (ratio - 1)) A, tau_pos where A > 0. SAPO, arXiv:2511.20347, eq. 5.

    The gate by its logarithm: torch's derivative of sigmoid cancels where the gate is near 1.
    """
    zeros = torch.zeros_like(advantage)  # where() takes numbers as float32
    tau = torch.where(advantage > 0, zeros + tau_pos, zeros + tau_neg)
    x = tau * (exp(log_ratio) - 1)
    gate = torch.exp(torch.nn.functional.logsigmoid(x))
    return -4 / tau * gate * advantage, gate.detach() * torch.sigmoid(-x.detach()) == 0


# ---- weights: W of a token; `of` makes a statistic of its level ----------------------------------


def truncated_importance(
    tokens: Tokens, of: Callable[[Tensor], Tensor], *, low: Number = 0, high: Number = 2
) -> Tensor:
    """clamp(e^x, low, high), x = old_logp - rollout_logp. doi:10.1198/106186008X320456, eq. 4."""
    return clamp(exp(of(tokens.old_logp - tokens.rollout_logp)), low, high)


def masked_importance(
    tokens: Tokens, of: Callable[[Tensor], Tensor], *, low: Number = 0.5, high: Number = 5
) -> Tensor:
    """e^x where low <= e^x <= high, else 0. IcePop, arXiv:2510.18855."""
    ratio = exp(of(tokens.old_logp - tokens.rollout_logp))
    return torch.where((ratio < low) | (ratio > high), 0.0, ratio)


def ratio_gate(
    tokens: Tokens, of: Callable[[Tensor], Tensor], *, low: Number = 0.5, high: Number = 2
) -> Tensor:
    """1 where low <= e^x <= high, x = old_logp - rollout_logp; else out of the mask. verl's k1."""
    ratio = exp(of(tokens.old_logp - tokens.rollout_logp))
    return ((ratio >= low) & (ratio <= high)).to(ratio.dtype)


def tv_mask(
    tokens: Tokens, of: Callable[[Tensor], Tensor], *, low: Number = 0.2, high: Number = 0.2
) -> Tensor:
    """1 where e^logp - e^old_logp <= high (A > 0) or >= -low (A <= 0). DPPO, arXiv:2602.04879."""
    x = of(exp(tokens.logp) - exp(tokens.old_logp))
    beyond = torch.where(tokens.advantage > 0, x - high, -x - low)
    return (beyond <= 0).to(x.dtype)


class Weight(NamedTuple):
    formula: Callable[..., Tensor]
    reads: tuple[str, ...]  # beside old_logp and advantage
    leaves: bool = False  # what it takes out is out of the mask


WEIGHTS = {
    "truncated_importance": Weight(truncated_importance, ("rollout_logp",)),
    "masked_importance": Weight(masked_importance, ("rollout_logp",)),
    "ratio_gate": Weight(ratio_gate, ("rollout_logp",), leaves=True),
    "tv_mask": Weight(tv_mask, ("logp",)),
}


# ---- the penalty ---------------------------------------------------------------------------------

# Each form and its score, K + dK / dlogp.
_KL = {
    "k1": (k1, lambda d: 1 - d),
    "k2": (k2, lambda d: d * (d / 2 - 1)),
    "k3": (k3, lambda d: -d),
    "abs": (torch.abs, lambda d: d.abs() - d.sign()),
}
_KL_CHOICES = ("kl_estimator", "kl_gradient", "kl_correction")


def with_gradient_of(value: Tensor, source: Tensor) -> Tensor:
    """Straight through: the value of one, the gradient of the other, 0 where that overflowed."""
    return value.detach() + torch.nan_to_num(source - source.detach(), nan=0.0)


def kl_term(
    logp: Tensor,
    old_logp: Tensor,
    ref_logp: Tensor,
    *,
    level_log_ratio: Tensor | None = None,
    shared: SharedRatio | None = None,
    kl_estimator: str = "k3",
    kl_gradient: str = "k3",
    kl_correction: str = "none",
) -> Tensor:
    """rho K(ref_logp - logp) with the gradient of rho G(ref_logp - logp).

    rho = policy / old policy with kl_correction "ratio" (DeepSeek-V3.2, arXiv:2512.02556, eq. 7),
    1 with "none" (GRPO, arXiv:2402.03300, eq. 4); of the log-ratio that the surrogate sees with
    "level_ratio" (TRL's use_bias_correction_kl); its value alone with "detached_...". A ratio
    beyond e^20 (float64: e^100) weighs as this one.

    The derivative of rho G by logp is rho (G + dG / dlogp), of k3 exactly -rho d: by that closed
    form, as the sum would cancel. Where a row shares its log-ratio, each token gets a part of it.
    """
    d = ref_logp - logp
    value, source = (_KL[each][0](d) for each in (kl_estimator, kl_gradient))
    if kl_correction == "none":
        return with_gradient_of(value, source)
    log_ratio = level_log_ratio if "level" in kl_correction else logp - old_logp
    bound = 100.0 if logp.dtype == torch.float64 else 20.0
    rho = torch.exp(log_ratio.detach().clamp(-bound, bound))
    if kl_correction.startswith("detached"):
        return with_gradient_of(rho * value, rho * source)
    slope = rho * _KL[kl_gradient][1](d.detach())
    if kl_correction == "level_ratio" and shared is not None:
        own = rho * source.detach()
        share = (shared.share - 1).to(own.dtype)
        if shared.is_aggregated:
            slope = slope + (shared.of_others(own) + own * share)
        else:  # each token's own upstream gradient: by the product rule, where it does not cancel
            slope = slope + own * share
            live = torch.exp(with_gradient_of(log_ratio.detach().clamp(-bound, bound), log_ratio))
            return with_gradient_of(
                rho * value, torch.where(shared.is_alone, slope * logp, live * source)
            )
    return with_gradient_of(rho * value, slope * logp)


# ---- rows and their averages ---------------------------------------------------------------------


class Rows(NamedTuple):
    """Which row each token belongs to: padded [B, T], or packed [N] with its row indices."""

    count: int
    index: Tensor | None = None  # packed only, as is the next
    broken: Tensor | None = None  # whether the offsets are not those of rows of these tokens

    @staticmethod
    def of(function: str, name: str, tokens: Tensor, offsets: Tensor | None) -> Rows:
        if offsets is None:
            return Rows(tokens.shape[0])
        size, count = tokens.shape[0], offsets.shape[0] - 1
        check_offset_values(function, offsets, name, size)
        offsets = offsets.to(torch.int64)
        places = torch.arange(size, device=tokens.device)
        index = torch.searchsorted(offsets[1:], places, right=True).clamp_max(count - 1)
        broken = (offsets[0] != 0) | (offsets[-1] != size) | (offsets[1:] < offsets[:-1]).any()
        return Rows(count, index, broken)

    def weights(self, response_mask: Tensor, dtype: torch.dtype) -> Tensor:
        """Of tokens; NaN where offsets are broken, so that results and gradients are, too."""
        weight = savable(response_mask).to(dtype)
        return weight if self.broken is None else torch.where(self.broken, math.nan, weight)

    def sum(self, tokens: Tensor) -> Tensor:
        if self.index is None:
            return tokens.sum(1)
        return tokens.new_zeros(self.count).index_add(0, self.index, tokens)

    def largest(self, tokens: Tensor, least: float = 0) -> Tensor:
        """Of each row; `least` where that is larger."""
        if self.index is None:
            return torch.cat([tokens, tokens.new_full((tokens.shape[0], 1), least)], 1).amax(1)
        none = tokens.new_full((self.count,), least)
        return none.scatter_reduce(0, self.index, tokens, "amax")

    def sum_of_others(self, tokens: Tensor) -> Tensor:
        """At each token the sum of its row without it, which total - own would cancel."""
        magnitude = tokens.abs()
        is_largest = (magnitude == self.spread(self.largest(magnitude))) & (magnitude > 0)
        large = torch.where(is_largest, tokens, 0.0)
        small = tokens - large
        return (self.spread(self.sum(large)) - large) + (self.spread(self.sum(small)) - small)

    def spread(self, values: Tensor) -> Tensor:
        """One value per row, at each of its tokens."""
        return values[:, None] if self.index is None else values[self.index]


def row_factors(
    aggregation: str,
    row_tokens: Tensor,
    *,
    constant: float = 1,
    tokens: float | Tensor | None = None,
    sequences: float | Tensor | None = None,
) -> Tensor:
    """What the terms w x of each row are multiplied by before they are summed.

    With n_i = sum_t w_it, tokens = sum_i n_i and sequences = rows with n_i > 0, of the whole step:

      token_mean                   1 / tokens                       DAPO, arXiv:2503.14476, eq. 12
      sequence_mean_token_mean     1 / (sequences n_i)              GRPO, arXiv:2402.03300, eq. 3
      sequence_mean_token_sum      1 / sequences                    RLOO, arXiv:2402.14740
      sequence_sum_over_constant   1 / (sequences constant)         Dr. GRPO, arXiv:2503.20783
      token_sum                    1                                scaled by the caller
    """
    tokens = row_tokens.sum() if tokens is None else tokens
    sequences = (row_tokens > 0).sum() if sequences is None else sequences
    one = torch.ones_like(row_tokens)
    denominator = {
        "token_mean": one * tokens,
        "sequence_mean_token_mean": row_tokens * sequences,
        "sequence_mean_token_sum": one * sequences,
        "sequence_sum_over_constant": one * sequences * constant,
        "token_sum": one,
    }[aggregation]
    # A row with tokens whose denominator from the caller is no positive number spoils the loss.
    otherwise = torch.where(row_tokens > 0, math.nan, 0.0)
    return torch.where((denominator > 0) & denominator.isfinite(), 1 / denominator, otherwise)


class SharedRatio(NamedTuple):
    """How the tokens of a row share a log-ratio: d log_ratio / d logp is w for the sum, w / n for
    the mean. With is_aggregated the terms of a row are added up with weights w."""

    rows: Rows
    weight: Tensor
    n: Tensor  # weights of each row
    scale: Tensor  # 1, or 1 / n, at each token
    is_aggregated: bool

    @staticmethod
    def of(rows: Rows, weight: Tensor, n: Tensor, level: str, is_aggregated: bool):
        if level not in ("sequence_mean", "sequence_sum"):
            return None
        over = torch.where(n > 0, n, 1.0) if level == "sequence_mean" else torch.ones_like(n)
        return SharedRatio(rows, weight.double(), n, rows.spread(1 / over), is_aggregated)

    @property
    def share(self) -> Tensor:
        return self.scale * self.weight

    @property
    def is_alone(self) -> Tensor:
        return self.rows.spread(self.n) == self.weight

    def of_others(self, terms: Tensor) -> Tensor:
        """What the row's other tokens give a token by way of the ratio."""
        rest = self.scale * self.rows.sum_of_others(self.weight * terms.double())
        return rest.to(terms.dtype)


# ---- policy losses -------------------------------------------------------------------------------


class Row(NamedTuple):
    surrogate: Callable[..., tuple[Tensor, Tensor]]
    surrogate_options: dict[str, float]
    beta: float
    aggregation: str
    level: str = "token"


_PPO = {"epsilon_low": 0.2, "epsilon_high": 0.2, "dual_clip": math.inf}
_TIGHT = _PPO | {"epsilon_low": 3e-4, "epsilon_high": 4e-4}

OBJECTIVES = {
    # arXiv:1707.06347, eq. 7
    "ppo": Row(ppo_clip, _PPO, 0, "token_mean"),
    # arXiv:1912.09729, eq. 5
    "ppo_dual_clip": Row(ppo_clip, _PPO | {"dual_clip": 3}, 0, "token_mean"),
    # arXiv:2402.03300, eq. 3: the clipped surrogate + beta k3 of KL(policy || reference)
    "grpo": Row(ppo_clip, _PPO, 0, "sequence_mean_token_mean"),
    # arXiv:2503.14476, eq. 10 and 12
    "dapo": Row(ppo_clip, _PPO | {"epsilon_high": 0.28}, 0, "token_mean"),
    # TRL's loss_type
    "bnpo": Row(ppo_clip, _PPO, 0, "token_mean"),
    # arXiv:2503.20783, section 3.2
    "dr_grpo": Row(ppo_clip, _PPO, 0, "sequence_sum_over_constant"),
    # arXiv:2507.18071, eq. 5 and 13
    "gspo": Row(ppo_clip, _TIGHT, 0, "sequence_mean_token_mean", "sequence_mean"),
    "gspo_token": Row(ppo_clip, _TIGHT, 0, "sequence_mean_token_mean", "sequence_token"),
    # arXiv:2506.13585, eq. 4
    "cispo": Row(is_reinforce, {"ratio_low": 0, "ratio_high": 5}, 0, "token_mean"),
    # arXiv:2402.14740, eq. 6
    "rloo": Row(ppo_clip, _PPO, 0, "sequence_mean_token_mean", "sequence_sum"),
    # Williams 1992, eq. 4
    "reinforce": Row(reinforce, {}, 0, "token_mean"),
    # arXiv:2511.20347, eq. 5
    "sapo": Row(soft_gate, {"tau_pos": 1, "tau_neg": 1.05}, 0, "sequence_mean_token_mean"),
}


class PolicyTotals(NamedTuple):
    loss: Tensor
    sums: Tensor  # [14, 2]: value and count of every metric, in the order of rl/policy_metrics.h
    maxima: Tensor  # [3]: largest log_ratio, -log_ratio and weight


class Tokens(NamedTuple):
    """What a loss sees of its tokens: 0 where the weight is 0, whatever was there."""

    weight: Tensor
    logp: Tensor
    old_logp: Tensor
    advantage: Tensor
    ref_logp: Tensor
    rollout_logp: Tensor
    entropy: Tensor

    @property
    def active(self) -> Tensor:
        return self.weight != 0


def policy_loss(
    logps: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    entropies: Tensor | None = None,
    rollout_logps: Tensor | None = None,
    offsets: Tensor | None = None,
    *,
    objective: str = "grpo",
    normalizer: Any = None,  # tether.Normalizer
    beta: float | Tensor | None = None,
    entropy_coef: float | Tensor = 0,
    constant: float | Tensor = 1,
    level: str | None = None,
    aggregation: str | None = None,
    allow_biased_gradient: str = "false",  # looked at by the operator's check
    **options: float | Tensor | str,
) -> PolicyTotals:
    """world_size (Agg[W S] + beta Agg[K] - entropy_coef Agg[H]), as tether.policy_loss.

    options: of the surrogate, choices of the penalty, and weights as they stand on the wire, the
    level by its name and the options behind: truncated_importance="token",
    **{"truncated_importance.high": 3}.
    """
    beta, entropy_coef = savable(beta), savable(entropy_coef)
    terms = _terms(
        logps,
        advantages,
        response_mask,
        old_logps,
        ref_logps,
        entropies,
        rollout_logps,
        offsets,
        objective=objective,
        beta=beta,
        entropy_coef=entropy_coef,
        level=level,
        is_aggregated=True,
        **options,
    )
    rows, tokens, n, row = terms.rows, terms.tokens, terms.n, OBJECTIVES[objective]
    policy, kl_tokens, sequences, world_size = _step_counts(normalizer)

    def mean(terms: Tensor, count: float | Tensor | None) -> Tensor:
        factors = row_factors(
            aggregation or row.aggregation, n, constant=constant, tokens=count, sequences=sequences
        )
        weighted = torch.where(tokens.active, tokens.weight * terms, 0.0).double()
        return (rows.spread(factors) * weighted).sum()

    total = mean(terms.weighted + terms.spoil, policy) + terms.beta * mean(terms.kl, kl_tokens)
    if terms.entropic:
        total = total - entropy_coef * mean(tokens.entropy, policy)
    with torch.no_grad():
        sums, maxima = _metrics(terms)
    return PolicyTotals((world_size * total).to(_wide(logps.dtype)), sums, maxima)


class Terms(NamedTuple):
    """What every token adds to a policy loss, before weights and aggregation."""

    rows: Rows
    tokens: Tokens
    n: Tensor  # weights of each row
    level: str
    logp: Tensor  # of the level, as the next
    log_ratio: Tensor
    loss: Tensor  # S
    weight: Tensor  # W
    clipped: Tensor
    kl: Tensor  # K
    sound: Tensor  # finite inputs, and nothing that is NaN
    beta: float | Tensor
    entropic: bool

    @property
    def spoil(self) -> Tensor:
        return spoil_of(self.sound, self.logp)

    @property
    def weighted(self) -> Tensor:
        """W S"""
        return bounded(self.weight * self.loss)


def _terms(
    logps,
    advantages,
    response_mask,
    old_logps,
    ref_logps,
    entropies,
    rollout_logps,
    offsets,
    *,
    objective,
    beta,
    entropy_coef,
    level,
    is_aggregated,
    **options,
) -> Terms:
    row = OBJECTIVES[objective]
    beta = row.beta if beta is None else beta
    kl_choices = {name: options.pop(name) for name in _KL_CHOICES if name in options}
    weights = _weights_of(options, logps=logps, old_logps=old_logps, rollout_logps=rollout_logps)
    rows = Rows.of("policy_loss", "logps", logps, offsets)
    arrays = (logps, advantages, response_mask, old_logps, ref_logps, entropies, rollout_logps)
    tokens, n = _kept(rows, arrays, weights)
    level = level or row.level
    logp, log_ratio = levelled(rows, tokens, n, level)
    surrogate_options = row.surrogate_options | options
    loss, clipped = row.surrogate(logp, log_ratio, tokens.advantage, **surrogate_options)
    loss = bounded(loss)
    kl = torch.zeros_like(loss)
    penalised = _needs("ref_logps", "beta", "greater than 0", beta, ref_logps)
    if penalised:
        shared = SharedRatio.of(rows, tokens.weight, n, level, is_aggregated)
        each = (tokens.logp, tokens.old_logp, tokens.ref_logp)
        kl = bounded(kl_term(*each, level_log_ratio=log_ratio, shared=shared, **kl_choices))
    entropic = _needs("entropies", "entropy_coef", "not 0", entropy_coef, entropies)
    weight = _token_weights(rows, tokens, n, [each for each in weights if not each[0].leaves])
    sound = _sound(tokens, weight, log_ratio, loss, kl, penalised)
    return Terms(
        rows, tokens, n, level, logp, log_ratio, loss, weight, clipped, kl, sound, beta, entropic
    )


_WEIGHT_LEVELS = ("token", "sequence_mean", "sequence_sum", "sequence_min", "sequence_max")


def _weights_of(
    options: dict, **arrays: Tensor | None
) -> list[tuple[Weight, str, dict[str, Number]]]:
    """Takes the weights out of the options: each with its level and options of its own."""
    out = []
    for name, row in WEIGHTS.items():
        level = options.pop(name, "none")
        if level == "none":
            continue
        if level not in _WEIGHT_LEVELS:
            raise ValueError(
                f"policy_loss: {name} must be one of {', '.join(('none', *_WEIGHT_LEVELS))}, got "
                f'"{level}"'
            )
        prefix = f"{name}."
        dotted = [each for each in options if each.startswith(prefix)]
        own = {each.removeprefix(prefix): options.pop(each) for each in dotted}
        for array in (*(["old_logp"] if row.leaves else []), *row.reads):
            if arrays[f"{array}s"] is None:
                raise ValueError(
                    f"policy_loss: {array}s must be given for the weight {name}, got none"
                )
        out.append((row, level, {key: savable(value) for key, value in own.items()}))
    return out


def _kept(rows: Rows, arrays: tuple, weights: list) -> tuple[Tokens, Tensor]:
    """The tokens that no weight takes out, and the weights of each row."""
    tokens = _selected(rows, *arrays)
    n = rows.sum(tokens.weight.double())
    gates = [each for each in weights if each[0].leaves]
    if not gates:
        return tokens, n
    gate = _token_weights(rows, tokens, n, gates)
    weight = torch.where(gate == 0, 0.0, tokens.weight + 0 * gate)  # NaN stays in it
    tokens = _selected(rows._replace(broken=None), *arrays[:2], weight, *arrays[3:])
    return tokens, rows.sum(weight.double())


def _token_weights(rows: Rows, tokens: Tokens, n: Tensor, weights: list) -> Tensor:
    """W, the product of the weights; 1 in masked slots."""
    with torch.no_grad():
        out = torch.ones_like(tokens.logp)
        for row, level, options in weights:
            of = functools.partial(_statistic, rows, tokens, n, level)
            trace = 0 * (tokens.old_logp + 0 * tokens.advantage)
            for each in row.reads:
                trace = trace + 0 * getattr(tokens, each)
            # NaN where something that it reads is not finite: the formula may hide it.
            out = out * (row.formula(tokens, of, **options) + of(trace))
        return torch.where(tokens.active, out, 1.0)


def _statistic(rows: Rows, tokens: Tokens, n: Tensor, level: str, x: Tensor) -> Tensor:
    """x of each token, or of the active tokens of its row. The extremes have the sum's NaN."""
    if level == "token":
        return x
    total = rows.sum(tokens.weight.double() * torch.where(tokens.active, x, 0.0).double())
    if level == "sequence_sum":
        found = total
    elif level == "sequence_mean":
        found = total / n
    else:
        sign = 1.0 if level == "sequence_max" else -1.0
        seen = torch.where(tokens.active, sign * x.double(), -math.inf)
        found = sign * rows.largest(seen, -math.inf) + 0 * total
    return rows.spread(found).to(x.dtype).expand_as(x)


def policy_token_losses(
    logps: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    entropies: Tensor | None = None,
    rollout_logps: Tensor | None = None,
    offsets: Tensor | None = None,
    *,
    objective: str = "grpo",
    beta: float | Tensor | None = None,
    entropy_coef: float | Tensor = 0,
    level: str | None = None,
    constant: float | Tensor = 1,  # of the aggregation, as are these two
    aggregation: str | None = None,
    allow_biased_gradient: str = "false",
    **options: float | Tensor | str,
) -> Tensor:
    """W S + beta K - entropy_coef H at each token, like logps; 0 in masked slots."""
    beta, entropy_coef = savable(beta), savable(entropy_coef)
    terms = _terms(
        logps,
        advantages,
        response_mask,
        old_logps,
        ref_logps,
        entropies,
        rollout_logps,
        offsets,
        objective=objective,
        beta=beta,
        entropy_coef=entropy_coef,
        level=level,
        is_aggregated=False,
        **options,
    )
    each = terms.weighted + terms.spoil + terms.beta * terms.kl
    if terms.entropic:
        each = each - entropy_coef * terms.tokens.entropy
    return torch.where(terms.tokens.active, each, 0.0)


def local_counts(
    logps: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    entropies: Tensor | None = None,
    rollout_logps: Tensor | None = None,
    offsets: Tensor | None = None,
    **options: Number | str,
) -> Tensor:
    """[tokens under the surrogate, tokens under the penalty, rows with a token], float64.

    Arguments as policy_loss; of the options only the weights that take tokens out change a count.
    """
    gates = [name for name, row in WEIGHTS.items() if row.leaves]
    options = {name: value for name, value in options.items() if name.split(".")[0] in gates}
    weights = _weights_of(options, logps=logps, old_logps=old_logps, rollout_logps=rollout_logps)
    rows = Rows.of("local_counts", "logps", logps, offsets)
    if weights:
        arrays = (logps, advantages, response_mask, old_logps, ref_logps, entropies, rollout_logps)
        n = _kept(rows, arrays, weights)[1]
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


def _selected(
    rows: Rows, logps, advantages, response_mask, old_logps, ref_logps, entropies, rollout_logps
) -> Tokens:
    wide = _wide(logps.dtype)
    weight = rows.weights(response_mask, wide)
    if advantages.shape != logps.shape:
        advantages = rows.spread(advantages.reshape(-1))

    def select(tensor: Tensor | None, largest: float = _LARGEST_LOGP[wide]) -> Tensor:
        if tensor is None:
            return torch.zeros_like(weight)
        return saturated(torch.where(weight != 0, tensor.to(wide), 0.0), largest)

    logp = select(logps)
    old_logp = logp.detach() if old_logps is None else select(old_logps)
    advantage = select(advantages, 1e40 if wide == torch.float64 else 1e12)
    further = (select(each) for each in (ref_logps, rollout_logps, entropies))
    return Tokens(weight, logp, old_logp, advantage, *further)


# Finite log-probabilities beyond this count as this: products of their squares stay finite.
_LARGEST_LOGP = {torch.float32: 1e14, torch.float64: 1e130}


def saturated(x: Tensor, largest: float) -> Tensor:
    """A finite number beyond `largest` counts as this, with derivative 1; infinity as it is."""
    return with_gradient_of(torch.where(x.isfinite(), x.detach().clamp(-largest, largest), x), x)


def spoil_of(sound: Tensor, x: Tensor) -> Tensor:
    """0, or NaN with a gradient of NaN by x: saturation and clips hide what is not sound."""
    return torch.where(sound, torch.zeros_like(x), math.nan).detach() * x


def spoiling(sound: Tensor, like: Tensor) -> Tensor:
    """1 where it holds, else NaN."""
    return torch.where(sound, torch.ones_like(like), math.nan)


def bounded(x: Tensor) -> Tensor:
    """What overflowed counts as the largest number; NaN stays NaN."""
    largest = 1e300 if x.dtype == torch.float64 else torch.finfo(x.dtype).max
    return with_gradient_of(x.clamp(-largest, largest), x)


def levelled(rows: Rows, tokens: Tokens, n: Tensor, level: str) -> tuple[Tensor, Tensor]:
    """logp and log_ratio as a surrogate sees them.

    token            logp - old_logp
    sequence_mean    their mean over the row; logp likewise      GSPO, arXiv:2507.18071, eq. 7
    sequence_token   the mean, with the token's own gradient     GSPO-token, the same, eq. 14
    sequence_sum     their sum over the row; logp likewise       RLOO, arXiv:2402.14740
    """
    log_ratio = tokens.logp - tokens.old_logp
    if level == "token":
        return tokens.logp, log_ratio

    def spread(values: Tensor) -> Tensor:
        sums = rows.sum((tokens.weight * values).double())
        if level != "sequence_sum":
            sums = sums / torch.where(n > 0, n, 1.0)
        return rows.spread(sums.to(values.dtype)).expand_as(values)

    if level == "sequence_token":
        return tokens.logp, with_gradient_of(spread(log_ratio), log_ratio)
    return spread(tokens.logp), spread(log_ratio)


def _sound(
    tokens: Tokens, weight: Tensor, log_ratio: Tensor, loss: Tensor, kl: Tensor, penalised: bool
) -> Tensor:
    """Whether the inputs of a token are finite and nothing that comes of them is NaN."""
    seen = [tokens.weight, weight, log_ratio, tokens.logp, tokens.old_logp, tokens.advantage]
    if penalised:
        seen.append(tokens.ref_logp)
    right = [torch.isfinite(each) for each in seen] + [~torch.isnan(each) for each in (loss, kl)]
    return torch.stack(right).all(0)


def _metrics(terms: Terms) -> tuple[Tensor, Tensor]:
    tokens, log_ratio, clipped = terms.tokens, terms.log_ratio, terms.clipped
    # A larger ratio counts as this: its square stays finite.
    largest_ratio = 1e150 if log_ratio.dtype == torch.float64 else 1e17
    seen_ratio = exp(log_ratio).clamp_max(largest_ratio)
    weight = terms.weight.clamp(-largest_ratio, largest_ratio)
    good, bad = clipped & (tokens.advantage > 0), clipped & (tokens.advantage < 0)
    below = clipped & (tokens.advantage != 0) & (log_ratio < 0)  # CISPO truncates for either sign
    count = tokens.weight.sum(dtype=torch.float64)
    # What is said of the ratio of a sequence counts the sequence: each token for 1 / n of it.
    by_row = terms.level != "token"
    ratio_weight = tokens.weight / terms.rows.spread(terms.n) if by_row else tokens.weight
    ratio_count = (terms.n > 0).sum().double() if by_row else count

    def total(values: Tensor, weight: Tensor = tokens.weight) -> Tensor:
        return torch.where(tokens.active, weight * values, 0.0).sum(dtype=torch.float64)

    def largest(values: Tensor) -> Tensor:
        seen = torch.where(tokens.active & terms.sound, values, -math.inf).reshape(-1)
        return torch.cat([seen, seen.new_full((1,), -math.inf)]).max().double()

    of_ratio = [
        below,
        good & (log_ratio > 0),
        bad & (log_ratio > 0),
        k1(log_ratio),
        k3(log_ratio),
        seen_ratio,
        seen_ratio**2,
    ]
    broken = (terms.sound, torch.isfinite(tokens.entropy))
    sums = [total(each) for each in (terms.weighted, terms.kl, tokens.entropy)]
    sums += [total(each, ratio_weight) for each in of_ratio]
    sums += [sum((tokens.active & ~each).sum(dtype=torch.float64) for each in broken)]
    sums += [total(each) for each in (weight, weight**2, (weight == 0).to(weight.dtype))]
    counts = [count] * 3 + [ratio_count] * len(of_ratio) + [count] * 4
    return torch.stack([torch.stack(sums), torch.stack(counts)], 1), torch.stack(
        [largest(log_ratio), largest(-log_ratio), largest(weight)]
    )


# ---- preference losses ---------------------------------------------------------------------------
#
# g_c and g_r are the linked scores of the chosen and the rejected answer, x = beta (g_c - g_r). As
# the derivative is a product, not a sum of parts, an infinite upstream gradient makes no NaN of it.

_LARGEST_VALUE = 1e300  # what is beyond counts as this


def with_slope(value: Tensor, slope: Tensor | Number, x: Tensor) -> Tensor:
    """The value, with the gradient of slope x."""
    slope = slope.detach() if isinstance(slope, Tensor) else slope
    return value.detach() + slope * (x - x.detach())


def margin(chosen: Tensor, rejected: Tensor, beta: Number) -> Tensor:
    gap = chosen - rejected
    beta = beta.double().clamp(max=1e280) if isinstance(beta, Tensor) else min(beta, 1e280)
    x = gap.detach() * beta
    return x.clamp(-_LARGEST_VALUE, _LARGEST_VALUE) + beta * (gap - gap.detach())


def dpo(chosen: Tensor, rejected: Tensor, beta: Number, *, label_smoothing: Number = 0.0) -> Tensor:
    """-(1 - e) log sigmoid(x) - e log sigmoid(-x).

    DPO, arXiv:2305.18290, eq. 7; with label smoothing e: ericmitchell.ai/cdpo.pdf.
    """
    x = margin(chosen, rejected, beta)
    log_sigmoid = torch.nn.functional.logsigmoid
    value = -(1 - label_smoothing) * log_sigmoid(x) - label_smoothing * log_sigmoid(-x)
    return with_slope(value, label_smoothing - torch.sigmoid(-x), x)


def ipo(chosen: Tensor, rejected: Tensor, beta: Number) -> Tensor:
    """(g_c - g_r - 1 / (2 beta))^2. arXiv:2310.12036, eq. 17."""
    beta = beta.double().clamp(min=1e-290) if isinstance(beta, Tensor) else max(beta, 1e-290)
    gap = chosen - rejected - 1 / (2 * beta)
    return with_slope((gap**2).clamp(max=_LARGEST_VALUE), 2 * gap, gap)


def hinge(chosen: Tensor, rejected: Tensor, beta: Number) -> Tensor:
    """max(0, 1 - x). arXiv:2309.06657, eq. 9."""
    return torch.relu(1 - margin(chosen, rejected, beta))


def linked(link: str, score: Tensor) -> Tensor:
    """Of an f-divergence in place of the reverse KL: arXiv:2309.16240, table 1."""
    if link == "forward_kl":
        return -torch.exp(with_gradient_of((-score).clamp(-40, 40), -score))
    return torch.nn.functional.logsigmoid(score) if link == "js" else score


class PairRow(NamedTuple):
    loss: Callable[..., Tensor]
    options: dict[str, float]
    score: str = "sum"


PREFERENCES = {
    "dpo": PairRow(dpo, {"label_smoothing": 0.0}),
    "cdpo": PairRow(dpo, {"label_smoothing": 0.1}),
    "ipo": PairRow(ipo, {}, "mean"),
    "hinge": PairRow(hinge, {}),
}


class PreferenceTotals(NamedTuple):
    loss: Tensor
    sums: Tensor  # [8, 2]: value and count of every metric, in the order of preference_metrics.h


def preference_loss(
    logps: Tensor,
    response_mask: Tensor,
    ref_logps: Tensor | None = None,
    offsets: Tensor | None = None,
    *,
    objective: str = "dpo",
    pairs: Number | None = None,
    world_size: Number = 1,
    loss_scale: Number = 1,
    beta: Number = 0.1,
    score: str | None = None,
    reference: str = "true",
    link: str = "reverse_kl",
    **options: Number,
) -> PreferenceTotals:
    """The mean over pairs of the loss of their scores, as tether.preference_loss."""
    row = PREFERENCES[objective]
    beta, options = savable(beta), {name: savable(each) for name, each in options.items()}
    rows = Rows.of("preference_loss", "logps", logps, offsets)
    half = rows.count // 2
    wide = _wide(logps.dtype)
    weight = rows.weights(response_mask, wide)
    active = weight != 0

    def row_sums(tensor: Tensor) -> Tensor:
        each = torch.where(active, tensor.to(wide), 0.0)
        if wide == torch.float64:  # sums of float32 do not overflow there
            each = saturated(each, 1e290)
        return rows.sum((weight * each).double())

    n = rows.sum(weight.double())
    over = torch.where(n > 0, n, 1.0) if (score or row.score) == "mean" else torch.ones_like(n)
    logp_sums = row_sums(logps)
    policy = logp_sums / over
    scores = policy if reference == "false" else policy - row_sums(ref_logps) / over
    chosen, rejected = scores[:half], scores[half:]
    each = row.loss(linked(link, chosen), linked(link, rejected), beta, **row.options | options)
    present = (n[:half] != 0) | (n[half:] != 0)
    finite = torch.isfinite(chosen) & torch.isfinite(rejected) & torch.isfinite(each)
    terms = torch.where(present, torch.where(finite, 1.0, math.nan) * each, 0.0)
    count = present.sum().double()
    denominator = count if pairs is None else torch.as_tensor(pairs, device=count.device).double()
    legal = (denominator > 0) & denominator.isfinite()
    share = torch.where(legal, 1 / denominator, torch.where(count > 0, math.nan, 0.0))
    factor = (share * world_size * loss_scale).clamp(max=_LARGEST_VALUE)
    loss = factor * terms.sum()
    with torch.no_grad():
        rewards = [beta * chosen, beta * rejected, beta * (chosen - rejected)]
        rewards = [reward.clamp(-_LARGEST_VALUE, _LARGEST_VALUE) for reward in rewards]
        parts = [
            each,
            *rewards,
            (rewards[2] > 0).double(),
            logp_sums[:half],
            logp_sums[half:],
            (~finite).double(),
        ]
        values = torch.stack([torch.where(present, part, 0.0).sum() for part in parts])
        sums = torch.stack([values, count.expand_as(values)], 1)
    return PreferenceTotals(loss.to(wide), sums)


# ---- values --------------------------------------------------------------------------------------


class ValueTotals(NamedTuple):
    loss: Tensor
    sums: Tensor  # [7], in the order of ValueMetrics (rl/value_metrics.h)


def value_loss(
    values: Tensor,
    returns: Tensor,
    response_mask: Tensor,
    *,
    old_values: Tensor | None = None,
    offsets: Tensor | None = None,
    clip_range: float = 0.2,
    aggregation: str = "token_mean",
    constant: float = 1,
    normalizer: Any = None,
) -> ValueTotals:
    """Agg[ 1/2 max((V - R)^2, (clip(V, V_old - clip_range, V_old + clip_range) - R)^2) ]."""
    rows, wide = Rows.of("value_loss", "values", values, offsets), _wide(values.dtype)
    weight = rows.weights(response_mask, wide)
    active = weight != 0

    def selected(tensor):
        return saturated(torch.where(active, tensor.to(wide), 0.0), largest)

    largest = 1e140 if wide == torch.float64 else 1e18  # its square stays finite
    value, target = selected(values), selected(returns)
    old = value.detach() if old_values is None else selected(old_values)
    inside = minimum(maximum(value, old - clip_range), old + clip_range)
    plain, clipped = (value - target).square(), (inside - target).square()
    each = 0.5 * maximum(plain, clipped)
    each = each + spoil_of(value.isfinite() & target.isfinite() & old.isfinite(), value)
    n = rows.sum(weight.double())
    tokens, sequences, world_size = None, None, 1
    if normalizer is not None:
        tokens, sequences = normalizer.policy, normalizer.sequences
        world_size = normalizer.factor
    factors = row_factors(aggregation, n, constant=constant, tokens=tokens, sequences=sequences)
    loss = world_size * (rows.spread(factors.to(wide)) * weight * each).sum()
    with torch.no_grad():
        parts = (
            torch.ones_like(each),
            each,
            (clipped > plain).to(wide),
            target,
            target.square(),
            target - value,
            (target - value).square(),
        )
        sums = torch.stack([(weight * part).double().sum() for part in parts])
    return ValueTotals(loss, sums)


# ---- advantages ----------------------------------------------------------------------------------


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
    Espeholt et al. 2018, arXiv:1802.01561, eq. 1 and section 4.2.
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
    zeros = torch.zeros_like(rewards)
    reads_values = values is not None and estimator not in _NO_VALUES
    value_of = values if reads_values else zeros
    log_ratio_of = zeros if log_ratios is None else log_ratios
    if lambdas is None:
        lambdas = torch.full_like(rewards, lambda_)
    elif lambdas.dim() == 1:
        lambdas = lambdas[:, None].expand_as(rewards)
    following = zeros[:, 0] if bootstrap is None else bootstrap
    carried, behind = zeros[:, 0], torch.full_like(zeros[:, 0], lambda_)
    in_response = torch.zeros_like(response_mask[:, 0], dtype=torch.bool)
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
    return advantages, returns


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
    squares = (weight * (x - mean).square()).sum()
    variance = squares / (count - 1) if count > 1 else torch.zeros_like(count)
    out = (x - mean) / torch.sqrt(variance + epsilon) + (0 if shift_mean else mean)
    return torch.where(active, out, 0.0).to(values.dtype)


def kl_report(
    log_ratios: Tensor, response_mask: Tensor, *, estimator: str = "k3"
) -> tuple[Tensor, Tensor]:
    """The mean of k1, k2 or k3 over tokens [B, T], and its standard error over sequences.

    Of a ratio of sums over sequences: sqrt(n / (n - 1) sum_i (S_i - mean n_i)^2) / sum_i n_i.
    """
    weight = response_mask.double()
    each = {"k1": k1, "k2": k2, "k3": k3}[estimator](log_ratios.double())
    sums = torch.where(weight != 0, weight * each, 0.0).sum(1)
    tokens = weight.sum(1)
    mean = sums.sum() / tokens.sum()
    n = (tokens > 0).sum().double()
    error = (n / (n - 1) * (sums - mean * tokens).square().sum()).sqrt() / tokens.sum()
    return mean, error


# ---- log-probabilities ---------------------------------------------------------------------------


def token_logps(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1,
    scale: float = 1,
    softcap: float = 0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """log softmax(x / temperature) at the targets, and the entropies -sum_v p_v log p_v.

    x = scale logits, or softcap tanh(scale logits / softcap). logits [..., V], targets [...];
    results are like targets. A logit of -inf is a column that is not there. Ignored targets get 0
    and no gradient.
    """
    ignored = targets == ignore_index
    x = _final_logits(logits, ignored, temperature, scale, softcap)
    below, rest = _below_largest(x)
    log_sum = torch.log1p(rest)
    logps = below.gather(-1, targets.masked_fill(ignored, 0)[..., None])[..., 0] - log_sum
    finite = below.masked_fill(below == -math.inf, 0)
    entropies = log_sum - (below.exp() * finite).sum(-1) / (1 + rest)
    return logps.masked_fill(ignored, 0), entropies.masked_fill(ignored, 0)


def token_statistics(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1,
    scale: float = 1,
    softcap: float = 0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """sum_v p_v^2, the mean of x / temperature and whether no p_v is above that of the target.

    x and p as in token_logps; the mean is over the columns above -inf. Constants like targets, the
    last one bool. Ignored targets get 1, 0 and True, those of a single column.
    """
    ignored = targets == ignore_index
    x = _final_logits(logits.detach(), ignored, temperature, scale, softcap)
    present = x > -math.inf
    p = torch.softmax(x, -1)
    mean = torch.where(present, x, 0).sum(-1) / present.sum(-1)
    reached = x.gather(-1, targets.masked_fill(ignored, 0)[..., None])[..., 0]
    return (
        p.square().sum(-1).masked_fill(ignored, 1),
        mean.masked_fill(ignored, 0),
        (reached >= x.amax(-1)) | ignored,
    )


def _below_largest(x: Tensor) -> tuple[Tensor, Tensor]:
    """x less the largest of its row, and the sum of the exponentials of all others.

    The largest term, 1, is not added: what it is more than others keeps its digits. It is a
    constant: its gradient is minus the sum of the others', where its own terms would cancel.
    """
    largest = x.detach().argmax(-1, keepdim=True)
    top = x.gather(-1, largest)
    is_largest = torch.zeros_like(x, dtype=torch.bool).scatter(-1, largest, True)
    below = torch.where(is_largest, (top - top).detach(), x - top)
    return below, torch.where(is_largest, 0.0, below.exp()).sum(-1)


# Finite log-probabilities, and logits over the temperature, beyond this count as this.
_FARTHEST = {torch.float32: 2.0**110, torch.float64: 2.0**900}


def _log_softmax(logits: Tensor, inactive: Tensor | None, temperature: float) -> Tensor:
    """Of rows of zeros where inactive."""
    x = logits.to(_wide(logits.dtype))
    x = x.masked_fill(x == -math.inf, -math.inf)
    if inactive is not None:
        x = x.masked_fill(inactive[..., None], 0)
    largest = min(_FARTHEST[x.dtype] * temperature, torch.finfo(x.dtype).max)
    below, rest = _below_largest(saturated(x, largest) / temperature)
    return below - torch.log1p(rest)[..., None]


def _mass_beside(logps: Tensor) -> Tensor:
    """1 - sum exp(logps): what the largest leaves of 1, without loss, less the others."""
    if logps.shape[-1] == 0:
        return logps.new_ones(logps.shape[:-1])
    largest = logps.detach().argmax(-1, keepdim=True)
    others = logps.exp().scatter(-1, largest, 0.0).sum(-1)
    return -torch.expm1(logps.gather(-1, largest))[..., 0] - others


def _final_logits(
    logits: Tensor, ignored: Tensor, temperature: float, scale: float, softcap: float
) -> Tensor:
    """What the softmax is of; rows of zeros where ignored."""
    logits = logits.masked_fill(ignored[..., None], 0)
    absent, infinite = logits == -math.inf, logits == math.inf
    x = logits.to(_wide(logits.dtype)) * scale
    if softcap > 0:
        z = x.masked_fill(absent, 0) / softcap
        q = torch.exp(-2 * z.detach().abs())  # 1 - tanh^2 = 4 q / (1 + q)^2
        x = with_gradient_of(softcap * torch.tanh(z), softcap * (4 * q / (1 + q) ** 2) * z)
    largest = torch.finfo(x.dtype).max  # of finite ones; their products may overflow
    x = (x / temperature).clamp(-largest, largest)
    return x.masked_fill(absent, -math.inf).masked_fill(infinite, math.inf)


def categorical_kl(
    q_logits: Tensor, p_logits: Tensor, *, mask: Tensor | None = None, temperature: float = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """KL(q || p), KL(p || q) and H(q), q = softmax(q_logits / temperature); [..., V] to [...].

    KL(q || p) = sum_v q_v (log q_v - log p_v). Columns at -inf in both are not there; one at
    -inf in one of them adds nothing where the other is below 2^-100. Positions with mask False get
    zeros and no gradient.
    """

    def expectation(log_of, what):
        p = log_of.exp()
        nothing = (p == 0) | ((p < 2.0**-100) & what.isinf())
        return (p * what.masked_fill(nothing, 0)).sum(-1)

    inactive = None if mask is None else ~mask
    log_q, log_p = (_log_softmax(each, inactive, temperature) for each in (q_logits, p_logits))
    values = (
        expectation(log_q, log_q - log_p),
        expectation(log_p, log_p - log_q),
        -expectation(log_q, log_q),
    )
    return values if mask is None else tuple(each.masked_fill(~mask, 0) for each in values)


def top_k_kl(
    q_logits: Tensor,
    head_ids: Tensor,
    head_logps: Tensor,
    targets: Tensor | None = None,
    target_logps: Tensor | None = None,
    *,
    tail: str = "k3",
    temperature: float = 1,
    ignore_index: int = -100,
    precision: float = 2.0**-23,
) -> Tensor:
    """KL(q || p) from a head S of ids and one sample y of q for the tail; [..., V] to [...].

    With u = log q - log p and the tail masses Q, P, not below `precision`:
        B = sum_S q u + Q log(Q / P)
        k1: B + [y not in S] rho (u_y - log(Q / P)),  k3: B + [y not in S] rho k3(log(Q / P) - u_y)
    where rho = q_y / stop_gradient(q_y). Never negative but with k1. Ignored targets get 0. NaN or
    +inf among the log-probabilities makes the position NaN; -inf is a mass of 0.
    """
    shape = q_logits.shape[:-1]
    y = head_ids.new_zeros(shape) if targets is None else targets.to(torch.int64)
    ignored = torch.zeros_like(y, dtype=torch.bool) if targets is None else y == ignore_index
    log_softmax = _log_softmax(q_logits, ignored, temperature)
    farthest = _FARTHEST[log_softmax.dtype]
    head_logps = head_logps.to(log_softmax.dtype).masked_fill(ignored[..., None], 0)
    ids = head_ids.to(torch.int64).masked_fill(ignored[..., None], 0)
    y = y.masked_fill(ignored, 0)
    sound = ~log_softmax.isnan().any(-1) & (head_logps < math.inf).all(-1)
    head_logps = saturated(head_logps, farthest)

    log_q = log_softmax.gather(-1, ids)
    absent = log_q.exp() == 0
    u = (log_q - head_logps).masked_fill(absent, 0)
    q_mass, p_mass = (_mass_beside(each).clamp_min(precision) for each in (log_q, head_logps))
    gap = q_mass.log() - p_mass.log()
    kl = (log_q.exp() * u).sum(-1) + q_mass * gap
    if tail != "bucket":
        log_q_y = log_softmax.gather(-1, y[..., None])[..., 0]
        target_logps = target_logps.to(log_softmax.dtype).masked_fill(ignored, 0)
        sound = sound & (target_logps < math.inf)
        held = log_q_y.detach()
        d = saturated(target_logps, farthest) - held + gap
        if tail == "k1":
            sampled = (log_q_y - held).exp() * (log_q_y - held - d)
        else:
            # The derivative of rho k3 by log q_y, k3(d) - expm1(d), is -d.
            sampled = k3(d) - torch.where(d.isfinite(), d, 0.0).detach() * (log_q_y - held)
        inside = (ids == y[..., None]).any(-1)
        kl = kl + torch.where(inside, 0, sampled)
    if tail != "k1":
        kl = kl - kl.detach().clamp_max(0)
    return (kl * spoiling(sound | ignored, kl)).masked_fill(ignored, 0)
