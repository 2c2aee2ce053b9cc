"""linear_policy_loss on CUDA: loss and gradients in one walk over chunks of logits, with torch's
products and the kernel of a chunk (rl/kernels/logits_policy_loss_cuda.h). Nothing waits for the
device: masked tokens are multiplied too, as zeros, and their logits are not read."""

from __future__ import annotations

import torch
from torch import Tensor

from tether import _cuda
from tether._functions import FUNCTIONS, Call
from tether._linear_ops import Chunk, Gradients, save_gradients, scaled_gradients
from tether._linear_tracing import LOSS_ARRAYS
from tether._lists import Settings
from tether._objectives import weights_of
from tether._ops import ops


def loss_call(call: Call, linear: tuple[Tensor | None, ...], chunk: Chunk) -> Call | None:
    """The call of the loss as kernels take it; None where there are none: for weights of tokens,
    chunks of a fixed number of rows, and what policy_loss on CUDA has no kernel for."""
    if torch.compiler.is_compiling() or not _cuda.has_kernel("policy_gradient_of_logits", linear):
        return None
    if chunk.padded or weights_of(call.settings.choices):
        return None
    return _cuda.policy_call(call)


def _counts(call: Call) -> Tensor:
    """[3] float64 on the device: the denominators of the step, or of this batch."""
    if call.more:
        return call.more[0]
    if any(name in call.settings.numbers for name in _cuda.COUNTS):
        return _cuda.by_counts(call).more[0]
    words = call.settings.words()
    return FUNCTIONS["local_counts"].operator(*call.tensors.values(), *words)


def _logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(hidden, weight.t(), out=out)
    else:
        torch.addmm(bias, hidden, weight.t(), out=out)


def _walk(linear, targets, call, rows, chunk, wanted, entropies):
    """(logps, gradients): like the targets in float32, and of hidden, weight and bias."""
    hidden, weight, bias = linear
    mask = call.tensors["response_mask"]
    # 0 times NaN would reach the gradient of the weight.
    flat = hidden.reshape(-1, hidden.shape[-1]).masked_fill((mask == 0).reshape(-1, 1), 0)
    flat_targets, logps = targets.reshape(-1), torch.zeros_like(targets, dtype=torch.float32)
    gradients = Gradients(flat, weight, wanted)
    arrays = tuple(call.tensors[name] for name in LOSS_ARRAYS)
    settings, counts = (*call.settings.words(), *rows.words()), _counts(call)
    pieces = chunk.pieces(len(flat_targets)) if len(flat_targets) else []
    largest = max((end - begin for begin, end in pieces), default=0)
    buffer = weight.new_empty(largest, weight.shape[0])
    for begin, end in pieces:
        logits = buffer[: end - begin]
        _logits_of(flat[begin:end], weight, bias, logits)
        ops.policy_gradient_of_logits(
            logits, flat_targets, begin, *arrays, *settings, counts, logps, entropies
        )
        gradients.add(slice(begin, end), logits, flat)
    return logps, gradients.taken(hidden)


class CudaLinearPolicyLoss(torch.autograd.Function):
    """Loss and gradients in one walk; backward is a scaling."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, call, rows, with_entropies, chunk, wanted):
        linear = (hidden, weight, bias)
        entropies = torch.zeros_like(targets, dtype=torch.float32) if with_entropies else None
        with torch.autocast(hidden.device.type, enabled=False):
            logps, gradients = _walk(linear, targets, call, rows, chunk, wanted, entropies)
        tensors = call.tensors | {"logps": logps, "entropies": entropies}
        loss, _, _, sums, maxima = call._replace(tensors=tensors).run_with_gradient()
        save_gradients(ctx, gradients, linear, wanted)
        constants = (each for each in (logps, entropies, sums, maxima) if each is not None)
        ctx.mark_non_differentiable(*constants)
        ctx.set_materialize_grads(False)
        return loss, logps, entropies, sums, maxima

    @staticmethod
    def backward(ctx, upstream, *_):
        return *scaled_gradients(ctx, upstream), *[None] * 6


def loss_of_tokens(
    linear: tuple[Tensor, Tensor, Tensor | None],
    targets: Tensor,
    call: Call,
    rows: Settings,
    chunk: Chunk,
    wanted: list[bool],
) -> tuple[Tensor | None, ...]:
    """(loss, logps, entropies or None, sums, maxima); `call`: of loss_call."""
    asked = rows.choices["entropies"] == "true"
    return CudaLinearPolicyLoss.apply(*linear, targets, call, rows, asked, chunk, wanted)
