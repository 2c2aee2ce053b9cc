"""Log-probabilities of rows of logits, and exact KL divergences of two rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tether.reference.kl import k3
from tether.reference.numbers import (
    marked,
    of_marked,
    of_sound_rows,
    saturated,
    spoiling,
    wide_dtype,
    widened,
    with_gradient_of,
)


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
    logits, mark = marked(logits)
    x = _final_logits(logits, ignored, temperature, scale, softcap)
    below, rest = _below_largest(x)
    log_sum = torch.log1p(rest)
    y, known = _known(targets.masked_fill(ignored, 0), x)
    logps = (below.gather(-1, y[..., None])[..., 0] - log_sum) * spoiling(known, log_sum)
    p = below.exp()
    # Of a column with p = 0 there is nothing to add, and a large slope to overflow beside a 0.
    entropies = log_sum - (p * below.masked_fill(p == 0, 0)).sum(-1) / (1 + rest)
    return of_marked(mark, logps.masked_fill(ignored, 0), entropies.masked_fill(ignored, 0))


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
    last one bool. Ignored targets get 1, 0 and True, those of a single column; the last
    one is False in a row without a largest number.
    """
    ignored = targets == ignore_index
    x = _final_logits(logits.detach(), ignored, temperature, scale, softcap)
    present = x != -math.inf
    p = torch.softmax(x, -1)
    mean = torch.where(present, x, 0).sum(-1) / present.sum(-1)
    y, _ = _known(targets.masked_fill(ignored, 0), x)
    reached, largest = x.gather(-1, y[..., None])[..., 0], x.amax(-1)
    return (
        p.square().sum(-1).masked_fill(ignored, 1),
        mean.masked_fill(ignored, 0),
        ((reached >= largest) & largest.isfinite()) | ignored,
    )


def _known(ids: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Ids of columns of x, and whether they are: what is not becomes NaN, where nobody looked."""
    ids = ids.to(torch.int64)
    return ids.clamp(0, x.shape[-1] - 1), (ids >= 0) & (ids < x.shape[-1])


def logps_of_ids(logits: Tensor, ids: Tensor, *, temperature: float = 1) -> Tensor:
    """[..., V] and [..., k] to [..., k]: under softmax(logits / temperature)."""
    log_p = _log_softmax(logits, None, temperature)
    ids, known = _known(ids, log_p)
    out = log_p.gather(-1, ids)
    return out * spoiling(known, out)


def _below_largest(x: Tensor) -> tuple[Tensor, Tensor]:
    """x less the largest of its row, and the sum of the exponentials of all others.

    The largest term, 1, is not added: what it is more than others keeps its digits. It is a
    constant: its gradient is minus the sum of the others', where its own terms would cancel.
    """
    largest = x.detach().argmax(-1, keepdim=True)
    top = x.gather(-1, largest)
    is_largest = torch.zeros_like(x, dtype=torch.bool).scatter(-1, largest, True)
    below = torch.where(is_largest, (top - top).detach(), x - top)
    rest = torch.where(is_largest, 0.0, below.exp()).sum(-1)
    return below, rest + 0 * top.detach()[..., 0]  # NaN where nothing is the largest


def _sound(logits: Tensor, ignored: Tensor | None) -> Tensor:
    """The logits. The gradient of a row without a largest number is NaN, as its values are."""
    sound = logits.detach().amax(-1).isfinite()
    return of_sound_rows(logits, sound if ignored is None else sound | ignored)


# Finite log-probabilities, and logits over the temperature less the largest, below minus this count
# as that.
_FARTHEST = {torch.float32: 2.0**110, torch.float64: 2.0**900}


def _log_softmax(logits: Tensor, inactive: Tensor | None, temperature: float) -> Tensor:
    """Of rows of zeros where inactive."""
    below, rest = _below_largest(_near(logits, inactive, temperature))
    return below - torch.log1p(rest)[..., None]


def _near(logits: Tensor, inactive: Tensor | None, temperature: float) -> Tensor:
    """Less the largest of each row, over the temperature."""
    x = _sound(logits, inactive).to(wide_dtype(logits.dtype))
    x = x.masked_fill(x == -math.inf, -math.inf)
    if inactive is not None:
        x = x.masked_fill(inactive[..., None], 0)
    largest = min(_FARTHEST[x.dtype] * temperature, torch.finfo(x.dtype).max)
    lower = x - x.detach().amax(-1, keepdim=True)  # before the temperature multiplies rounding
    near = with_gradient_of(lower.clamp_min(-largest), lower).masked_fill(x == -math.inf, -math.inf)
    return near / temperature


def mass_beside(logps: Tensor) -> Tensor:
    """1 - sum exp(logps): what the largest leaves of 1, without loss, less the others."""
    if logps.shape[-1] == 0:
        return logps.new_ones(logps.shape[:-1])
    largest = logps.detach().argmax(-1, keepdim=True)
    others = logps.exp().scatter(-1, largest, 0.0).sum(-1)
    most = logps.gather(-1, largest)[..., 0]
    return with_gradient_of(-torch.expm1(most), -most.exp()) - others


def multiplier(*, temperature: float, scale: float, softcap: float, **_: float) -> float:
    """Of the numbers that a kernel sums, which has the scale inside a softcap."""
    return (1.0 if softcap > 0 else scale) / temperature


def _final_logits(
    logits: Tensor, ignored: Tensor, temperature: float, scale: float, softcap: float
) -> Tensor:
    """What the softmax is of; rows of zeros where ignored."""
    logits = _sound(logits, ignored).masked_fill(ignored[..., None], 0)
    absent, infinite = logits == -math.inf, logits == math.inf
    x = logits.to(wide_dtype(logits.dtype)) * scale
    if softcap > 0:
        z = x.masked_fill(absent, 0) / softcap
        q = torch.exp(-2 * z.detach().abs())  # 1 - tanh^2 = 4 q / (1 + q)^2
        x = with_gradient_of(softcap * torch.tanh(z), softcap * (4 * q / (1 + q) ** 2) * z)
    largest = torch.finfo(x.dtype).max  # of finite ones; their products may overflow
    x = x / temperature
    x = with_gradient_of(x.clamp(-largest, largest), x)
    return x.masked_fill(absent, -math.inf).masked_fill(infinite, math.inf)


def categorical_kl(
    q_logits: Tensor, p_logits: Tensor, *, mask: Tensor | None = None, temperature: float = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """KL(q || p), KL(p || q) and H(q), q = softmax(q_logits / temperature); [..., V] to [...].

    KL(q || p) = sum_v q_v (log q_v - log p_v). Columns at -inf in both are not there; one at
    -inf in one of them adds nothing where the other is below 2^-100, and else makes the divergence
    infinite, and its gradients by its own row NaN, at the columns whose probability is not 0: below
    2^-102 (float64: 2^-998) it counts as 0 there. Without a largest finite number in one row, the
    gradients of both are NaN. Positions with mask False get zeros and no gradient. Never negative:
    what rounding leaves below 0 is 0.
    """

    inactive = None if mask is None else ~mask
    both = q_logits, p_logits
    log_q, log_p = (_log_softmax(each, inactive, temperature) for each in both)
    x, y = (each.to(log_q.dtype) / temperature for each in both)
    q, p = log_q.exp(), log_p.exp()
    kl, by_q = _divergence(log_q, log_p)
    reverse_kl, by_p = _divergence(log_p, log_q)
    moved = _summing_to_0(p - q, torch.minimum(q, p))
    log_q = log_q.masked_fill(q == 0, 0)
    entropy = -(q * log_q).sum(-1)
    of_entropy = _summing_to_0(-q * (log_q + entropy[..., None]), q)
    broken = 0 * (q + p)  # NaN where one of the rows is
    by_q, by_p, moved, of_entropy = (each + broken for each in (by_q, by_p, moved, of_entropy))
    values = (
        _with_slopes(_with_slopes(kl.detach(), by_q, x), moved, y),
        _with_slopes(_with_slopes(reverse_kl.detach(), by_p, y), -moved, x),
        _with_slopes(
            _with_slopes(torch.where(entropy < 0, 0.0, entropy).detach(), of_entropy, x), broken, y
        ),
    )
    return values if mask is None else tuple(each.masked_fill(~mask, 0) for each in values)


def _divergence(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q || p) and its slopes by the logits of q, q_v (log q_v - log p_v - KL); NaN where it is
    infinite and q_v does not count as 0."""
    q, p, d = log_q.exp(), log_p.exp(), log_q - log_p
    near = d.abs() < 0.5
    d = d.masked_fill((q == 0) | ((q < 2.0**-100) & d.isinf()), 0)
    terms = q * d
    total = terms.sum(-1)
    # With sum_v (p_v - q_v) = 0 added: no term is below 0, and none cancels.
    value = torch.where(near, q * k3(torch.where(near, -d, 0.0)), (p - q) + terms).sum(-1)
    value = torch.where(total.isfinite(), value, total)
    away = d - (value + 0 * value)[..., None]
    none = q < torch.finfo(q.dtype).tiny * 2.0**24
    return value, _summing_to_0(torch.where(none, 0 * q, q * away), q)


def _summing_to_0(slopes: Tensor, weight: Tensor) -> Tensor:
    """The slopes of a row. That of a column with most of the weight, whose terms cancel, is minus
    the sum of the others."""
    largest = weight.argmax(-1, keepdim=True)
    others = slopes.scatter(-1, largest, 0.0).sum(-1, keepdim=True)
    own = slopes.gather(-1, largest)  # NaN stays
    own = torch.where(weight.gather(-1, largest) > 0.5, 0 * own - others, own)
    return slopes.scatter(-1, largest, own)


class _WithSlopes(torch.autograd.Function):
    """Values [...] of rows [..., V] with slopes, which may have a derivative. A slope or upstream
    gradient of exactly 0 gives 0, whatever the other one is."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value, slopes, x):
        return value.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, upstream):
        (slopes,) = ctx.saved_tensors
        each = upstream[..., None]
        return upstream, None, torch.where((each == 0) | (slopes == 0), 0.0, each * slopes)


def _with_slopes(value: Tensor, slopes: Tensor, x: Tensor) -> Tensor:
    return _WithSlopes.apply(value, slopes, x)


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
        reverse_bucket: -sum_S p u - P log(Q / P), of KL(p || q)
    where rho = q_y / stop_gradient(q_y). Never negative but with k1. Ignored targets get 0. NaN or
    +inf among the log-probabilities makes the position NaN, as does a sample that q cannot have
    drawn; -inf is a mass of 0.
    """
    shape = q_logits.shape[:-1]
    y = head_ids.new_zeros(shape) if targets is None else targets.to(torch.int64)
    ignored = torch.zeros_like(y, dtype=torch.bool) if targets is None else y == ignore_index
    q_logits, mark = marked(q_logits)
    below, rest = _below_largest(_near(q_logits, ignored, temperature))
    bound = 600.0 if below.dtype == torch.float64 else 60.0  # of the log-ratio of k3
    # What the head leaves of 1 is small: float64 from here on.
    farthest = _FARTHEST[torch.float64]
    log_sum = torch.log1p(widened(rest))[..., None]
    head_logps = head_logps.double().masked_fill(ignored[..., None], 0)
    ids, known = _known(head_ids.masked_fill(ignored[..., None], 0), below)
    y, known_y = _known(y.masked_fill(ignored, 0), below)
    sound = ~rest.isnan() & (head_logps < math.inf).all(-1) & known.all(-1)
    head_logps = saturated(head_logps, farthest)

    log_q = widened(below.gather(-1, ids)) - log_sum
    reverse = tail == "reverse_bucket"
    weight = head_logps.exp() if reverse else log_q.exp()
    u = (log_q - head_logps).masked_fill(weight == 0, 0)
    q_mass, p_mass = (mass_beside(each).clamp_min(precision) for each in (log_q, head_logps))
    gap = q_mass.log() - p_mass.log()
    kl = (weight * u).sum(-1) + (p_mass if reverse else q_mass) * gap
    kl = -kl if reverse else kl
    if tail in ("k1", "k3"):
        inside = (ids == y[..., None]).any(-1)
        log_q_y = widened(below.gather(-1, y[..., None])) - log_sum
        log_q_y = log_q_y[..., 0].masked_fill(inside, 0)
        sound = sound & (log_q_y > -math.inf)  # or q cannot have drawn it
        target_logps = target_logps.double().masked_fill(ignored, 0)
        sound = sound & (target_logps < math.inf) & known_y
        held = log_q_y.detach()
        d = saturated(target_logps.masked_fill(inside, 0), farthest) - held + gap
        if tail == "k1":
            sampled = (log_q_y - held).exp() * (log_q_y - held - d)
        else:
            # The derivative of rho k3 by log q_y, k3(d) - expm1(d), is -d.
            near = with_gradient_of(d.clamp_max(bound), d)
            sampled = k3(near) - torch.where(d.isfinite(), d, 0.0).detach() * (log_q_y - held)
        kl = kl + torch.where(inside, 0, sampled)
    if tail != "k1":
        kl = kl - kl.detach().clamp_max(0)
    kl = (kl * spoiling(sound | ignored, kl)).masked_fill(ignored, 0)
    return of_marked(mark, kl.to(below.dtype))[0]
