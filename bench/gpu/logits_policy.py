#!/usr/bin/env python3
"""The policy loss of logits on a GPU: beside the three kernels that it is one of, bits, times.

usage: logits_policy.py DOORS [--json FILE] [--rows N] [--vocabulary V] [--repetitions N] [--quick]

Options and the report are those of check.py. Ends with 1 if an error is larger than its bound, or
bits differ.
"""

from __future__ import annotations

import ctypes
import functools
import sys

import check
import torch
from check import DEVICE, DTYPES
from timing import of_logits

ENTROPY = 0.02
SHAPES = [  # rows of tokens, columns, vocabulary, gap between rows of logits, first element
    (2, 64, 151936, 0, 0),
    (2, 5, 50257, 0, 3),
    (2, 4, 32000, 8, 8),
    (1, 4, 262144, 0, 0),
    (2, 3, 7, 0, 0),
]


class Tokens:
    """A batch of tokens with logits, of which some are masked."""

    def __init__(self, rows, columns, vocabulary, gap, first, dtype, masked=0.3):
        count = rows * columns
        self.shape, self.gap, self.first = (rows, columns), gap, first
        self.logits, self.targets, _ = check.batch_of_rows(count, vocabulary, gap, first, dtype)
        near = 0.2 * torch.randn(3, count, device=DEVICE)
        logps = self.exact()[0].float()
        self.others = [*(logps + near), torch.randn(count, device=DEVICE)]
        self.mask = (torch.rand(count, device=DEVICE) >= masked).to(torch.uint8)
        self.mask[0] = 1

    def exact(self):
        zero = torch.zeros(2, len(self.targets), device=DEVICE)
        blocks = range(0, len(self.targets), 16)  # float64 logits of all would be many
        parts = [
            check.exact_rows(self.logits[i : i + 16], self.targets[i : i + 16],
                             zero[:, i : i + 16], 1.0, 0.0)[:2]
            for i in blocks
        ]  # fmt: skip
        return [torch.cat(each) for each in zip(*parts, strict=True)]


class Kernels:
    """One kernel, or three, with memory of their own."""

    def __init__(self, doors, tokens):
        self.doors, self.tokens = doors, tokens
        doors.library.tether_policy_loss_of_logits.restype = ctypes.c_char_p
        rows, columns = tokens.shape
        self.states, self.logps, self.entropies = check.row_results(rows * columns)
        self.dlogps = torch.empty_like(self.logps)
        self.dentropies = torch.empty_like(self.logps)
        self.workspace = doors.policy_workspace(rows, columns)
        self.totals = None

    def one(self, objective, out, temperature=1.0, softcap=0.0, entropy=ENTROPY):
        tokens, logits = self.tokens, self.tokens.logits
        size = self.doors.library.tether_policy_totals_bytes() // 8
        self.totals = torch.zeros(size, dtype=torch.float64, device=DEVICE)
        entropies = self.entropies if entropy else None
        others = (ctypes.c_void_p * 4)(*(each.data_ptr() for each in tokens.others))
        self.doors.call("policy_loss_of_logits", objective.encode(), float(entropy), *tokens.shape,
                        logits, DTYPES[logits.dtype], logits.shape[1], logits.stride(0),
                        tokens.targets, temperature, softcap, others, tokens.mask, self.logps,
                        entropies, out, self.totals, self.workspace, check.stream())  # fmt: skip

    def three(self, objective, out, temperature=1.0, softcap=0.0, entropy=0.0):
        """Without a bonus for entropies, whose gradient this door of the loss does not give."""
        tokens = self.tokens
        targets = torch.where(tokens.mask.bool(), tokens.targets, check.IGNORE)
        results = (self.states, self.logps, self.entropies)
        self.doors.forward(tokens.logits, targets, temperature, softcap, out=results)
        arrays = [self.logps, *tokens.others]
        mask = tokens.mask.view(tokens.shape)
        self.totals = self.doors.policy_loss(objective, arrays, mask, self.dlogps, self.workspace)
        upstream = (self.dlogps, torch.zeros_like(self.dlogps))
        self.doors.backward(
            tokens.logits, targets, self.states, upstream, out, temperature, softcap
        )


def token_objectives(doors):
    """Those with a kernel of this kind."""
    tokens = Tokens(1, 2, 8, 0, 0, torch.float32)
    out = torch.empty_like(tokens.logits)
    found = []
    for name in doors.objectives():
        try:
            Kernels(doors, tokens).one(name, out)
            found.append(name)
        except RuntimeError as error:
            if "where there are logits" not in str(error):
                raise
    return found


def gradient_memory(tokens):
    """As the logits lie."""
    logits = tokens.logits
    shape, strides, first = logits.shape, logits.stride(), logits.storage_offset()
    size = first + shape[0] * strides[0]
    memory = torch.full((size,), 777.0, dtype=logits.dtype, device=DEVICE)
    return memory.as_strided(shape, strides, first)


def errors_beside_three(doors, tokens, objective, temperature, softcap):
    one, three = Kernels(doors, tokens), Kernels(doors, tokens)
    out, want = gradient_memory(tokens), gradient_memory(tokens)
    one.one(objective, out, temperature, softcap, entropy=0.0)
    three.three(objective, want, temperature, softcap)
    size = want.float().abs().max().clamp(min=1e-30)
    relative, absolute = check.ROUNDING[out.dtype]
    rounding = 2 * (relative * want.float().abs() + absolute)
    gradient = ((out.float() - want.float()).abs() - rounding).max() / size
    sums = check.gap_of_totals(one.totals, three.totals)
    logps = (one.logps - three.logps).abs() / (1 + three.logps.abs())
    return {"gradient": float(gradient), "totals": sums, "logps": float(logps.max())}


def check_beside_three(doors, quick):
    found = []
    objectives = token_objectives(doors)
    for dtype in DTYPES:
        for i, shape in enumerate(SHAPES[1:] if quick else SHAPES):
            tokens = Tokens(*shape, dtype)
            for softcap in (0.0, 5.0):
                for objective in objectives if i == 1 and not quick else ("ppo", "grpo"):
                    errors = errors_beside_three(doors, tokens, objective, 0.7, softcap)
                    passed = errors["gradient"] < 2e-5 and errors["logps"] < 4e-6
                    found.append({"objective": objective, "dtype": str(dtype), "shape": shape,
                                  "softcap": softcap, **errors,
                                  "passed": passed and errors["totals"] < 1e-3})  # fmt: skip
    return found


def ppo_of_torch(tokens, temperature):
    """The gradient of ppo with its bonus for entropies, in float64."""
    logits = tokens.logits.double().requires_grad_()
    absent = logits == -torch.inf
    log_p = torch.log_softmax(logits / temperature, -1)
    logps = log_p.gather(-1, tokens.targets[:, None])[:, 0]
    entropies = -(log_p.exp() * log_p.masked_fill(absent, 0)).sum(-1)
    old, advantages, mask = tokens.others[0].double(), tokens.others[3].double(), tokens.mask
    ratio = torch.exp(logps - old)
    losses = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    loss = ((losses - ENTROPY * entropies) * mask).sum() / mask.sum()
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def check_beside_torch(doors):
    found = []
    for dtype in DTYPES:
        tokens = Tokens(2, 8, 50257, 0, 3, dtype)
        tokens.targets[1] = 1  # no row is ignored
        tokens.logits[1, 1] = 1.0
        loss, gradient = ppo_of_torch(tokens, 0.7)
        kernels, out = Kernels(doors, tokens), gradient_memory(tokens)
        kernels.one("ppo", out, 0.7)
        relative, absolute = check.ROUNDING[dtype]
        rounding = relative * gradient.abs() + absolute
        error = float(((out - gradient).abs() - rounding).max() / gradient.abs().max())
        of_loss = float((kernels.totals[0] - loss).abs())
        found.append({"dtype": str(dtype), "gradient": error, "loss": of_loss,
                      "passed": error < 2e-5 and of_loss < 1e-5})  # fmt: skip
    return found


def check_bits(doors):
    """In place and apart, two runs, one of them beside a busy stream from a graph."""
    tokens = Tokens(4, 64, 151936, 0, 0, torch.bfloat16)
    kernels, out, again = Kernels(doors, tokens), gradient_memory(tokens), gradient_memory(tokens)
    kernels.one("grpo", out)
    logps, totals = kernels.logps.clone(), kernels.totals
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernels.one("grpo", again)
    noise = torch.randn(4096, 4096, device=DEVICE)
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(20):
            noise = noise @ noise * 1e-3
    graph.replay()
    torch.cuda.synchronize()
    found = {
        "two_runs": torch.equal(out, again) and torch.equal(logps, kernels.logps),
        "totals": torch.equal(totals.nan_to_num(), kernels.totals.nan_to_num()),
    }
    kernels.one("grpo", tokens.logits)
    found["in_place"] = torch.equal(out, tokens.logits)
    return {**found, "passed": all(found.values())}


def check_beyond_31_bits(doors):
    """The last tokens of logits with more than 2^31 numbers."""
    rows, vocabulary = 2**14 + 8, 2**17 + 64
    tokens = Tokens(1, 2, 8, 0, 0, torch.bfloat16)
    tokens.shape = (8, rows // 8)
    tokens.logits = torch.randn(rows, vocabulary, dtype=torch.bfloat16, device=DEVICE)
    tokens.targets = torch.randint(vocabulary, (rows,), device=DEVICE)
    tokens.others = list(torch.randn(4, rows, device=DEVICE) - 12)
    tokens.mask = torch.ones(rows, dtype=torch.uint8, device=DEVICE)
    last = slice(rows - 4, rows)
    zero = torch.zeros(2, 4, device=DEVICE)
    exact = check.exact_rows(tokens.logits[last].clone(), tokens.targets[last], zero, 1.0, 0.0)
    kernels = Kernels(doors, tokens)
    kernels.one("ppo", tokens.logits)
    error = float((kernels.logps[last] - exact[0]).abs().max())
    finite = bool(torch.isfinite(tokens.logits[last]).all())
    return {"logp": error, "finite": finite, "passed": error < 1e-4 and finite}


# ---- times --------------------------------------------------------------------------------------


def eager(tokens):
    logits = tokens.logits.detach().requires_grad_()
    log_p = torch.log_softmax(logits.float(), -1)
    logps = log_p.gather(-1, tokens.targets[:, None])[:, 0]
    entropies = -(log_p.exp() * log_p).sum(-1)
    ratio = torch.exp(logps - tokens.others[0])
    advantages = tokens.others[3]
    losses = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    (((losses - ENTROPY * entropies) * tokens.mask).sum() / tokens.mask.sum()).backward()


def measure(doors, shape, dtype, masked, repetitions):
    torch.cuda.empty_cache()
    rows, vocabulary = shape
    tokens = Tokens(1, 2, 8, 0, 0, dtype)
    tokens.shape = (8, rows // 8)
    tokens.logits = torch.randn(rows, vocabulary, device=DEVICE).to(dtype)
    tokens.targets = torch.randint(vocabulary, (rows,), device=DEVICE)
    tokens.others = list(0.1 * torch.randn(4, rows, device=DEVICE) - 12)
    tokens.mask = (torch.rand(rows, device=DEVICE) >= masked).to(torch.uint8)
    kernels, out = Kernels(doors, tokens), torch.empty_like(tokens.logits)
    methods = {
        "copy": (lambda: out.copy_(tokens.logits), 2),
        "one": (functools.partial(kernels.one, "ppo", out), 2),
        "three": (functools.partial(kernels.three, "ppo", out), 3),
        "eager": (lambda: eager(tokens), 3),
    }
    return of_logits(tokens.logits, methods, repetitions, masked=masked)


def parts_of(doors, chosen):
    if chosen.quick:
        return {"beside_three": lambda: check_beside_three(doors, quick=True)}
    rows, vocabulary = chosen.rows, chosen.vocabulary
    cases = [
        ((rows, vocabulary), torch.bfloat16, 0.0),
        ((rows, vocabulary), torch.bfloat16, 0.4),
        ((rows, vocabulary), torch.float32, 0.0),
        ((rows, 32000), torch.bfloat16, 0.0),
        ((256, vocabulary), torch.bfloat16, 0.0),
    ]
    return {
        "beside_torch": lambda: check_beside_torch(doors),
        "beside_three": lambda: check_beside_three(doors, quick=False),
        "bits": lambda: check_bits(doors),
        "beyond_31_bits": lambda: check_beyond_31_bits(doors),
        "times": lambda: [measure(doors, *case, chosen.repetitions) for case in cases],
    }


if __name__ == "__main__":
    sys.exit(check.main(parts_of))
