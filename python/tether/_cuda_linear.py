"""linear_policy_loss on CUDA: loss and gradients in one walk over chunks of logits, with torch's
products and the kernel of a chunk (rl/kernels/logits_policy_loss_cuda.h). Nothing waits for the
device: masked tokens are multiplied too, as zeros, and their logits are not read."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tether import _cuda
from tether._catalogue import KNOWN_WEIGHTS
from tether._functions import FUNCTIONS, Call
from tether._linear_inputs import LOSS_ARRAYS
from tether._linear_ops import (
    Gradients,
    logits_of_chunks,
    loss_of_chunks,
    without_autocast,
    without_unknown,
)
from tether._objectives import weights_of
from tether._ops import ops

_ARGUMENTS = (*(each.name for each in FUNCTIONS["policy_loss"].arguments), "offsets")


def loss_call(call: Call, linear: tuple[Tensor | None, ...]) -> tuple[Call, Tensor] | None:
    """The call of the loss as kernels take it, and the denominators of its step, [3] float64 on the
    device. None where there are no kernels: for weights that look at the policy, whose
    log-probabilities are still to be made; for those that take tokens out, whose rows a kernel
    would leave alone; and for what policy_loss on CUDA has no kernel for."""
    if not _cuda.has_kernel("policy_gradient_of_logits", linear):
        return None
    weights = weights_of(call.settings.choices)
    if any(KNOWN_WEIGHTS[name].reads_policy or KNOWN_WEIGHTS[name].leaves for name in weights):
        return None
    if weights and call.tensors["old_logps"] is None:
        return None
    known = _cuda.call_on_cuda(call)
    return None if known is None else (known, _counts(known))


def _counts(call: Call) -> Tensor:
    if call.more:
        return call.more[0]
    if _are_given(call.settings.numbers):
        return _cuda.numbers_on_device(call)
    words = call.settings.words()
    return FUNCTIONS["local_counts"].operator(*call.tensors.values(), *words)


def _are_given(names) -> bool:
    return any(name in names for name in _cuda.ON_DEVICE["policy_loss"][1])


def walk_over(counts: Tensor | None) -> Callable:
    """The walk of the CPU, which finds the denominators itself, or this one."""
    return loss_of_chunks if counts is None else loss_on_cuda


@without_autocast
def loss_on_cuda(
    hidden, weight, bias, targets, batch, words, row_words, with_entropies, chunk, wanted, counts
):
    """As loss_of_chunks."""
    arrays = dict(zip(LOSS_ARRAYS, batch, strict=True))
    active = (arrays["response_mask"] != 0).reshape(-1)
    flat = without_unknown(hidden.reshape(-1, hidden.shape[-1]), active)
    logps = torch.zeros_like(targets, dtype=torch.float32)
    entropies = torch.zeros_like(logps) if with_entropies else None
    gradients = Gradients(flat, weight, wanted, alone=len(flat) <= chunk.rows)
    at = targets.reshape(-1)
    for places, logits in logits_of_chunks(flat, weight, bias, active, chunk):
        ops.policy_gradient_of_logits(
            logits, at, places.start, *batch, *words, *row_words, counts, logps, entropies
        )
        gradients.add(places, logits, flat)
    arrays |= {"logps": logps, "entropies": entropies}
    tensors = [arrays.get(name) for name in _ARGUMENTS]
    # Denominators that the call states are checked with its other options.
    if _are_given(words[0]):
        loss, _, _, sums, maxima = ops.policy_loss(*tensors, *words, False)
    else:
        loss, _, _, sums, maxima = ops.policy_loss_by_counts(*tensors, counts, *words, False)
    return (loss, logps, entropies, sums, maxima), gradients.taken(hidden)
