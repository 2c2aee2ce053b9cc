"""Weights W of tokens; `of` makes a statistic of a level from what a token measures."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tether._checks import savable
from tether.reference.numbers import Number, clamp, exp
from tether.reference.rows import Rows, Tokens, selected_tokens


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

_WEIGHT_LEVELS = ("token", "sequence_mean", "sequence_sum", "sequence_min", "sequence_max")


def chosen_weights(
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


def kept_tokens(rows: Rows, arrays: tuple, weights: list) -> tuple[Tokens, Tensor]:
    """The tokens that no weight takes out, and the weights of each row."""
    tokens = selected_tokens(rows, *arrays)
    n = rows.sum(tokens.weight.double())
    gates = [each for each in weights if each[0].leaves]
    if not gates:
        return tokens, n
    gate = product_of_weights(rows, tokens, n, gates)
    weight = torch.where(gate == 0, 0.0, tokens.weight + 0 * gate)  # NaN stays in it
    tokens = selected_tokens(rows._replace(broken=None), *arrays[:2], weight, *arrays[3:])
    return tokens, rows.sum(weight.double())


def product_of_weights(rows: Rows, tokens: Tokens, n: Tensor, weights: list) -> Tensor:
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
