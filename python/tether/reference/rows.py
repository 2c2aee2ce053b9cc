"""Rows of tokens, what they sum to, and the ratios that their tokens share."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tether._checks import savable
from tether._values import check_offset_values
from tether.reference.numbers import (
    LARGEST_INPUT,
    Number,
    clamp,
    saturated,
    wide_dtype,
    widened,
    with_gradient_of,
    with_scaled_gradient,
    within,
)


class Rows(NamedTuple):
    """Which row each token belongs to: padded [B, T], or packed [N] with its row indices; or which
    turn, with those of turns."""

    count: int  # at least as many as there are
    index: Tensor | None = None  # not of padded rows
    broken: Tensor | None = None  # packed: whether the offsets are not those of these tokens

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
        flat = self.index.reshape(-1), tokens.reshape(-1)
        return tokens.new_zeros(self.count).index_add(0, *flat)

    def largest(self, tokens: Tensor, least: float = 0) -> Tensor:
        """Of each row; `least` where that is larger."""
        if self.index is None:
            return torch.cat([tokens, tokens.new_full((tokens.shape[0], 1), least)], 1).amax(1)
        none = tokens.new_full((self.count,), least)
        return none.scatter_reduce(0, self.index.reshape(-1), tokens.reshape(-1), "amax")

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
    lengths: Tensor | None = None,
    constant: float = 1,
    tokens: float | Tensor | None = None,
    sequences: float | Tensor | None = None,
) -> Tensor:
    """What the terms w x of each row are multiplied by before they are summed.

    With n_i = sum_t w_it, tokens = sum_i n_i and sequences = rows with n_i > 0, of the whole step;
    1 / n_i alone takes `lengths` instead, where given:

      token_mean                   1 / tokens                       DAPO, arXiv:2503.14476, eq. 12
      sequence_mean_token_mean     1 / (sequences n_i)              GRPO, arXiv:2402.03300, eq. 3
      sequence_mean_token_sum      1 / sequences                    RLOO, arXiv:2402.14740
      sequence_sum_over_constant   1 / (sequences constant)         Dr. GRPO, arXiv:2503.20783
      token_sum                    1                                scaled by the caller
    """
    tokens = row_tokens.sum() if tokens is None else tokens
    sequences = (row_tokens > 0).sum() if sequences is None else sequences
    one = torch.ones_like(row_tokens)
    count, size = {
        "token_mean": (one * tokens, one),
        "sequence_mean_token_mean": (
            one * sequences,
            row_tokens if lengths is None else lengths.double(),
        ),
        "sequence_mean_token_sum": (one * sequences, one),
        "sequence_sum_over_constant": (one * sequences, one * constant),
        "token_sum": (one, one),
    }[aggregation]
    # A row with tokens whose denominator from the caller is no positive number spoils the loss.
    legal = (count * size > 0) & count.isfinite() & size.isfinite()
    otherwise = torch.where(row_tokens > 0, math.nan, 0.0)
    return torch.where(legal, 1 / (count * size), otherwise)


def of_loss(factors: Tensor, *scales: Number) -> Tensor:
    """Factors of rows times those of the whole loss, within bounds: infinity times 0 is NaN."""
    product = factors.new_ones(())
    for scale in scales:
        product = within(product * scale)
    return within(product * within(factors))


class Level(NamedTuple):
    segment: str  # the tokens that share a log-ratio: one alone, those of a row or of a turn
    is_mean: bool = False  # over n, else the sum
    shared: bool = False  # with its gradient, else as a constant beside the token's own


LEVELS = {
    "token": Level("token"),
    "sequence_mean": Level("row", is_mean=True, shared=True),
    "sequence_token": Level("row", is_mean=True),
    "sequence_sum": Level("row", shared=True),
    "turn_mean": Level("turn", is_mean=True, shared=True),
    "turn_token": Level("turn", is_mean=True),
    "turn_sum": Level("turn", shared=True),
}


class SharedRatio(NamedTuple):
    """How the tokens of a segment share a log-ratio: d log_ratio / d logp is w for the sum, w / n
    for the mean. With is_aggregated the terms of a segment are added up with weights w."""

    rows: Rows  # or turns
    weight: Tensor
    n: Tensor  # weights of each segment
    over: Tensor  # 1, or n, at each token
    is_aggregated: bool

    @staticmethod
    def of(rows: Rows, weight: Tensor, n: Tensor, level: Level, is_aggregated: bool):
        if not level.shared:
            return None
        over = torch.where(n > 0, n, 1.0) if level.is_mean else torch.ones_like(n)
        return SharedRatio(rows, weight.double(), n, rows.spread(over), is_aggregated)

    def share(self) -> Tensor:
        return self.weight / self.over

    def is_alone(self) -> Tensor:
        return self.rows.spread(self.n) == self.weight

    def of_others(self, terms: Tensor) -> Tensor:
        """What the segment's other tokens give a token by way of the ratio."""
        rest = self.rows.sum_of_others(self.weight * terms.double())
        return (rest / self.over).to(terms.dtype)


_LARGEST_WEIGHT = {torch.float64: 1e40, torch.float32: 1e12}


class Batch(NamedTuple):
    """The arrays of a policy loss."""

    logps: Tensor
    advantages: Tensor
    response_mask: Tensor
    old_logps: Tensor | None = None
    ref_logps: Tensor | None = None
    entropies: Tensor | None = None
    rollout_logps: Tensor | None = None
    turn_ids: Tensor | None = None
    token_weights: Tensor | None = None
    kl_weights: Tensor | None = None
    entropy_weights: Tensor | None = None
    row_tokens: Tensor | None = None
    offsets: Tensor | None = None

    @staticmethod
    def of(logps: Tensor, advantages: Tensor, response_mask: Tensor, options: dict) -> Batch:
        """Takes the further arrays out of the options."""
        names = [name for name in Batch._fields if name in options]
        return Batch(
            logps, advantages, response_mask, **{name: options.pop(name) for name in names}
        )


class Tokens(NamedTuple):
    """What a loss sees of its tokens: 0 where the weight is 0, whatever was there."""

    weight: Tensor
    logp: Tensor
    old_logp: Tensor
    advantage: Tensor
    ref_logp: Tensor
    rollout_logp: Tensor
    entropy: Tensor
    token_weight: Tensor  # of S, K and H; 1 where none were given
    kl_weight: Tensor
    entropy_weight: Tensor

    def active(self) -> Tensor:
        return self.weight != 0


class Factors(NamedTuple):
    """Of the terms of each row in a policy loss, float64."""

    policy: Tensor
    kl: Tensor
    entropy: Tensor


def with_factors(
    rows: Rows, tokens: Tokens, factors: Factors | None, level: Level, is_own: bool
) -> tuple[Tokens, Tokens, Tokens]:
    """Those of the surrogate, of the penalty and of the entropies, with masks and the factors of
    the loss in their gradients. Where a ratio is shared, the mask is in what adds up before."""
    if factors is None:
        return tokens, tokens, tokens
    weight, logp = tokens.weight, tokens.logp
    policy, kl, entropy = (within(rows.spread(each), weight.dtype) for each in factors)
    of_policy = policy if level.shared else weight * policy
    return (
        tokens if is_own else tokens._replace(logp=with_scaled_gradient(logp, of_policy)),
        tokens._replace(logp=with_scaled_gradient(logp, weight * kl)),
        tokens._replace(entropy=with_scaled_gradient(tokens.entropy, weight * entropy)),
    )


def with_weights(source: Tensor, mask: Tensor | None, weight: Tensor) -> Tensor:
    """With the mask and then the weights in its gradient, each within bounds."""
    source = source if mask is None else with_scaled_gradient(source, mask)
    return with_scaled_gradient(source, weight)


def selected_tokens(rows: Rows, batch: Batch) -> Tokens:
    wide = wide_dtype(batch.logps.dtype)
    weight = rows.weights(batch.response_mask, wide)
    advantages = batch.advantages
    if advantages.shape != batch.logps.shape:
        advantages = rows.spread(advantages.reshape(-1))

    def active(tensor: Tensor | None) -> Tensor:
        if tensor is None:
            return torch.zeros_like(weight)
        return torch.where(weight != 0, tensor.to(wide), 0.0)

    def select(tensor: Tensor | None) -> Tensor:
        return saturated(active(tensor), LARGEST_INPUT[wide])

    def given(weights: Tensor | None) -> Tensor:
        if weights is None:
            return torch.ones_like(weight)
        weights = torch.where(weight != 0, savable(weights).to(wide), 1.0)
        return saturated(weights, _LARGEST_WEIGHT[wide])

    logp = select(batch.logps)
    old_logp = logp.detach() if batch.old_logps is None else select(batch.old_logps)
    further = (select(each) for each in (advantages, batch.ref_logps, batch.rollout_logps))
    weights = (
        given(each) for each in (batch.token_weights, batch.kl_weights, batch.entropy_weights)
    )
    # As they are but for a product, which may overflow.
    entropy = (active if batch.entropy_weights is None else select)(batch.entropies)
    return Tokens(weight, logp, old_logp, *further, entropy, *weights)


def segments_of(
    rows: Rows,
    tokens: Tokens,
    n: Tensor,
    segment: str,
    response_mask: Tensor,
    turn_ids: Tensor | None,
) -> tuple[Rows, Tensor]:
    """The tokens of a row or a turn, and the weights of each segment. Without ids a turn is a run
    of response_mask, that of the caller: it has the number of slots before it that are of no turn.
    """
    if segment != "turn":
        return rows, n
    mask = response_mask.to(tokens.weight.dtype)
    ids = (mask == 0).cumsum(-1) if turn_ids is None else turn_ids
    size, shape = ids.numel(), ids.shape
    places = torch.arange(size, device=ids.device)
    row = rows.spread(torch.arange(rows.count, device=ids.device)).expand(shape).reshape(-1)
    ids, active = ids.reshape(-1), tokens.active().reshape(-1)
    # Each active token beside the active one before it.
    last = torch.where(active, places, -1).cummax(0).values
    before = torch.cat([last.new_full((1,), -1), last])[:size]
    other = before.clamp_min(0)
    first = active & ((before < 0) | (row != row[other]) | (ids != ids[other]))
    turns = Rows(size, (first.cumsum(0) - 1).clamp_min(0).reshape(shape))
    return turns, turns.sum(tokens.weight.double())


LOG_RATIO_CLIP = ("log_ratio_low", "log_ratio_high")


def levelled(
    segments: Rows,
    tokens: Tokens,
    n: Tensor,
    level: Level,
    *,
    log_ratio_low: Number = math.inf,
    log_ratio_high: Number = math.inf,
) -> tuple[Tensor, Tensor]:
    """logp and log_ratio as a surrogate sees them.

    token            logp - old_logp
    sequence_mean    their mean over the row; logp likewise      GSPO, arXiv:2507.18071, eq. 7
    sequence_token   the mean, with the token's own gradient     GSPO-token, the same, eq. 14
    sequence_sum     their sum over the row; logp likewise       RLOO, arXiv:2402.14740
    turn_...         the same over the tokens of a turn

    Where it is shared, a token's log-ratio counts as at most log_ratio_high where A >= 0, and as
    at least -log_ratio_low where A < 0; beyond, the token has no gradient, through its logp
    neither: GMPO, arXiv:2507.20673, eq. 4.
    """
    logp, log_ratio = tokens.logp, tokens.logp - tokens.old_logp
    if level.shared:
        above = clamp(log_ratio, -log_ratio_low, math.inf)
        below = clamp(log_ratio, -math.inf, log_ratio_high)
        clipped = torch.where(tokens.advantage < 0, above, below)
        clipped = torch.where(log_ratio.isfinite(), clipped, log_ratio)  # infinity is no bound
        log_ratio = clipped + 0 * log_ratio.detach()
        logp = with_gradient_of(logp, log_ratio)
    if level.segment == "token":
        return tokens.logp, log_ratio

    def spread(values: Tensor) -> Tensor:
        sums = segments.sum(tokens.weight.double() * widened(values))
        if level.is_mean:
            sums = sums / torch.where(n > 0, n, 1.0)
        shared = segments.spread(sums).expand_as(values)  # gradients are added up in float64
        return saturated(shared.to(values.dtype), LARGEST_INPUT[values.dtype])

    if not level.shared:
        return tokens.logp, with_gradient_of(spread(log_ratio), log_ratio)
    return spread(logp), spread(log_ratio)
