#!/usr/bin/env python3
"""The operators on CUDA tensors, in Python on a GPU: beside torch's operations, and their times.

usage: face.py FOLDER [--json FILE] [--device DEVICE]

FOLDER has libtether_ops.so and libtether_cuda.so of the build; nothing is installed. Ends with 1 if
an error is larger than its bound. --device cpu tries this script without a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import sys
import tempfile
import time

import face_doors
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def imported(libraries, folder):
    """The package of the checkout with these libraries."""
    package = folder / "tether"
    package.mkdir()
    sources = (ROOT / "python/tether").iterdir()
    for file in (*sources, *libraries.glob("libtether_*.so")):
        (package / file.name).symlink_to(file.resolve())
    information = folder / "tether-0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: tether\nVersion: 0\n")
    sys.path.insert(0, str(folder))
    import tether

    return tether


def batch_of(dtype, device):
    def numbers(*size):
        return torch.randn(*size, device=device)

    logps = -numbers(64, 500).abs()
    return {
        "logps": logps.to(dtype),
        "advantages": numbers(64),
        "response_mask": numbers(64, 500) > -0.5,
        "old_logps": logps + 0.1 * numbers(64, 500),
        "ref_logps": (logps + 0.1 * numbers(64, 500)).to(dtype),
        "rollout_logps": logps + 0.1 * numbers(64, 500),
        "entropies": numbers(64, 500).abs(),
        "entropy_coef": 0.01,
    }


def loss_and_gradients(tether, batch, objective):
    """With the counts of the step where they are on the device, as ranks would add them up."""
    leaves = {name: batch[name].detach().requires_grad_() for name in ("logps", "entropies")}
    rest = {name: each for name, each in batch.items() if name not in leaves}
    tensors = {name: each for name, each in rest.items() if name != "entropy_coef"}
    counts = tether.local_counts(batch["logps"], **tensors, objective=objective)
    out = tether.policy_loss(**leaves, **rest, objective=objective, normalizer=counts + counts)
    (out.loss * 3).backward()
    return out.loss, *(each.grad for each in leaves.values()), *out.metrics


def turns_and_gradients(tether, batch, ids, level):
    gate = {"ratio_gate": {"high": 1.2, "level": "turn_max"}}
    leaf = batch["logps"].detach().requires_grad_()
    rest = {k: x for k, x in batch.items() if k not in ("entropies", "entropy_coef")}
    out = tether.policy_loss(**rest | {"logps": leaf}, turn_ids=ids, level=level, weights=gate)
    (out.loss * 3).backward()
    return out.loss, leaf.grad, *out.metrics


def rows_and_gradients(tether, logits, targets, buffer=False):
    leaf = logits.detach().clone().requires_grad_()
    memory = torch.empty_like(logits) if buffer else None
    out = tether.token_logps(leaf, targets, temperature=0.7, entropies=True, gradient_buffer=memory)
    (out.logps.sum() * 2 + out.entropies.sum()).backward()
    return out.logps, out.entropies, leaf.grad


def linear_and_gradients(tether, batch):
    leaves = {name: batch[name].detach().requires_grad_() for name in ("hidden", "weight")}
    out = tether.linear_policy_loss(**batch | leaves, beta=0.1, chunk_bytes=1 << 20)
    (out.loss * 2).backward()
    return out.loss, out.logps, *(each.grad for each in leaves.values())


def gap(found, wanted):
    """The largest difference, of each result to its size; infinite where one alone is NaN."""
    gaps = []
    for a, b in zip(found, wanted, strict=True):
        if not torch.equal(a.isnan(), b.isnan()):
            return math.inf
        a, b = (each.detach().double().nan_to_num() for each in (a, b))
        size = b.abs().max().clamp(min=1e-30) if b.numel() else torch.ones(())
        gaps.append(float((a - b).abs().max() / size) if b.numel() else 0.0)
    return max(gaps)


def both(without_kernels, call):
    """By kernels, and by torch's operations."""
    found = call()
    with without_kernels():
        return found, call()


def check_losses(tether, without_kernels, device):
    found = []
    for dtype, bound in BOUNDS.items():
        batch = batch_of(dtype, device)
        for objective in tether.objectives("policy"):
            results = both(
                without_kernels, lambda b=batch, o=objective: loss_and_gradients(tether, b, o)
            )
            error = gap(*results)
            found.append({"objective": objective, "dtype": str(dtype), "error": error,
                          "passed": error < bound})  # fmt: skip
    return found


def check_turns(tether, without_kernels, device):
    found = []
    of_slots = torch.arange(500, device=device).div(30, rounding_mode="floor").repeat(64, 1)
    for dtype, bound in BOUNDS.items():
        batch = batch_of(dtype, device)
        for level in ("turn_mean", "turn_token", "turn_sum"):
            for ids in (None, of_slots):
                results = both(
                    without_kernels,
                    lambda b=batch, i=ids, x=level: turns_and_gradients(tether, b, i, x),
                )
                error = gap(*results)
                found.append({"level": level, "ids": ids is not None, "dtype": str(dtype),
                              "error": error, "passed": error < bound})  # fmt: skip
    return found


def check_rows(tether, without_kernels, device):
    found = []
    for dtype, bound in BOUNDS.items():
        logits = (3 * torch.randn(4, 9, 5000, device=device)).to(dtype)[:, 1:]
        targets = torch.randint(5000, (4, 8), device=device)
        targets[1, 2] = -100
        results = both(
            without_kernels, lambda x=logits, y=targets: rows_and_gradients(tether, x, y)
        )
        error = gap(*results)
        in_buffer = gap(rows_and_gradients(tether, logits, targets, buffer=True), results[0])
        found.append({"dtype": str(dtype), "error": error, "buffer": in_buffer,
                      "passed": error < bound and in_buffer == 0})  # fmt: skip
    return found


def check_linear(tether, without_kernels, device):
    found = []
    for dtype, bound in BOUNDS.items():
        losses = batch_of(torch.float32, device)
        batch = {name: losses[name] for name in ("advantages", "response_mask", "ref_logps")}
        batch |= {
            "hidden": torch.randn(64, 500, 128, device=device).to(dtype),
            "weight": (0.1 * torch.randn(3000, 128, device=device)).to(dtype),
            "targets": torch.randint(3000, (64, 500), device=device),
        }
        results = both(without_kernels, lambda b=batch: linear_and_gradients(tether, b))
        error = gap(*results)
        found.append({"dtype": str(dtype), "error": error, "passed": error < 4 * bound})
    return found


def milliseconds(call, device, repetitions=50):
    """Of a whole call, the host's part too."""
    for _ in range(5):
        call()
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(repetitions):
        call()
    wait()
    return 1e3 * (time.perf_counter() - start) / repetitions


def measure(tether, without_kernels, device):
    batch = batch_of(torch.float32, device)

    def call():
        return loss_and_gradients(tether, batch, "grpo")

    kernels = milliseconds(call, device)
    with without_kernels():
        return {"ms of grpo": {"kernels": kernels, "torch": milliseconds(call, device)}}


def options():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("libraries", type=pathlib.Path)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    return parser.parse_args()


def main():
    chosen = options()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        tether = imported(chosen.libraries, pathlib.Path(folder))
        from unittest import mock

        module = "tether._cuda.KERNELS" if chosen.device == "cuda" else "tether._ops.KERNELS"

        def without_kernels():
            return mock.patch(module, frozenset())

        arguments = (tether, without_kernels, chosen.device)
        report = {
            "kernels": sorted(tether._cuda.KERNELS),
            "losses": check_losses(*arguments),
            "turns": check_turns(*arguments),
            "rows": check_rows(*arguments) if chosen.device == "cuda" else [],
            "linear": check_linear(*arguments),
            "doors": face_doors.check(*arguments, BOUNDS, gap),
            "times": measure(*arguments)
            | {"ms of doors": face_doors.measure(*arguments, milliseconds)},
        }
    parts = ("losses", "turns", "rows", "linear", "doors")
    failed = [each for part in parts for each in report[part] if not each["passed"]]
    if chosen.json:
        chosen.json.write_text(json.dumps(report | {"failed": failed}, indent=1))
    print(json.dumps({"failed": failed, "times": report["times"]}, indent=1))
    return 1 if failed or not report["kernels"] else 0


if __name__ == "__main__":
    sys.exit(main())
