"""Preference losses of pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tether._checks import savable
from tether.reference.numbers import (
    Number,
    saturated,
    wide_dtype,
    with_gradient_of,
    with_slope,
)
from tether.reference.rows import Rows

# g_c and g_r are the linked scores of the chosen and the rejected answer, x = beta (g_c - g_r). As
# the derivative is a product, not a sum of parts, an infinite upstream gradient makes no NaN of it.


_LARGEST_VALUE = 1e300  # what is beyond counts as this


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


def forward_kl(score: Tensor) -> Tensor:
    """-e^-S, saturated at 40. Wang et al. 2023, arXiv:2309.16240, table 1."""
    return -torch.exp(with_gradient_of((-score).clamp(-40, 40), -score))


def alphapo(score: Tensor, *, alpha: Number = 0.25) -> Tensor:
    """(1 - e^(-alpha S)) / alpha, saturated at 40; S at alpha 0. Gupta et al., arXiv:2501.03884."""
    alpha = torch.as_tensor(alpha, dtype=score.dtype, device=score.device)
    straight = alpha.abs() < 1e-150
    bent = with_gradient_of((-alpha * score).clamp(-40, 40), -alpha * score)
    return torch.where(straight, score, torch.expm1(bent) / -torch.where(straight, 1.0, alpha))


# Of an f-divergence in place of the reverse KL: arXiv:2309.16240, table 1.
LINKS = {
    "reverse_kl": lambda score: score,
    "forward_kl": forward_kl,
    "js": torch.nn.functional.logsigmoid,
    "alphapo": alphapo,
}


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
    wide = wide_dtype(logps.dtype)
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
    of_link, options = _of_link(options)
    linked = (LINKS[link](each, **of_link) for each in (chosen, rejected))
    each = row.loss(*linked, beta, **row.options | options)
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
        policies = logp_sums[:half], logp_sums[half:]
        metrics = [*_metrics(each, chosen, rejected, beta), *policies, (~finite).double()]
        values = torch.stack([torch.where(present, metric, 0.0).sum() for metric in metrics])
        sums = torch.stack([values, count.expand_as(values)], 1)
    return PreferenceTotals(loss.to(wide), sums)


def _of_link(options: dict[str, Number]) -> tuple[dict[str, Number], dict[str, Number]]:
    """Options of the link, by the names that it has for them, and the others."""
    of_link = {k.removeprefix("link_"): v for k, v in options.items() if k.startswith("link_")}
    return of_link, {k: v for k, v in options.items() if not k.startswith("link_")}


def _metrics(each: Tensor, chosen: Tensor, rejected: Tensor, beta: Number) -> list[Tensor]:
    """Of every pair, the first ones in the order of preference_metrics.h."""
    rewards = [beta * chosen, beta * rejected, beta * (chosen - rejected)]
    rewards = [reward.clamp(-_LARGEST_VALUE, _LARGEST_VALUE) for reward in rewards]
    return [each, *rewards, (rewards[2] > 0).double()]
