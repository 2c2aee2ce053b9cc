#!/usr/bin/env python3
"""Log-probabilities from logits: tether beside its peers, their real functions in one process.

usage: logits.py [--logits 512x32000 ...] [--kl 512x32000 ...] [--linear 512x1024x32000 ...]
                 [--dtypes float32 bfloat16] [--threads 1 2] [--methods NAME ...]
                 [--repetitions N] [--no-peak] [--json FILE]

logits    log-probabilities of the targets and entropies: forward, and both passes with random
          upstream gradients
kl        exact KL(q || p) and entropy of q of two rows of logits, with the gradients of q
linear    from hidden states: log-probabilities only; "products" are the matrix products alone, one
          for forward and three for both

Interleaved repetitions, medians of wall time. The heap is kept warm (glibc is told to keep memory),
the best case for whoever allocates. "MB" is the peak above the inputs in a fresh process. The
machine's own figures are torch's: sum for reading, copy_ for copying, add_ for in place. A peer
that is not installed is left out with a line; ./dev bench peers installs them.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F


def keep_heap_warm():
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


# ---- methods on logits: (logits, targets, buffer) -> (logps, entropies) --------------------------


def eager(logits, targets, _=None):
    log_p = torch.log_softmax(logits.float(), -1)
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def tether_method():
    import tether

    return lambda logits, targets, _: tether.token_logps(logits, targets, entropies=True)[:2]


def tether_own_buffer():
    import tether

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
    import tether

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
    import tether

    return lambda hidden, weight, targets: tether.linear_token_logps(hidden, weight, targets).logps


def linear_kept(size):
    """Over kept sets of so many ids, which are made once."""
    import tether

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
    return lambda hidden, weight, targets: (
        -F.linear_cross_entropy(hidden, weight, targets, reduction="none")
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
    import tether

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
    "products": None,
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


VOCABULARIES = (32000, 128256, 151936)


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
    hidden, weight, targets = inputs["hidden"], inputs["weight"], inputs["targets"]
    if not both:
        with torch.no_grad():
            return method(hidden, weight, targets)
    out = method(hidden, weight, targets)
    upstream = inputs["upstream"].to(out.dtype) if out.dim() else torch.ones_like(out)
    return torch.autograd.grad(out, (hidden, weight), upstream)


def run_products(inputs, both):
    hidden, weight = inputs["hidden"].detach(), inputs["weight"].detach()
    if "logits" not in inputs:
        inputs["logits"] = torch.empty(len(hidden), len(weight), dtype=hidden.dtype)
    torch.mm(hidden, weight.t(), out=inputs["logits"])
    if both:
        return inputs["logits"] @ weight, inputs["logits"].t() @ hidden
    return None


def made(methods, name):
    """The method, or None with a line if its package is not there."""
    try:
        return methods[name]()
    except ImportError as error:
        print(f"left out: {name}: {error}", file=sys.stderr)
        return None


KINDS = {
    "logits": (LOGITS_METHODS, logits_inputs, run_logits),
    "kl": (KL_METHODS, kl_inputs, run_kl),
    "linear": (LINEAR_METHODS, linear_inputs, run_linear),
}


def calls(kind, inputs, only=None):
    """{(name, pass): function without arguments}"""
    methods, _, run = KINDS[kind]
    out = {}
    for name in methods if only is None else [name for name in methods if name in only]:
        if methods[name] is None:
            for both in (False, True):
                out[name, both] = lambda both=both: run_products(inputs, both)
            continue
        method = made(methods, name)
        if method is None:
            continue
        for both in (False, True):
            if not (name.endswith("own buffer") and not both):
                out[name, both] = lambda method=method, both=both: run(method, inputs, both)
    return out


def medians(functions, repetitions):
    """Wall milliseconds of each, interleaved, after one run of each that is not counted."""
    times = {key: [] for key in functions}
    for repetition in range(repetitions + 1):
        for key, function in functions.items():
            start = time.perf_counter()
            function()
            if repetition > 0:
                times[key].append(1e3 * (time.perf_counter() - start))
    return {key: statistics.median(each) for key, each in times.items()}


def peak_of_child(kind, shape, dtype, name):
    """MB above the inputs, of forward and backward in a fresh process; None if it failed."""
    command = [sys.executable, __file__, "--child", kind, "x".join(map(str, shape)), dtype, name]
    child = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    return float(child.stdout.split()[-1]) if child.returncode == 0 else None


def peak_memory():
    """Bytes that the process has held at most since the last reset."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmHWM in /proc/self/status")


def child(kind, shape, dtype, name):
    shape = tuple(map(int, shape.split("x")))
    make = KINDS[kind][1]
    inputs = make(shape, getattr(torch, dtype))
    # What the method loads and compiles is not its memory: a small run first.
    small = (8, *shape[1:-1], 256)
    calls(kind, make(small, getattr(torch, dtype)), [name])[name, True]()
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = peak_memory()
    calls(kind, inputs, [name])[name, True]()
    print((peak_memory() - before) / 1e6)


def machine(logits, repetitions):
    """GB/s of reading, copying and changing in place as many bytes as the logits have."""
    flat, other = logits.detach().view(-1), torch.empty_like(logits).view(-1)
    size = flat.numel() * flat.element_size() / 1e6
    functions = {
        "read": lambda: flat.sum(),
        "copy": lambda: other.copy_(flat),
        "in place": lambda: other.add_(1),
    }
    passes = {"read": 1, "copy": 2, "in place": 2}
    times = medians(functions, repetitions)
    return {name: passes[name] * size / times[name] for name in functions}


def measured(kind, shape, dtype, threads, options):
    torch.set_num_threads(threads)
    torch._dynamo.reset()  # else the eighth configuration would run uncompiled
    inputs = KINDS[kind][1](shape, getattr(torch, dtype))
    functions = calls(kind, inputs, options.methods)
    times = medians(functions, options.repetitions)
    limits = {} if kind == "linear" else machine(inputs["logits"], options.repetitions)
    rows = []
    for (name, both), milliseconds in times.items():
        peak = None
        if both and not options.no_peak and threads == 1:
            peak = peak_of_child(kind, shape, dtype, name)
        rows.append({"method": name, "both": both, "ms": milliseconds, "peak_mb": peak})
    return {
        "kind": kind,
        "shape": "x".join(map(str, shape)),
        "dtype": dtype,
        "threads": threads,
        "machine_gb_per_s": limits,
        "rows": rows,
    }


def table(result):
    times = {(row["method"], row["both"]): row["ms"] for row in result["rows"]}
    limits = ", ".join(f"{name} {v:.1f} GB/s" for name, v in result["machine_gb_per_s"].items())
    yield (
        f"{result['kind']} {result['shape']} {result['dtype']}, {result['threads']} thread(s)"
        + (f"; torch's {limits}" if limits else "")
    )
    yield f"  {'':28} {'forward ms':>11} {'x tether':>9} {'both ms':>9} {'x tether':>9} {'MB':>7}"
    peaks = {row["method"]: row["peak_mb"] for row in result["rows"] if row["both"]}
    for name in dict.fromkeys(row["method"] for row in result["rows"]):
        cells = []
        for both in (False, True):
            ours = times.get(("tether", both))
            value = times.get((name, both))
            cells += [
                "" if value is None else f"{value:.1f}",
                "" if value is None or ours is None else f"{value / ours:.2f}",
            ]
        peak = "" if peaks.get(name) is None else f"{peaks[name]:.0f}"
        yield f"  {name:28} {cells[0]:>11} {cells[1]:>9} {cells[2]:>9} {cells[3]:>9} {peak:>7}"


# (kind, pass, what is to be so many times slower than tether, how many times)
TARGETS = (
    ("logits", True, "eager", 9),
    ("logits", True, "trl", 15),
    ("logits", True, "torch.compile", 3.5),
    ("kl", False, "torch.compile", 2.5),
)


def targets(results):
    """(what, the ratio to tether, its bound): one thread, float32, the largest vocabulary."""
    for kind, both, method, bound in TARGETS:
        for result in results:
            shape = {"logits": "512x151936", "kl": "512x32000"}[kind]
            if (result["kind"], result["shape"]) != (kind, shape):
                continue
            if (result["dtype"], result["threads"]) != ("float32", 1):
                continue
            times = {row["method"]: row["ms"] for row in result["rows"] if row["both"] == both}
            if method in times and "tether" in times:
                passes = "both passes" if both else "forward"
                what = f"{kind} {shape} float32, {passes}: {method} over tether"
                yield what, times[method] / times["tether"], bound


def versions():
    out = {}
    for package in ("torch", "tether", "trl", "verl", "liger-kernel"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            out[package] = importlib.metadata.version(package)
    return out


def cpu_model():
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(": ")[2]
    return platform.processor()


def shape_of(words):
    return tuple(map(int, words.split("x")))


def main():
    if sys.argv[1:2] == ["--child"]:
        return child(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--logits", nargs="*", type=shape_of, default=[(512, v) for v in VOCABULARIES])
    add("--kl", nargs="*", type=shape_of, default=[(512, 32000)])
    add("--linear", nargs="*", type=shape_of, default=[(512, 1024, 32000)])
    add("--methods", nargs="*", default=None)
    add("--dtypes", nargs="*", default=["float32", "bfloat16"])
    add("--threads", nargs="*", type=int, default=[1, 2])
    add("--repetitions", type=int, default=5)
    add("--no-peak", action="store_true")
    add("--json", type=pathlib.Path, default=pathlib.Path("runs/bench/peers.json"))
    options = parser.parse_args()
    keep_heap_warm()
    header = {"cpu": cpu_model(), "cores": os.cpu_count(), "versions": versions()}
    print(f"{header['cpu']}, {header['cores']} cores; {header['versions']}")
    results = []
    for kind in KINDS:
        for shape in getattr(options, kind):
            for dtype in options.dtypes:
                for threads in options.threads:
                    results.append(measured(kind, shape, dtype, threads, options))
                    print("\n".join(table(results[-1])), flush=True)
    for what, value, bound in targets(results):
        word = "reached" if value >= bound else "missed"
        print(f"{word:7}  {what} {value:.2f}, wanted >= {bound}")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(header | {"results": results}, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
