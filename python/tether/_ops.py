"""The native operators, and what torch has to know about them beyond their kernels."""

from __future__ import annotations

import pathlib
import re

import torch

_OLDEST = (2, 10)
_SECOND_DERIVATIVE = (
    "policy_loss: backward must run once, got a second derivative. The loss has none"
)


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

# Rows of the blocks of metrics: PolicyMetrics::kSums and kMaxima.
_SUMS, _MAXIMA = 11, 2


@torch.library.register_fake("tether::policy_loss_forward")
def _(logps, *arguments):
    entropies, with_gradient = arguments[4], arguments[-1]
    wide = torch.float64 if logps.dtype == torch.float64 else torch.float32

    def gradient(wanted, tensor):
        stored = torch.float32 if wanted and tensor.dtype == torch.float16 else tensor.dtype
        return tensor.new_empty(tensor.shape if wanted else (0,), dtype=stored)

    return (
        logps.new_empty((), dtype=wide),
        gradient(with_gradient, logps),
        gradient(
            with_gradient and entropies is not None, logps if entropies is None else entropies
        ),
        logps.new_empty((_SUMS, 2), dtype=torch.float64),
        logps.new_empty((_MAXIMA,), dtype=torch.float64),
    )


@torch.library.register_fake("tether::policy_local_counts")
def _(logps, *_):
    return logps.new_empty((3,), dtype=torch.float64)


# ---- the gradient: found with the loss, scaled in backward ---------------------------------------


class _ScaledOnce(torch.autograd.Function):
    """dlogps * upstream, without a derivative: torch would take dlogps for a constant of logps."""

    @staticmethod
    def forward(ctx, dlogps, upstream, logps):
        return (dlogps * upstream).to(logps.dtype)

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(_SECOND_DERIVATIVE)


def _is_one(upstream: torch.Tensor) -> bool:
    """Whether this is the number 1. Tensors that stand for others (tracing, vmap) are not."""
    if type(upstream) is not torch.Tensor:
        return False
    try:
        return upstream.item() == 1
    except RuntimeError:
        return False


def _setup_context(ctx, inputs, output):
    logps, entropies = inputs[0], inputs[5]
    _, dlogps, dentropies, metric_sums, metric_maxima = output
    ctx.mark_non_differentiable(dlogps, dentropies, metric_sums, metric_maxima)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dlogps, dentropies, logps, entropies)


def _scaled(upstream, stored, tensor):
    """stored * upstream, in the dtype of the tensor whose gradient it is."""
    if torch.is_grad_enabled():
        return _ScaledOnce.apply(stored, upstream, tensor)
    if _is_one(upstream):
        return stored.to(tensor.dtype)
    return (stored * upstream).to(tensor.dtype)


def _backward(ctx, upstream, *_):
    dlogps, dentropies, logps, entropies = ctx.saved_tensors
    gradients = [None] * 14
    if upstream is not None:
        if ctx.needs_input_grad[0]:
            gradients[0] = _scaled(upstream, dlogps, logps)
        if entropies is not None and ctx.needs_input_grad[5]:
            gradients[5] = _scaled(upstream, dentropies, entropies)
    return tuple(gradients)


torch.library.register_autograd(
    "tether::policy_loss_forward", _backward, setup_context=_setup_context
)
