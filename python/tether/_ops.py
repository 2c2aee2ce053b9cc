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
_SUMS, _MAXIMA = 10, 2


@torch.library.register_fake("tether::policy_loss_forward")
def _(logps, *arguments):
    with_gradient = arguments[-1]
    wide = torch.float64 if logps.dtype == torch.float64 else torch.float32
    stored = torch.float32 if logps.dtype == torch.float16 else logps.dtype
    return (
        logps.new_empty((), dtype=wide),
        logps.new_empty(logps.shape if with_gradient else (0,), dtype=stored),
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
    logps, *_ = inputs
    _, dlogps, metric_sums, metric_maxima = output
    ctx.mark_non_differentiable(dlogps, metric_sums, metric_maxima)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dlogps, logps)


def _backward(ctx, upstream, *_):
    dlogps, logps = ctx.saved_tensors
    if upstream is None:
        gradient = None
    elif torch.is_grad_enabled():
        gradient = _ScaledOnce.apply(dlogps, upstream, logps)
    elif _is_one(upstream):
        gradient = dlogps.to(logps.dtype)
    else:
        gradient = (dlogps * upstream).to(logps.dtype)
    return gradient, *[None] * 11


torch.library.register_autograd(
    "tether::policy_loss_forward", _backward, setup_context=_setup_context
)
