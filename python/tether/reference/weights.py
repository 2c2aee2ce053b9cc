"""Weights W of tokens; `of` makes a statistic of a level from what a token measures."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tether._checks import savable
from tether.reference.kl import k2, k3
from tether.reference.numbers import Number, clamp, exp
from tether.reference.rows import Batch, Rows, Tokens, segments_of, selected_tokens


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
    return _within(ratio, low, high)


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


def bernoulli_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(Bernoulli(p) || Bernoulli(q)); 1e-8 is added to the chances of the others."""
    a, b = log_p.clamp_max(0), log_q.clamp_max(0)
    other_p, other_q = -torch.expm1(a), -torch.expm1(b)
    return exp(a) * (a - b) + other_p * (torch.log(other_p + 1e-8) - torch.log(other_q + 1e-8))


def kl_mask(
    tokens: Tokens, of: Callable[[Tensor], Tensor], *, low: Number = 0.05, high: Number = 0.05
) -> Tensor:
    """1 where the binary KL is at most high (A > 0) or low, or moving back. arXiv:2602.04879."""
    x = of(bernoulli_kl(tokens.old_logp, tokens.logp))
    of_good = (tokens.logp > tokens.old_logp) & (x > high)
    of_bad = (tokens.logp < tokens.old_logp) & (x > low)
    return (~torch.where(tokens.advantage > 0, of_good, of_bad)).to(x.dtype)


def tv_band(tokens: Tokens, of: Callable[[Tensor], Tensor], *, high: Number = 0.1) -> Tensor:
    """1 where |e^logp - e^old_logp| <= high. prime-rl's ipo."""
    return _at_most(of((exp(tokens.logp) - exp(tokens.old_logp)).abs()), high)


def clip_mask(
    tokens: Tokens,
    of: Callable[[Tensor], Tensor],
    *,
    epsilon_low: Number = 0.2,
    epsilon_high: Number = 0.2,
) -> Tensor:
    """1 where PPO's clip leaves a gradient. arXiv:2509.24203."""
    ratio = exp(of(tokens.logp - tokens.old_logp))
    beyond = (tokens.advantage > 0) & (ratio > 1 + epsilon_high)
    beyond = beyond | (tokens.advantage < 0) & (ratio < 1 - epsilon_low)
    return (~beyond).to(ratio.dtype)


def ring_mask(
    tokens: Tokens,
    of: Callable[[Tensor], Tensor],
    *,
    epsilon_low: Number = 0.2,
    epsilon_high: Number = 0.2,
    far_low: Number = 0.4,
    far_high: Number = 0.4,
) -> Tensor:
    """1 where the ratio is near 1, or far on the wrong side. arXiv:2509.24203."""
    ratio = exp(of(tokens.logp - tokens.old_logp))
    near = (ratio >= 1 - epsilon_low) & (ratio <= 1 + epsilon_high)
    good = (tokens.advantage > 0) & (ratio <= 1 - far_low)
    bad = (tokens.advantage < 0) & (ratio >= 1 + far_high)
    return (near | good | bad).to(ratio.dtype)


def masked_ratio(
    tokens: Tokens, of: Callable[[Tensor], Tensor], *, low: Number = 0.5, high: Number = 2
) -> Tensor:
    """ratio where low <= ratio <= high, else 0. SkyRL's rollout_is."""
    ratio = exp(of(tokens.logp - tokens.old_logp))
    return _within(ratio, low, high)


def soft_sequence(
    tokens: Tokens,
    of: Callable[[Tensor], Tensor],
    *,
    k_pos: Number = 2,
    lambda_pos: Number = 3,
    k_neg: Number = 3,
    lambda_neg: Number = 2,
) -> Tensor:
    """rho^k e^(lambda (1 - rho)), k and lambda by the sign of A. VESPO, arXiv:2602.10693."""
    x = of(tokens.logp - tokens.old_logp)
    u = x.clamp(-1e30, 60)
    beyond = 1 - exp(u)
    bad, good = u * k_neg + beyond * lambda_neg, u * k_pos + beyond * lambda_pos
    return _exp_or_zero(torch.where(tokens.advantage < 0, bad, good).clamp_max(60))


def off_policy_mask(
    tokens: Tokens, of: Callable[[Tensor], Tensor], *, high: Number = 0.5
) -> Tensor:
    """0 where A < 0 and x > high, x = old_logp - logp. DeepSeek-V3.2, arXiv:2512.02556."""
    x = of(tokens.old_logp - tokens.logp)
    return (~((tokens.advantage < 0) & (x > high))).to(x.dtype)


def uncertainty(tokens: Tokens, of: Callable[[Tensor], Tensor]) -> Tensor:
    """p (1 - p), p = e^logp. CHORD, arXiv:2508.11408."""
    x = of(tokens.logp.clamp_max(0))
    return _exp_or_zero(x) * -torch.expm1(x)


def self_distillation(
    tokens: Tokens, of: Callable[[Tensor], Tensor], *, mix: Number = 0.5, epsilon: Number = 0.2
) -> Tensor:
    """1 - mix + mix clip(e^(sign(A) x), 1 -+ epsilon), x = ref_logp - logp. arXiv:2604.03128."""
    x = of(tokens.ref_logp - tokens.logp)
    gain = exp(torch.sign(tokens.advantage) * x)
    return clamp(gain, 1 - epsilon, 1 + epsilon) * mix + (1 - mix)


def k2_gate(tokens: Tokens, of: Callable[[Tensor], Tensor], *, high: Number = 0.5) -> Tensor:
    """1 where x^2 / 2 <= high, x = old_logp - rollout_logp; else out of the mask. verl's k2."""
    return _at_most(of(k2(tokens.old_logp - tokens.rollout_logp)), high)


def k3_gate(tokens: Tokens, of: Callable[[Tensor], Tensor], *, high: Number = 0.5) -> Tensor:
    """1 where e^x - 1 - x <= high, x = old_logp - rollout_logp; else out of the mask. verl's k3."""
    return _at_most(of(k3(tokens.old_logp - tokens.rollout_logp)), high)


def tv_gate(tokens: Tokens, of: Callable[[Tensor], Tensor], *, high: Number = 0.2) -> Tensor:
    """1 where |e^old_logp - e^rollout_logp| <= high, else out of the mask. ROLL, OpenRLHF."""
    return _at_most(of((exp(tokens.old_logp) - exp(tokens.rollout_logp)).abs()), high)


def binary_kl_gate(
    tokens: Tokens, of: Callable[[Tensor], Tensor], *, high: Number = 0.05
) -> Tensor:
    """1 where the binary KL of engine and trainer is at most high, else out of the mask."""
    return _at_most(of(bernoulli_kl(tokens.rollout_logp, tokens.old_logp)), high)


def ratio_tv_gate(tokens: Tokens, of: Callable[[Tensor], Tensor], *, high: Number = 0.2) -> Tensor:
    """1 where mean |min(e^x, 2) - 1| <= high, else out of the mask. open-instruct."""
    ratio = exp(tokens.old_logp - tokens.rollout_logp)
    return _at_most(of((ratio.clamp_max(2) - 1).abs()), high)


def _within(ratio: Tensor, low: Number, high: Number) -> Tensor:
    return torch.where((ratio < low) | (ratio > high), 0.0, ratio)


def _exp_or_zero(x: Tensor) -> Tensor:
    """e^x, and 0 where exp() of float32 would no longer fall."""
    return torch.where(x < -60, 0.0, exp(x))


def _at_most(x: Tensor, high: Number) -> Tensor:
    return (x <= high).to(x.dtype)


class Weight(NamedTuple):
    formula: Callable[..., Tensor]
    reads: tuple[str, ...]  # beside old_logp and advantage
    leaves: bool = False  # what it takes out is out of the mask


WEIGHTS = {
    "truncated_importance": Weight(truncated_importance, ("rollout_logp",)),
    "masked_importance": Weight(masked_importance, ("rollout_logp",)),
    "ratio_gate": Weight(ratio_gate, ("rollout_logp",), leaves=True),
    "tv_mask": Weight(tv_mask, ("logp",)),
    "kl_mask": Weight(kl_mask, ("logp",)),
    "tv_band": Weight(tv_band, ("logp",)),
    "clip_mask": Weight(clip_mask, ("logp",)),
    "ring_mask": Weight(ring_mask, ("logp",)),
    "masked_ratio": Weight(masked_ratio, ("logp",)),
    "vespo": Weight(soft_sequence, ("logp",)),
    "opsm": Weight(off_policy_mask, ("logp",)),
    "uncertainty": Weight(uncertainty, ("logp",)),
    "self_distillation": Weight(self_distillation, ("logp", "ref_logp")),
    "k2_gate": Weight(k2_gate, ("rollout_logp",), leaves=True),
    "k3_gate": Weight(k3_gate, ("rollout_logp",), leaves=True),
    "tv_gate": Weight(tv_gate, ("rollout_logp",), leaves=True),
    "binary_kl_gate": Weight(binary_kl_gate, ("rollout_logp",), leaves=True),
    "ratio_tv_gate": Weight(ratio_tv_gate, ("rollout_logp",), leaves=True),
}

# Of each level: the tokens that share a statistic, and what is made of their measures.
WEIGHT_LEVELS = {"token": ("token", "sum")} | {
    f"{name}_{reduction}": (segment, reduction)
    for name, segment in (("sequence", "row"), ("turn", "turn"))
    for reduction in ("mean", "sum", "min", "max")
}


def chosen_weights(options: dict, batch: Batch) -> list[tuple[Weight, str, dict[str, Number]]]:
    """Takes the weights out of the options: each with its level and options of its own."""
    out = []
    for name, row in WEIGHTS.items():
        level = options.pop(name, "none")
        if level == "none":
            continue
        if level not in WEIGHT_LEVELS:
            raise ValueError(
                f"policy_loss: {name} must be one of {', '.join(('none', *WEIGHT_LEVELS))}, got "
                f'"{level}"'
            )
        prefix = f"{name}."
        dotted = [each for each in options if each.startswith(prefix)]
        own = {each.removeprefix(prefix): options.pop(each) for each in dotted}
        for array in (*(["old_logp"] if row.leaves else []), *row.reads):
            if getattr(batch, f"{array}s") is None:
                raise ValueError(
                    f"policy_loss: {array}s must be given for the weight {name}, got none"
                )
        out.append((row, level, {key: savable(value) for key, value in own.items()}))
    return out


def kept_tokens(rows: Rows, batch: Batch, weights: list) -> tuple[Tokens, Tensor]:
    """The tokens that no weight takes out, and the weights of each row."""
    tokens = selected_tokens(rows, batch)
    n = rows.sum(tokens.weight.double())
    gates = [each for each in weights if each[0].leaves]
    if not gates:
        return tokens, n
    gate = product_of_weights(rows, tokens, n, batch, gates)
    weight = torch.where(gate == 0, 0.0, tokens.weight + 0 * gate)  # NaN stays in it
    kept = batch._replace(response_mask=weight)
    tokens = selected_tokens(rows._replace(broken=None), kept)
    return tokens, rows.sum(weight.double())


def product_of_weights(
    rows: Rows, tokens: Tokens, n: Tensor, batch: Batch, weights: list
) -> Tensor:
    """W, the product of the weights; 1 in masked slots. Turns are those of the caller's mask."""
    with torch.no_grad():
        out = torch.ones_like(tokens.logp)
        for row, level, options in weights:
            segment, reduction = WEIGHT_LEVELS[level]
            shared = segments_of(rows, tokens, n, segment, batch.response_mask, batch.turn_ids)
            by_token = segment == "token"
            of = (
                _unchanged
                if by_token
                else functools.partial(_statistic, *shared, tokens, reduction)
            )
            trace = 0 * (tokens.old_logp + 0 * tokens.advantage)
            for each in row.reads:
                trace = trace + 0 * getattr(tokens, each)
            # NaN where something that it reads is not finite: the formula may hide it.
            out = out * (row.formula(tokens, of, **options) + of(trace))
        return torch.where(tokens.active(), out, 1.0)


def _unchanged(x: Tensor) -> Tensor:
    return x


def _statistic(segments: Rows, n: Tensor, tokens: Tokens, reduction: str, x: Tensor) -> Tensor:
    """Of the active tokens of a segment, at each of its tokens. The extremes have the sum's NaN."""
    total = segments.sum(tokens.weight.double() * torch.where(tokens.active(), x, 0.0).double())
    if reduction == "sum":
        found = total
    elif reduction == "mean":
        found = total / n
    else:
        sign = 1.0 if reduction == "max" else -1.0
        seen = torch.where(tokens.active(), sign * x.double(), -math.inf)
        found = sign * segments.largest(seen, -math.inf) + 0 * total
    return segments.spread(found).to(x.dtype).expand_as(x)
