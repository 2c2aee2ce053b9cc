#!/usr/bin/env python3
"""The CUDA kernels on a GPU: errors against float64, bits of two runs, times beside torch's.

usage: check.py DOORS [--json FILE] [--rows N] [--vocabulary V] [--repetitions N] [--quick]

DOORS is gpu_doors.so of the build. --quick: small shapes and no times, for compute-sanitizer.
Needs torch with CUDA and nothing else. Ends with 1 if an error is larger than its bound, or bits
differ. Times are medians of interleaved repetitions by CUDA events; "copy" is torch's copy_ of the
logits, read and written once, and GB/s are of what a method must read and write at least; "target"
and "reached" are those of timing.py.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import sys

import torch
import torch.nn.functional as F
from library import DEVICE, DTYPES, Library, pointers, stream, stream_of
from timing import of_logits, of_tokens

IGNORE = -100
# Relative to 1 + |x|, of float sums over a vocabulary; gradients to the largest, without rounding.
BOUNDS = {"logp": 3e-6, "entropy": 5e-6, "gradient": 4e-6}
# Of a number itself, and of the smallest ones.
ROUNDING = {torch.float32: (0, 0), torch.bfloat16: (2**-8, 0), torch.float16: (2**-11, 2**-25)}


class Doors(Library):
    """The functions of doors.cc."""

    def forward(self, logits, targets, temperature=1.0, softcap=0.0, out=None):
        rows, vocabulary = logits.shape
        states, logps, entropies = out or row_results(rows)
        shape = (DTYPES[logits.dtype], rows, vocabulary, logits.stride(0))
        self.call("row_statistics", logits, *shape, targets, temperature, softcap, states, logps,
                  entropies, stream())  # fmt: skip
        return states, logps, entropies

    def backward(self, logits, targets, states, upstream, out, temperature=1.0, softcap=0.0):
        rows, vocabulary = logits.shape
        shape = (DTYPES[logits.dtype], rows, vocabulary, logits.stride(0))
        self.call("row_gradients", logits, *shape, targets, temperature, softcap, states,
                  *upstream, out, out.stride(0), stream())  # fmt: skip

    def objectives(self):
        return self.names("objectives")

    def policy_loss(self, objective, arrays, mask, dlogps, workspace):
        rows, columns = mask.shape
        size = self.number("policy_totals_bytes") // 8
        totals = torch.zeros(size, dtype=torch.float64, device=mask.device)
        self.call("policy_loss", objective.encode(), rows, columns, pointers(arrays), mask, dlogps,
                  totals, workspace, stream_of(mask))  # fmt: skip
        return totals

    def policy_workspace(self, rows, columns):
        size = self.number("policy_workspace_bytes", rows, columns)
        return torch.empty(size, dtype=torch.uint8, device=DEVICE)


def row_results(rows):
    return torch.empty(rows, 7, device=DEVICE), *torch.empty(2, rows, device=DEVICE)


# ---- rows of logits ------------------------------------------------------------------------------


def batch_of_rows(rows, vocabulary, gap, first, dtype):
    """Logits at an element offset, rows of vocabulary + gap, every seventh column not there."""
    memory = torch.full((first + rows * (vocabulary + gap),), 777.0, dtype=dtype, device=DEVICE)
    logits = memory[first:].view(rows, vocabulary + gap)[:, :vocabulary]
    logits.copy_(4 * torch.randn(rows, vocabulary, device=DEVICE))
    targets = torch.randint(vocabulary, (rows,), device=DEVICE)
    logits[:, ::7] = -torch.inf
    logits[torch.arange(rows, device=DEVICE), targets] = 1.0
    if rows > 2:
        targets[1] = IGNORE
    return logits, targets, torch.randn(2, rows, device=DEVICE)


def exact_rows(logits, targets, upstream, temperature, softcap):
    """Log-probabilities, entropies and the gradient in float64."""
    x = logits.double().requires_grad_()
    absent = x == -torch.inf
    z = (softcap * torch.tanh(x / softcap)).masked_fill(absent, -torch.inf) if softcap else x
    log_p = F.log_softmax(z / temperature, -1)
    live = targets != IGNORE
    logps = log_p.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    entropies = -(log_p.exp() * log_p.masked_fill(absent, 0)).sum(-1)
    loss = (upstream[0] * logps + upstream[1] * entropies)[live].sum()
    gradient = torch.autograd.grad(loss, x)[0]
    return logps.where(live, 0).detach(), entropies.where(live, 0).detach(), gradient


def row_errors(doors, shape, dtype, temperature, softcap):
    logits, targets, upstream = batch_of_rows(*shape, dtype)
    logps, entropies, gradient = exact_rows(logits, targets, upstream, temperature, softcap)
    states, got_logps, got_entropies = doors.forward(logits, targets, temperature, softcap)
    apart = torch.full_like(logits, 777.0)
    doors.backward(logits, targets, states, upstream, apart, temperature, softcap)
    doors.backward(logits, targets, states, upstream, logits, temperature, softcap)  # in place
    size = gradient.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    relative, absolute = ROUNDING[dtype]
    rounding = relative * gradient.abs() + absolute
    errors = {
        "logp": ((got_logps - logps).abs() / (1 + logps.abs())).max(),
        "entropy": ((got_entropies - entropies).abs() / (1 + entropies)).max(),
        "gradient": (((apart - gradient).abs() - rounding) / size).max(),
    }
    return {name: float(error) for name, error in errors.items()}, torch.equal(apart, logits)


SHAPES = [  # rows, vocabulary, gap, first
    (8, 151936, 0, 0),
    (5, 50257, 0, 3),
    (6, 32000, 8, 1),
    (3, 7, 0, 0),
    (4, 1, 2, 1),
]


def check_rows(doors, quick):
    """Errors of every shape, and whether in place and apart agree to the bit."""
    found = []
    for dtype in DTYPES:
        for shape in SHAPES[1:] if quick else SHAPES:
            for temperature, softcap in ((1.0, 0.0), (0.7, 5.0)):
                errors, same = row_errors(doors, shape, dtype, temperature, softcap)
                passed = same and all(errors[name] <= BOUNDS[name] for name in errors)
                found.append({"dtype": str(dtype), "shape": shape, "softcap": softcap,
                              "same_in_place": same, "passed": passed, **errors})  # fmt: skip
    return found


def check_beyond_31_bits(doors):
    """The last rows of logits with more than 2^31 numbers."""
    rows, vocabulary = 2**14 + 8, 2**17 + 64
    logits = torch.randn(rows, vocabulary, dtype=torch.bfloat16, device=DEVICE)
    targets = torch.randint(vocabulary, (rows,), device=DEVICE)
    states, logps, _ = doors.forward(logits, targets)
    upstream = torch.ones(2, rows, device=DEVICE)
    last = slice(rows - 4, rows)
    exact = exact_rows(logits[last].clone(), targets[last], upstream[:, last], 1.0, 0.0)
    doors.backward(logits, targets, states, upstream, logits)
    error = float((logps[last] - exact[0]).abs().max())
    size = float(exact[2].abs().max())
    of_gradient = float((logits[last] - exact[2]).abs().max()) / size
    return {"logp": error, "gradient": of_gradient, "passed": error < 1e-4 and of_gradient < 2**-7}


# ---- the policy loss, beside the CPU kernel ------------------------------------------------------


def gap_of_totals(got, expected):
    """The largest, relative to the number. Equal ones are 0 apart, infinite and NaN too; NaN in one
    of them alone is NaN, which passes no bound."""
    same = (got == expected) | (got.isnan() & expected.isnan())
    gaps = (got - expected).abs() / (1e-3 + expected.abs())
    return float(gaps.masked_fill(same, 0).max())


def check_policy(doors, rows=64, columns=1000):
    """Largest difference of loss, metrics and gradients from the CPU kernel's, by objective."""
    torch.manual_seed(1)
    logps = -1 + 0.5 * torch.randn(rows, columns)
    near = [logps + 0.01 * torch.randn(rows, columns) for _ in range(3)]
    arrays = [logps, *near, torch.randn(rows, columns)]
    mask = (torch.rand(rows, columns) < 0.7).to(torch.uint8)
    on_device, device_mask = [each.to(DEVICE) for each in arrays], mask.to(DEVICE)
    workspace = doors.policy_workspace(rows, columns)
    found = []
    for name in doors.objectives():
        want, got = torch.full((rows, columns), 7.0), torch.full((rows, columns), 7.0).to(DEVICE)
        expected = doors.policy_loss(name, arrays, mask, want, None)
        totals = doors.policy_loss(name, on_device, device_mask, got, workspace).cpu()
        first = got.clone()
        again = doors.policy_loss(name, on_device, device_mask, got, workspace).cpu()
        same = torch.equal(first, got) and torch.equal(totals.nan_to_num(), again.nan_to_num())
        scale = want.abs().max().clamp(min=1e-30)
        gradient = float(((got.cpu() - want).abs() / scale).max())
        sums = gap_of_totals(totals, expected)
        found.append({"objective": name, "gradient": gradient, "totals": sums, "same_bits": same,
                      "passed": same and gradient < 1e-5 and sums < 1e-4})  # fmt: skip
    return found


# ---- bits ----------------------------------------------------------------------------------------


def check_bits(doors, rows=512, vocabulary=151936):
    """Two runs, one of them beside a busy stream and one from a graph, agree to the bit."""
    logits, targets, upstream = batch_of_rows(rows, vocabulary, 0, 0, torch.bfloat16)
    states, logps, entropies = doors.forward(logits, targets)
    gradient = torch.empty_like(logits)
    doors.backward(logits, targets, states, upstream, gradient)
    again, other = row_results(rows), torch.empty_like(logits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        doors.forward(logits, targets, out=again)
        doors.backward(logits, targets, again[0], upstream, other)
    noise = torch.randn(4096, 4096, device=DEVICE)
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(20):
            noise = noise @ noise * 1e-3
    graph.replay()
    torch.cuda.synchronize()
    alone = doors.forward(logits[7:8], targets[7:8])
    same = [torch.equal(a, b) for a, b in zip((logps, entropies), again[1:], strict=True)]
    found = {
        "two_runs": all(same) and torch.equal(gradient, other),
        "row_alone": torch.equal(alone[1], logps[7:8]) and torch.equal(alone[0], states[7:8]),
    }
    return {**found, "passed": all(found.values())}


# ---- times ---------------------------------------------------------------------------------------


def eager(logits, targets):
    log_p = F.log_softmax(logits.float(), -1)
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def both_passes(method, logits, targets, upstream):
    x = logits.detach().requires_grad_()
    logps, entropies = method(x, targets)
    torch.autograd.backward([logps, entropies], [*upstream])
    return x.grad


def methods_of(doors, logits, targets, upstream):
    """{name: (call, units of the logits' bytes that it must move)}"""
    out, gradient = row_results(logits.shape[0]), torch.empty_like(logits)
    compiled = torch.compile(eager, dynamic=False)
    forward = functools.partial(doors.forward, logits, targets, out=out)
    backward = functools.partial(doors.backward, logits, targets, out[0], upstream, gradient)
    return {
        "copy": (lambda: gradient.copy_(logits), 2),
        "forward": (forward, 1),
        "backward": (backward, 2),
        "both": (lambda: (forward(), backward()), 3),
        "forward eager": (lambda: eager(logits, targets), 1),
        "both eager": (lambda: both_passes(eager, logits, targets, upstream), 3),
        "forward compile": (lambda: compiled(logits, targets), 1),
        "both compile": (lambda: both_passes(compiled, logits, targets, upstream), 3),
    }


def measure(doors, rows, vocabulary, dtype, repetitions):
    torch.cuda.empty_cache()
    logits = torch.randn(rows, vocabulary, device=DEVICE).to(dtype)
    targets = torch.randint(vocabulary, (rows,), device=DEVICE)
    methods = methods_of(doors, logits, targets, torch.randn(2, rows, device=DEVICE) / rows)
    return of_logits(logits, methods, repetitions)


def measure_policy(doors, repetitions, rows=512, columns=4096):
    logps, *others = (torch.randn(rows, columns, device=DEVICE) * 0.01 for _ in range(5))
    mask = torch.ones(rows, columns, dtype=torch.uint8, device=DEVICE)
    workspace, dlogps = doors.policy_workspace(rows, columns), torch.empty_like(logps)

    def eager_ppo():
        x = logps.detach().requires_grad_()
        ratio = torch.exp(x - others[0])
        loss = -torch.min(ratio * others[3], ratio.clamp(0.8, 1.2) * others[3])
        ((loss * mask).sum() / mask.sum()).backward()

    methods = {"ppo eager": (eager_ppo, 0)}
    for name in ("ppo", "grpo", "gspo", "turn_mean", "decoupled_ppo"):
        arguments = (name, [logps, *others], mask, dlogps, workspace)
        doors.policy_loss(*arguments)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # without the host's part
            doors.policy_loss(*arguments)
        methods[name] = (graph.replay, 0)
    return of_tokens((rows, columns), methods, repetitions)


# ---- report --------------------------------------------------------------------------------------


def options():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("doors", type=pathlib.Path)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--quick", action="store_true")
    return parser.parse_args()


def parts_of(doors, chosen):
    """{name: call}, in the order of what is to be known first."""
    if chosen.quick:
        return {
            "rows": lambda: check_rows(doors, quick=True),
            "policy": lambda: check_policy(doors, 8, 100),
        }
    shapes = [
        (chosen.rows, torch.bfloat16),
        (chosen.rows, torch.float32),
        (min(chosen.rows, 256), torch.bfloat16),
    ]
    return {
        "rows": lambda: check_rows(doors, quick=False),
        "policy": lambda: check_policy(doors),
        "bits": lambda: check_bits(doors),
        "beyond_31_bits": lambda: check_beyond_31_bits(doors),
        "policy_times": lambda: measure_policy(doors, chosen.repetitions),
        "times": lambda: [
            measure(doors, rows, chosen.vocabulary, dtype, chosen.repetitions)
            for rows, dtype in shapes
        ],
    }


def failures(name, part):
    """What did not pass in a part of the report."""
    each = part if isinstance(part, list) else [part]
    return [{name: one} for one in each if not one.get("passed", True)]


def main(parts_of=parts_of):
    chosen = options()
    doors = Doors(chosen.doors)
    torch.manual_seed(0)
    report = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "failed": []}
    for name, call in parts_of(doors, chosen).items():
        try:
            report[name] = call()
            torch.cuda.synchronize()
        except Exception as error:  # the rest of the report is wanted all the same
            report[name] = {"passed": False, "error": str(error)}
        report["failed"] += failures(name, report[name])
        if chosen.json:
            chosen.json.write_text(json.dumps(report, indent=1))
    print(json.dumps(report, indent=1))
    print(f"{len(report['failed'])} failed", file=sys.stderr)
    return 1 if report["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
