"""How far the trainer's policy is from the engine that sampled (estimators/kl/mismatch.h)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tether.reference.kl import k3
from tether.reference.rows import Rows

_LARGEST, _LARGEST_SUM = 300.0, 1e140


def _bounded(x: Tensor, largest: float = _LARGEST) -> Tensor:
    """Within the bounds; NaN where x is not finite."""
    return x.clamp(-largest, largest) + 0 * x


def _spread(weight: Tensor, log_ratio: Tensor) -> list[Tensor]:
    """Mean, least, largest, chi^2 and effective share of the ratios, each by its weight."""
    r = torch.exp(_bounded(log_ratio))
    count, seen = weight.sum(), weight != 0
    r_of = torch.where(seen, r, 0.0)
    total, squares = (weight * r_of).sum(), (weight * r_of.square()).sum()
    ends = [torch.where(seen, each, -math.inf).reshape(-1) for each in (-r, r, log_ratio)]
    least, largest, top = (torch.cat([each, each.new_zeros(1) - math.inf]).max() for each in ends)
    # In units of the largest ratio, however far it is; 0 * total: NaN where a ratio is none.
    unit = weight * torch.exp(torch.where(seen, log_ratio - top, -math.inf))
    of_squares = (unit * unit / torch.where(seen, weight, 1.0)).sum()
    ess = (unit.sum() * (unit.sum() / count) / of_squares).clamp_max(1) + 0 * total
    return [total / count, -least, largest, squares / count - 1, ess]


def mismatch_report(
    old_logps: Tensor, rollout_logps: Tensor, response_mask: Tensor, *, offsets: Tensor | None
) -> Tensor:
    """[23] float64: the numbers of tether.MismatchReport in its order, of each level after the
    others. Nothing waits for a device."""
    rows = Rows.of("mismatch_report", "old_logps", old_logps, offsets)
    weight = rows.weights(response_mask, torch.float64)
    arrays = (old_logps, rollout_logps)
    logp, rollout_logp = (torch.where(weight != 0, each.double(), 0.0) for each in arrays)
    x = logp - rollout_logp
    n = rows.sum(weight)
    is_row = (n > 0).double()

    def mean(terms: Tensor) -> Tensor:
        return (weight * terms).sum() / weight.sum()

    def row_means(terms: Tensor) -> Tensor:
        return rows.sum(weight * terms) / torch.where(n > 0, n, 1.0)

    def perplexity(logps: Tensor) -> Tensor:
        return (is_row * torch.exp(_bounded(-row_means(logps)))).sum() / is_row.sum()

    gap = (torch.exp(logp) - torch.exp(rollout_logp)).abs() + 0 * x
    out = [weight.sum(), is_row.sum(), mean(_bounded(-x, _LARGEST_SUM)), mean(k3(_bounded(x)))]
    out += [perplexity(logp), perplexity(rollout_logp), mean(gap)]
    largest = torch.cat([gap.reshape(-1), gap.new_zeros(1)]).max()
    out += [largest + 0 * largest]  # infinity is NaN
    out += _spread(weight, x)
    out += _spread(is_row, row_means(x))
    out += _spread(is_row, rows.sum(weight * x))
    every = torch.stack(out)
    return torch.where(every[0] == 0, 0.0, every)
