"""What formulas are made of: ties, saturation, gradients by hand (core/number.h)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Number = float | Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def number_beside(value: Number, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of one number on the device of `like`, in its dtype unless said. What Python has is
    written there: a copy from the host would be waited for."""
    dtype = dtype or like.dtype
    if isinstance(value, Tensor):
        return value.to(like.device, dtype)
    return torch.full((), value, dtype=dtype, device=like.device)


def minimum(a: Tensor, b: Tensor) -> Tensor:
    return torch.where((b < a) | torch.isnan(b), b, a)


def maximum(a: Tensor, b: Tensor) -> Tensor:
    return torch.where((b > a) | torch.isnan(b), b, a)


def clamp(x: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    return minimum(maximum(x, number_beside(low, x)), number_beside(high, x))


def saturate(x: Tensor, *, below: bool) -> Tensor:
    """x, at most 60 (600), and with `below` at least -60 (-600), with derivative 1 everywhere."""
    bound = 600.0 if x.dtype == torch.float64 else 60.0
    return x.detach().clamp(-bound if below else -math.inf, bound) + (x - x.detach())


def exp(x: Tensor) -> Tensor:
    """e^x, saturated on both sides."""
    return torch.exp(saturate(x, below=True))


def with_gradient_of(value: Tensor, source: Tensor) -> Tensor:
    """Straight through: the value of one, the gradient of the other, 0 where that overflowed."""
    return value.detach() + torch.nan_to_num(source - source.detach(), nan=0.0)


# Finite log-probabilities beyond this count as this: products of their squares stay finite.
LARGEST_LOGP = {torch.float32: 1e14, torch.float64: 1e130}


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


def narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums in float64 in the dtype of results: what is too large for it counts as its largest."""
    largest = torch.finfo(dtype).max
    within = x.detach().clamp(-largest, largest) + (x - x.detach())
    return torch.where(x.isfinite(), within, x).to(dtype)


def with_slope(value: Tensor, slope: Tensor | Number, x: Tensor) -> Tensor:
    """The value, with the gradient of slope x."""
    slope = slope.detach() if isinstance(slope, Tensor) else slope
    return value.detach() + slope * (x - x.detach())
