"""TRL's functions of logits and hidden states, by the kernels here. Used by `tether.trl`.

Each takes TRL's own function, to which it leaves what no kernel takes, and gives ours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from tether._ops import has_kernel
from tether.linear import linear_token_logps
from tether.logits import TokenLogps, token_logps

_IGNORED = -100
_STATISTICS = ("log_sum_sq_probs", "mean_logits", "is_top1")


def selective_log_softmax(own: Callable) -> Callable:
    @functools.wraps(own)
    def selective_log_softmax(logits, index, temperature=1.0, row_mask=None):
        if not has_kernel(logits) or index.dim() != logits.dim() - 1:  # several ids a row
            return own(logits, index, temperature, row_mask)
        return _of_logits(logits, index, temperature, row_mask).logps.to(logits.dtype)

    return selective_log_softmax


def entropy_from_logits(own: Callable) -> Callable:
    @functools.wraps(own)
    def entropy_from_logits(logits, chunk_size=128):
        if not has_kernel(logits):
            return own(logits, chunk_size)
        first = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
        return _of_logits(logits, first, entropies=True).entropies.to(logits.dtype)

    return entropy_from_logits


def selective_log_softmax_and_entropy(own: Callable) -> Callable:
    @functools.wraps(own)
    def selective_log_softmax_and_entropy(
        logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None
    ):
        if not has_kernel(logits):
            return own(logits, index, entropy_requires_grad, temperature, row_mask)
        out = _of_logits(logits, index, temperature, row_mask, entropies=True)
        entropies = out.entropies if entropy_requires_grad else out.entropies.detach()
        return out.logps.to(logits.dtype), entropies.to(logits.dtype)

    return selective_log_softmax_and_entropy


def _of_logits(
    logits: Tensor,
    index: Tensor,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
    **asked: bool,
) -> TokenLogps:
    targets = index if row_mask is None else index.masked_fill(row_mask == 0, _IGNORED)
    return token_logps(logits, targets, temperature=temperature, ignore_index=_IGNORED, **asked)


def fused_head(own: type) -> SimpleNamespace:
    """In place of TRL's autograd function from hidden states [N, H] to per-token results [N]."""

    def apply(
        hidden, weight, bias, targets, temperature, chunk_size, softcap=None, scale=1.0,
        outputs=("entropy", *_STATISTICS),
    ):  # fmt: skip
        # A weight that DeepSpeed has cut is whole only while TRL's own backward gathers it.
        if not has_kernel(hidden) or hasattr(weight, "ds_status"):
            return own.apply(
                hidden, weight, bias, targets, temperature, chunk_size, softcap, scale, outputs
            )
        out = linear_token_logps(
            hidden,
            weight.to(hidden.dtype),
            targets,
            None if bias is None else bias.to(hidden.dtype),
            temperature=temperature,
            scale=scale,
            softcap=softcap or 0.0,
            entropies="entropy" in outputs,
            statistics=any(name in outputs for name in _STATISTICS),
            ignore_index=_IGNORED,
        )
        return (
            out.logps.float(),
            out.entropies.float() if "entropy" in outputs else None,
            out.sum_of_squared_p.log() if "log_sum_sq_probs" in outputs else None,
            out.mean_logits if "mean_logits" in outputs else None,
            out.target_is_largest if "is_top1" in outputs else None,
        )

    return SimpleNamespace(apply=apply)


def scores_only_labels(own: Callable) -> Callable:
    """TRL asks it whether the head shall have only the positions with a label."""

    @functools.wraps(own)
    def only_labels(device):
        return own(device) or has_kernel(torch.empty(0, device=device))

    return only_labels
