"""Log-probabilities, divergences and heads: how tether and its peers compute them.

logits    log-probabilities of the targets and entropies: forward, and both passes with random
          upstream gradients
kl        exact KL(q || p) and entropy of q of two rows of logits, with the gradients of q
linear    from hidden states: log-probabilities only; "products" are the matrix products alone, one
          for forward and three for both
"""

from __future__ import annotations

import torch

import tether

# ---- methods on logits: (logits, targets, buffer) -> (logps, entropies) --------------------------


def eager(logits, targets, _=None):
    log_p = torch.log_softmax(logits.float(), -1)
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def tether_method():
    return lambda logits, targets, _: tether.token_logps(logits, targets, entropies=True)[:2]


def tether_own_buffer():
    return lambda logits, targets, buffer: tether.token_logps(
        logits, targets, entropies=True, gradient_buffer=buffer
    )[:2]


def trl_method():
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    return lambda logits, targets, _: (
        selective_log_softmax(logits, targets),
        entropy_from_logits(logits),
    )


def verl_method():
    from verl.utils.torch_functional import entropy_from_logits, logprobs_from_logits_v2

    return lambda logits, targets, _: (
        logprobs_from_logits_v2(logits, targets),
        entropy_from_logits(logits),
    )


LOGITS_METHODS = {
    "eager": lambda: eager,
    "torch.compile": lambda: torch.compile(eager),
    "trl": trl_method,
    "verl": verl_method,
    "tether": tether_method,
    "tether, own buffer": tether_own_buffer,
}


# ---- methods on two rows of logits: (q, p) -> (KL, entropy) --------------------------------------


def kl_eager(q_logits, p_logits):
    log_q = torch.log_softmax(q_logits.float(), -1)
    log_p = torch.log_softmax(p_logits.float(), -1)
    q = log_q.exp()
    return (q * (log_q - log_p)).sum(-1), -(q * log_q).sum(-1)


def kl_tether():
    return lambda q_logits, p_logits: tether.categorical_kl(q_logits, p_logits)[::2]


KL_METHODS = {
    "eager": lambda: kl_eager,
    "torch.compile": lambda: torch.compile(kl_eager),
    "tether": kl_tether,
}


# ---- methods on hidden states: (hidden, weight, targets) -> logps --------------------------------


def linear_eager(hidden, weight, targets):
    return torch.log_softmax((hidden @ weight.t()).float(), -1).gather(-1, targets[:, None])[:, 0]


def linear_tether():
    return lambda hidden, weight, targets: tether.linear_token_logps(hidden, weight, targets).logps


def linear_kept(size):
    """Over kept sets of so many ids, which are made once."""
    made = {}

    def run(hidden, weight, targets):
        if targets.data_ptr() not in made:
            step = weight.shape[0] // size
            ids = (targets[:, None] + step * torch.arange(size)) % weight.shape[0]
            made[targets.data_ptr()] = tether.support(targets, ids)
        support = made[targets.data_ptr()]
        return tether.linear_token_logps(hidden, weight, targets, support=support).logps

    return run


def linear_trl():
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as chunk

    return lambda hidden, weight, targets: ChunkedLogProbFunction.apply(
        hidden, weight, None, targets, 1.0, chunk, None, 1.0, ("log_probs",)
    )[0]


def linear_torch():
    from torch.nn.functional import linear_cross_entropy  # torch 2.10 has none

    return lambda hidden, weight, targets: (
        -linear_cross_entropy(hidden, weight, targets, reduction="none")
    )


def linear_liger():
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction as Function

    def loss(hidden, weight, targets):
        rows = 4
        shape = (rows, targets.shape[0] // rows)
        ones = torch.ones(shape)
        arguments = (hidden.view(*shape, -1), weight, targets.view(shape), ones, torch.ones(rows))
        absent = (None,) * 6  # bias, ref and old log-probabilities, the reference's layer
        return Function.apply(
            *arguments, *absent, 0.0, 0.2, 0.2, "dapo", None, "token", 1.0, 1.05, 1.0, False, False
        )[0]

    return loss


def linear_tether_loss():
    def loss(hidden, weight, targets):
        rows = 4
        shape = (rows, targets.shape[0] // rows)
        return tether.linear_policy_loss(
            hidden.view(*shape, -1),
            weight,
            targets.view(shape),
            torch.ones(rows),
            torch.ones(shape, dtype=torch.bool),
            objective="dapo",
        ).loss

    return loss


LINEAR_METHODS = {
    "products": lambda: products,
    "eager": lambda: linear_eager,
    "torch.compile": lambda: torch.compile(linear_eager),
    "torch linear_cross_entropy": linear_torch,
    "trl add_fused_lm_head": linear_trl,
    "liger GRPO (a loss)": linear_liger,
    "tether": linear_tether,
    "tether DAPO (a loss)": linear_tether_loss,
    "tether, 20 kept": lambda: linear_kept(20),
    "tether, 512 kept": lambda: linear_kept(512),
}


# ---- running -------------------------------------------------------------------------------------


def logits_inputs(shape, dtype):
    rows, vocabulary = shape
    torch.manual_seed(1)
    logits = (3 * torch.randn(rows, vocabulary)).to(dtype).requires_grad_()
    return {
        "logits": logits,
        "targets": torch.randint(vocabulary, (rows,)),
        "upstream": torch.randn(2, rows),
        "buffer": torch.full_like(logits, 1, requires_grad=False),  # its pages are the caller's
    }


def kl_inputs(shape, dtype):
    inputs = logits_inputs(shape, dtype)
    del inputs["buffer"]
    reference = inputs["logits"].detach() + torch.randn(shape[0], 1).to(dtype)
    return inputs | {"reference": reference.roll(1, 1)}


def linear_inputs(shape, dtype):
    rows, width, vocabulary = shape
    torch.manual_seed(1)
    return {
        "hidden": torch.randn(rows, width).to(dtype).requires_grad_(),
        "weight": (0.05 * torch.randn(vocabulary, width)).to(dtype).requires_grad_(),
        "targets": torch.randint(vocabulary, (rows,)),
        "upstream": torch.randn(rows),
    }


def run_logits(method, inputs, both):
    buffer = inputs["buffer"]
    if not both:
        with torch.no_grad():
            return method(inputs["logits"], inputs["targets"], None)
    outputs = method(inputs["logits"], inputs["targets"], buffer)
    upstream = [u.to(out.dtype) for u, out in zip(inputs["upstream"], outputs, strict=True)]
    return torch.autograd.grad(outputs, inputs["logits"], upstream)


def run_kl(method, inputs, both):
    q_logits, p_logits = inputs["logits"], inputs["reference"]
    if not both:
        with torch.no_grad():
            return method(q_logits, p_logits)
    return torch.autograd.grad(method(q_logits, p_logits), q_logits, tuple(inputs["upstream"]))


def run_linear(method, inputs, both):
    if method is products:
        return products(inputs, both)
    hidden, weight, targets = inputs["hidden"], inputs["weight"], inputs["targets"]
    if not both:
        with torch.no_grad():
            return method(hidden, weight, targets)
    out = method(hidden, weight, targets)
    upstream = inputs["upstream"].to(out.dtype) if out.dim() else torch.ones_like(out)
    return torch.autograd.grad(out, (hidden, weight), upstream)


def products(inputs, both):
    hidden, weight = inputs["hidden"].detach(), inputs["weight"].detach()
    if "logits" not in inputs:
        inputs["logits"] = torch.empty(len(hidden), len(weight), dtype=hidden.dtype)
    torch.mm(hidden, weight.t(), out=inputs["logits"])
    if both:
        return inputs["logits"] @ weight, inputs["logits"].t() @ hidden
    return None
