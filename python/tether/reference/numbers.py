"""What formulas are made of: ties, saturation, gradients by hand (core/number.h)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

Number = float | Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def number_beside(value: Number, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of one number on the device of `like`, in its dtype unless said; one that is larger
    is infinity. What Python has is written there: a copy from the host would be waited for."""
    dtype = dtype or like.dtype
    if isinstance(value, Tensor):
        return value.to(like.device, dtype)
    value = math.copysign(math.inf, value) if abs(value) > torch.finfo(dtype).max else value
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
    return with_gradient_of(x.clamp(-bound if below else -math.inf, bound), x)


def exp(x: Tensor) -> Tensor:
    """e^x, saturated on both sides."""
    return torch.exp(saturate(x, below=True))


class _WithGradientOf(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value, source):
        return value.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return None, gradient


def with_gradient_of(value: Tensor, source: Tensor) -> Tensor:
    """Straight through: the value of one, the gradient of the other. Forward mode's is 0 where that
    overflowed."""
    if forward_ad._current_level < 0:
        return _WithGradientOf.apply(value.detach(), source)
    return value.detach() + torch.nan_to_num(source - source.detach(), nan=0.0)


# What overflows counts as this: float32 as the largest bfloat16, which gradients are stored in.
LARGEST_RESULT = {torch.float32: torch.finfo(torch.bfloat16).max, torch.float64: 1e300}
# Finite inputs beyond this count as this: their squares stay finite.
LARGEST_INPUT = {torch.float32: 1e18, torch.float64: 1e140}
# So does an advantage, as a surrogate sees it, beyond this over its ratio.
_LARGEST_OF_RATIO = {torch.float32: 3e38, torch.float64: 1e300}
# A larger ratio counts as this in metrics: its square stays finite.
LARGEST_RATIO = {torch.float32: 1e17, torch.float64: 1e150}


def saturated(x: Tensor, largest: float) -> Tensor:
    """A finite number beyond `largest` counts as this, with derivative 1; infinity as it is."""
    return with_gradient_of(torch.where(x.isfinite(), x.detach().clamp(-largest, largest), x), x)


def first_of(x: Tensor, there: Tensor) -> Tensor:
    """[1]: the first number of x that is there; 0 where none is. Nothing waits for a device."""
    places = torch.cat([there.reshape(-1), there.new_ones(1)]).to(torch.int8)
    return torch.cat([x.reshape(-1), x.new_zeros(1)]).gather(0, places.argmax(0, keepdim=True))


def beside_ratio(advantage: Tensor, log_ratio: Tensor) -> Tensor:
    """Advantages whose products with their ratios do not overflow."""
    largest = _LARGEST_OF_RATIO[advantage.dtype] / exp(log_ratio.detach())
    return advantage.clamp(-largest, largest)


class _Spoil(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(spoil, x):
        return spoil.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, gradient):
        return None, ctx.saved_tensors[0]


def spoil_of(sound: Tensor, x: Tensor) -> Tensor:
    """0, or NaN, with the same as its gradient by x, whatever arrives: saturation and clips hide
    what is not sound."""
    spoil = torch.where(sound, torch.zeros_like(x), math.nan).detach()
    return _Spoil.apply(spoil, x) if forward_ad._current_level < 0 else spoil * x


def spoiling(sound: Tensor, like: Tensor) -> Tensor:
    """1 where it holds, else NaN."""
    return torch.where(sound, torch.ones_like(like), math.nan)


class _OfSoundRows(torch.autograd.Function):
    """The rows, with a gradient of NaN where they are not sound, of columns at -inf too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, sound):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, gradient):
        (sound,) = ctx.saved_tensors
        return torch.where(sound[..., None], gradient, math.nan), None


def of_sound_rows(x: Tensor, sound: Tensor) -> Tensor:
    return _OfSoundRows.apply(x, sound) if x.requires_grad else x


class _Marked(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.view_as(x), torch.zeros_like(x[..., 0])

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient, infinite):
        signs = torch.where(gradient == 0, 0.0, gradient.sign() * math.inf)  # constants
        return torch.where(infinite[..., None] > 0, signs, gradient)


class _OfMarked(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(mark, *values):
        return tuple(each.clone() for each in values)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx, *upstreams):
        infinite = torch.stack([each.isinf() for each in upstreams]).any(0)
        signs = (torch.where(each.isinf(), each.sign(), 0 * each) for each in upstreams)
        pairs = zip(signs, upstreams, strict=True)
        return infinite.to(ctx.dtype), *(torch.where(infinite, *pair) for pair in pairs)


def _marks() -> bool:
    """Not in forward mode, nor in a graph, which would lose the values of the Function."""
    return forward_ad._current_level < 0 and not torch.compiler.is_compiling()


def marked(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [..., V], and a mark [...] for of_marked."""
    return _Marked.apply(x) if _marks() else (x, x[..., 0])


def of_marked(mark: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """Values [...] of marked rows. Infinite upstream gradients arrive in the rows as they are,
    beside which others are nothing: on their way they would meet zeros and each other."""
    return _OfMarked.apply(mark, *values) if _marks() else values


def bounded(x: Tensor, source: Tensor | None = None) -> Tensor:
    """What overflowed counts as the largest number; NaN stays NaN. With the gradient of `source`,
    or of x."""
    return with_gradient_of(within(x), x if source is None else source)


def within(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """In the dtype, x's own unless said, what is beyond its largest result as this."""
    dtype = dtype or x.dtype
    largest = LARGEST_RESULT[dtype]
    return x.clamp(-largest, largest).to(dtype)


class _WithScaledGradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, scale):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, gradient):
        (scale,) = ctx.saved_tensors
        product = torch.where(gradient.isfinite(), within(gradient * scale), gradient * scale)
        return torch.where((scale == 0) & ~gradient.isnan(), 0.0, product), None


def with_scaled_gradient(x: Tensor, scale: Tensor) -> Tensor:
    """x with `scale` times its gradient, within bounds unless an infinite one arrives. What
    multiplies a loss meets known slopes here: on its way it may overflow beside a 0."""
    if forward_ad._current_level < 0:
        return _WithScaledGradient.apply(x, scale.detach())
    return with_slope(x, scale, x)


class _Widened(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.to(torch.float64, copy=True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx, gradient):
        within_it = within(gradient, ctx.dtype)
        return torch.where(gradient.isfinite(), within_it, gradient.to(ctx.dtype))


def widened(x: Tensor) -> Tensor:
    """In float64; what is too large for x of its gradient counts as the largest."""
    return _Widened.apply(x) if forward_ad._current_level < 0 else x.double()


def narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums in float64 in the dtype of results: what is too large for it counts as its largest."""
    largest = torch.finfo(dtype).max
    return with_gradient_of(x.clamp(-largest, largest), x).to(dtype)


def with_slope(value: Tensor, slope: Tensor | Number, x: Tensor) -> Tensor:
    """The value, with the gradient of slope x."""
    slope = slope.detach() if isinstance(slope, Tensor) else slope
    return value.detach() + slope * (x - x.detach())
