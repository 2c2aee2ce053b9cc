"""The native operators, and what torch has to know about them beyond their kernels."""

from __future__ import annotations

import math
import pathlib
import re

import torch

_OLDEST = (2, 10)
_SECOND_DERIVATIVE = "backward must run once, got a second derivative. The loss has none"


def load(library: pathlib.Path, version: str) -> None:
    """Loads the operators, or raises ImportError with one sentence."""
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if found < _OLDEST:
        raise ImportError(f"tether: torch must be 2.10 or newer, got {version}")
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise ImportError(
            f"tether: {library.name} must load with torch >= 2.10, got torch {version} and the "
            f"error: {error.__cause__ or error}"
        ) from error


load(pathlib.Path(__file__).with_name("libtether_ops.so"), torch.__version__)
ops = torch.ops.tether

# ---- shapes and dtypes of results, for tracing ---------------------------------------------------

# Rows of the blocks of metrics: PolicyMetrics::kSums and kMaxima, PreferenceMetrics::kSums.
_SUMS, _MAXIMA, _PREFERENCE_SUMS = 11, 2, 8


def _like_gradient(wanted, tensor):
    stored = torch.float32 if wanted and tensor.dtype == torch.float16 else tensor.dtype
    return tensor.new_empty(tensor.shape if wanted else (0,), dtype=stored)


def _like_loss(logps):
    wide = torch.float64 if logps.dtype == torch.float64 else torch.float32
    return logps.new_empty((), dtype=wide)


@torch.library.register_fake("tether::policy_loss_forward")
def _(logps, *arguments):
    entropies, with_gradient = arguments[4], arguments[-1]
    given = entropies is not None
    return (
        _like_loss(logps),
        _like_gradient(with_gradient, logps),
        _like_gradient(with_gradient and given, entropies if given else logps),
        logps.new_empty((_SUMS, 2), dtype=torch.float64),
        logps.new_empty((_MAXIMA,), dtype=torch.float64),
    )


@torch.library.register_fake("tether::preference_loss_forward")
def _(logps, *arguments):
    return (
        _like_loss(logps),
        _like_gradient(arguments[-1], logps),
        logps.new_empty((_PREFERENCE_SUMS, 2), dtype=torch.float64),
    )


@torch.library.register_fake("tether::policy_local_counts")
def _(logps, *_):
    return logps.new_empty((3,), dtype=torch.float64)


# ---- the gradient: found with the loss, scaled in backward ---------------------------------------


class _ScaledOnce(torch.autograd.Function):
    """stored * upstream, without a derivative: torch would take `stored` for a constant."""

    @staticmethod
    def forward(ctx, stored, upstream, tensor, function):
        ctx.function = function
        return _product(stored, upstream).to(tensor.dtype)

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(f"{ctx.function}: {_SECOND_DERIVATIVE}")


def _number(upstream: torch.Tensor) -> float:
    """Of a scalar; NaN for tensors that stand for others (tracing, vmap)."""
    if type(upstream) is not torch.Tensor:
        return math.nan
    try:
        return upstream.item()
    except RuntimeError:
        return math.nan


def _product(stored: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
    """stored * upstream. What is exactly 0, masked or clipped, stays 0 whatever the upstream is."""
    product = stored * upstream
    if math.isfinite(_number(upstream)):
        return product
    return torch.where(stored == 0, stored, product)


def _setup_context(ctx, inputs, output):
    logps, entropies = inputs[0], inputs[5]
    _, dlogps, dentropies, metric_sums, metric_maxima = output
    ctx.mark_non_differentiable(dlogps, dentropies, metric_sums, metric_maxima)
    ctx.set_materialize_grads(False)
    # Constants may be tensors of inference_mode, which cannot be saved.
    needed = ctx.needs_input_grad
    ctx.save_for_backward(
        dlogps, dentropies, logps if needed[0] else None, entropies if needed[5] else None
    )


def scaled(function, upstream, stored, tensor):
    """stored * upstream, in the dtype of the tensor whose gradient it is."""
    if torch.is_grad_enabled():
        return _ScaledOnce.apply(stored, upstream, tensor, function)
    if _number(upstream) == 1:
        return stored.to(tensor.dtype)
    return _product(stored, upstream).to(tensor.dtype)


def _backward(ctx, upstream, *_):
    dlogps, dentropies, logps, entropies = ctx.saved_tensors
    gradients = [None] * 14
    if upstream is not None:
        if ctx.needs_input_grad[0]:
            gradients[0] = scaled("policy_loss", upstream, dlogps, logps)
        if ctx.needs_input_grad[5]:
            gradients[5] = scaled("policy_loss", upstream, dentropies, entropies)
    return tuple(gradients)


torch.library.register_autograd(
    "tether::policy_loss_forward", _backward, setup_context=_setup_context
)


def register_scaled(function: str, operator: str, *, arguments: int) -> None:
    """Autograd of (loss, stored gradient, sums) for an operator whose first argument has one."""

    def setup(ctx, inputs, output):
        _, stored, sums = output
        ctx.mark_non_differentiable(stored, sums)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(stored, inputs[0])

    def backward(ctx, upstream, *_):
        stored, tensor = ctx.saved_tensors
        gradient = None if upstream is None else scaled(function, upstream, stored, tensor)
        return gradient, *[None] * (arguments - 1)

    torch.library.register_autograd(f"tether::{operator}", backward, setup_context=setup)


register_scaled("preference_loss", "preference_loss_forward", arguments=11)
