"""Losses of pairs and of answers with labels, by their scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from tether.reference.numbers import (
    Number,
    number_beside,
    with_gradient_of,
    with_scaled_gradient,
    with_slope,
)

# x = beta (g_c - g_r), of linked scores above baselines. The slopes of losses are written out:
# torch would add up those of the parts, which for an infinite upstream gradient is NaN.


LARGEST_VALUE = 1e300  # what is beyond counts as this


def _reward(score: Tensor, beta: Number) -> Tensor:
    x = score.detach() * beta
    return x.clamp(-LARGEST_VALUE, LARGEST_VALUE) + beta * (score - score.detach())


def double(number: Number, like: Tensor) -> Tensor:
    """In float64, which torch does not take for a Python number by itself."""
    return number_beside(number, like, torch.float64)


class Pair(NamedTuple):
    """Scores of two answers after the link, above their baselines."""

    chosen: Tensor
    rejected: Tensor
    beta: Number

    @property
    def gap(self) -> Tensor:
        return self.chosen - self.rejected

    @property
    def margin(self) -> Tensor:
        return _reward(self.gap, self.beta)

    @property
    def rewards(self) -> tuple[Tensor, Tensor]:
        """Of each answer alone."""
        return _reward(self.chosen, self.beta), _reward(self.rejected, self.beta)


class LabelledAnswer(NamedTuple):
    """The score of one answer, and whether it is a good one."""

    score: Tensor
    label: Tensor
    beta: Number

    @property
    def reward(self) -> Tensor:
        return _reward(self.score, self.beta)


def dpo(pair: Pair, *, label_smoothing: Number = 0.0) -> Tensor:
    """-(1 - e) log sigmoid(x) - e log sigmoid(-x).

    DPO, arXiv:2305.18290, eq. 7; with label smoothing e: ericmitchell.ai/cdpo.pdf.
    """
    x = pair.margin
    log_sigmoid = torch.nn.functional.logsigmoid
    value = -(1 - label_smoothing) * log_sigmoid(x) - label_smoothing * log_sigmoid(-x)
    return with_slope(value, label_smoothing - torch.sigmoid(-x), x)


def ipo(pair: Pair) -> Tensor:
    """(g_c - g_r - 1 / (2 beta))^2. arXiv:2310.12036, eq. 17."""
    beta = pair.beta
    beta = beta.double().clamp(min=1e-290) if isinstance(beta, Tensor) else max(beta, 1e-290)
    gap = pair.gap - 1 / (2 * beta)
    return with_slope((gap**2).clamp(max=LARGEST_VALUE), 2 * gap, gap)


def hinge(pair: Pair) -> Tensor:
    """max(0, 1 - x). arXiv:2309.06657, eq. 9."""
    x = pair.margin
    slope = torch.where(x < 1, -1.0, torch.zeros_like(x))  # that of relu would hide NaN
    return with_gradient_of(torch.relu(1 - x), with_scaled_gradient(x, slope))


def robust(pair: Pair, *, label_smoothing: Number = 0.1) -> Tensor:
    """-log sigmoid(x) - e / (1 - 2 e) x. rDPO, arXiv:2403.00409."""
    x, correction = pair.margin, label_smoothing / (1 - 2 * label_smoothing)
    value = -torch.nn.functional.logsigmoid(x) - correction * x
    return with_slope(value, -torch.sigmoid(-x) - correction, x)


def exo_pair(pair: Pair, *, label_smoothing: Number = 1e-3) -> Tensor:
    """KL(Bernoulli(sigmoid(x)) || Bernoulli(1 - e)). arXiv:2402.00856, eq. 16."""
    x, e = pair.margin, double(label_smoothing, pair.margin)
    q, other, log_sigmoid = torch.sigmoid(x), torch.sigmoid(-x), torch.nn.functional.logsigmoid
    value = q * (log_sigmoid(x) - torch.log1p(-e)) + other * (log_sigmoid(-x) - torch.log(e))
    return with_slope(value, q * other * (x + torch.log(e) - torch.log1p(-e)), x)


def nca_pair(pair: Pair) -> Tensor:
    """-log sigmoid(u_c) - 1/2 log sigmoid(-u_c) - 1/2 log sigmoid(-u_r). arXiv:2402.05369."""
    chosen, rejected = pair.rewards
    value = 0.5 * chosen - 1.5 * torch.nn.functional.logsigmoid(chosen)
    of_chosen = with_slope(value, 0.5 - 1.5 * torch.sigmoid(-chosen), chosen)
    value = -0.5 * torch.nn.functional.logsigmoid(-rejected)
    return of_chosen + with_slope(value, 0.5 * torch.sigmoid(rejected), rejected)


def bco_pair(pair: Pair) -> Tensor:
    """-log sigmoid(u_c) - log sigmoid(-u_r). arXiv:2404.04656."""
    chosen, rejected = pair.rewards
    log_sigmoid = torch.nn.functional.logsigmoid
    of_chosen = with_slope(-log_sigmoid(chosen), -torch.sigmoid(-chosen), chosen)
    return of_chosen + with_slope(-log_sigmoid(-rejected), torch.sigmoid(rejected), rejected)


def sppo_hard(pair: Pair) -> Tensor:
    """(h_c - 1 / (2 beta))^2 + (h_r + 1 / (2 beta))^2. arXiv:2405.00675, eq. 4.7."""
    beta = pair.beta
    beta = beta.double().clamp(min=1e-290) if isinstance(beta, Tensor) else max(beta, 1e-290)
    above, below = pair.chosen - 1 / (2 * beta), pair.rejected + 1 / (2 * beta)
    squares = ((each**2).clamp(max=LARGEST_VALUE) for each in (above, below))
    return sum(
        with_slope(square, 2 * each, each)
        for square, each in zip(squares, (above, below), strict=True)
    )


def apo_zero(pair: Pair) -> Tensor:
    """1 - sigmoid(u_c) + sigmoid(u_r). arXiv:2408.06266, eq. 7."""
    chosen, rejected = pair.rewards
    of_chosen = with_slope(torch.sigmoid(-chosen), -_sigmoid_slope(chosen), chosen)
    return of_chosen + with_slope(torch.sigmoid(rejected), _sigmoid_slope(rejected), rejected)


def apo_down(pair: Pair) -> Tensor:
    """sigmoid(u_c) + 1 - sigmoid(x). arXiv:2408.06266, eq. 8."""
    (chosen, rejected), x = pair.rewards, pair.margin
    value, slope = torch.sigmoid(chosen) + torch.sigmoid(-x), _sigmoid_slope(x)
    of_chosen = with_slope(value, _sigmoid_slope(chosen) - slope, chosen)
    return of_chosen + with_slope(torch.zeros_like(value), slope, rejected)


def _sigmoid_slope(x: Tensor) -> Tensor:
    return torch.sigmoid(x) * torch.sigmoid(-x)


def discopop(pair: Pair, *, tau: Number = 0.05) -> Tensor:
    """(1 - m) -log sigmoid(x) + m e^-x, m = sigmoid(x / tau). arXiv:2406.08414, eq. 5."""
    x, log_sigmoid = pair.margin, torch.nn.functional.logsigmoid
    y = x * (1 / tau)
    right, wrong = torch.exp(log_sigmoid(y) - x), torch.sigmoid(-y)
    slope = right * (torch.sigmoid(-y) / tau - 1) - wrong * torch.sigmoid(-x)
    slope = slope + torch.sigmoid(y) * torch.sigmoid(-y) / tau * log_sigmoid(x)
    return with_slope(right - wrong * log_sigmoid(x), slope, x)


def kto(
    answer: LabelledAnswer, *, desirable_weight: Number = 1.0, undesirable_weight: Number = 1.0
) -> Tensor:
    """w (1 - sigmoid(+-u)), u = beta (g - baseline). arXiv:2402.01306, eq. 8."""
    u, good = answer.reward, answer.label > 0.5
    sign = torch.where(good, 1.0, -1.0)
    weight = torch.where(good, double(desirable_weight, u), double(undesirable_weight, u))
    slope = -sign * torch.sigmoid(u) * torch.sigmoid(-u)
    return with_slope(weight * torch.sigmoid(-sign * u), weight * slope, u)


@dataclass(frozen=True)
class PreferenceRow:
    loss: Callable[..., Tensor]
    options: dict[str, float] = field(default_factory=dict)  # its own; of OPTIONS what differs
    choices: dict[str, str] = field(default_factory=dict)
    takes_labels: bool = False


PREFERENCES = {
    "dpo": PreferenceRow(dpo, {"label_smoothing": 0.0}),
    "cdpo": PreferenceRow(dpo, {"label_smoothing": 0.1}),
    "ipo": PreferenceRow(ipo, choices={"score": "mean"}),
    "hinge": PreferenceRow(hinge),
    "robust": PreferenceRow(robust, {"label_smoothing": 0.1}),
    "exo_pair": PreferenceRow(exo_pair, {"label_smoothing": 1e-3}),
    "nca_pair": PreferenceRow(nca_pair),
    "bco_pair": PreferenceRow(bco_pair),
    "sppo_hard": PreferenceRow(sppo_hard),
    "apo_zero": PreferenceRow(apo_zero),
    "apo_down": PreferenceRow(apo_down),
    "discopop": PreferenceRow(discopop, {"tau": 0.05}),
    "orpo": PreferenceRow(
        dpo,
        {"label_smoothing": 0.0, "beta": 1.0, "loss_weight": 0.1, "nll_coef": 1.0},
        {"score": "mean", "reference": "false", "link": "log_odds"},
    ),
    "kto": PreferenceRow(
        kto, {"desirable_weight": 1.0, "undesirable_weight": 1.0}, takes_labels=True
    ),
}
