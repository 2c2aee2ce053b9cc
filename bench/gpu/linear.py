#!/usr/bin/env python3
"""The policy loss of hidden states in Python on a GPU, both passes, beside its three products.

usage: linear.py FOLDER [--json FILE] [--device DEVICE] [--sizes TOKENS HIDDEN VOCABULARY]
                 [--repetitions N]

FOLDER is that of face.py. --device cpu tries this script without a GPU.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
import tempfile

import torch
from timing import peak_megabytes

from face import imported, milliseconds

# Of the products' time, at most: what an H200 is to reach, where the sizes are the standard ones.
TARGET = 1.06
SIZES = (4096, 4096, 128256)


def batch_of(sizes, device):
    tokens, width, vocabulary = sizes
    shape = (4, tokens // 4)

    def numbers(*size):
        return torch.randn(*size, device=device)

    old = 0.1 * numbers(*shape) - 12
    return {
        "hidden": numbers(*shape, width).bfloat16().requires_grad_(),
        "weight": (0.02 * numbers(vocabulary, width)).bfloat16().requires_grad_(),
        "targets": torch.randint(vocabulary, shape, device=device),
        "advantages": numbers(shape[0]),
        "response_mask": torch.ones(shape, dtype=torch.bool, device=device),
        "old_logps": old,
    }


def methods_of(tether, batch):
    """{name: call}"""
    leaves = batch["hidden"], batch["weight"]
    hidden, weight = (each.detach() for each in (batch["hidden"].flatten(0, 1), batch["weight"]))
    dlogits = torch.randn(len(hidden), len(weight), device=hidden.device).bfloat16()

    def products():
        return hidden @ weight.T, dlogits @ weight, dlogits.T @ hidden

    def loss():
        out = tether.linear_policy_loss(**batch, objective="ppo")
        return torch.autograd.grad(out.loss, leaves)

    return {"products": products, "linear_policy_loss": loss}


def measure(tether, chosen):
    methods, times, device = (
        methods_of(tether, batch_of(chosen.sizes, chosen.device)),
        {},
        chosen.device,
    )
    for _ in range(chosen.repetitions):
        for name, call in methods.items():
            times.setdefault(name, []).append(milliseconds(call, device, repetitions=1))
    medians = {name: statistics.median(each) for name, each in times.items()}
    ratio = medians["linear_policy_loss"] / medians["products"]
    standard = tuple(chosen.sizes) == SIZES
    return {
        "sizes": chosen.sizes,
        "ms": medians,
        "of_products": ratio,
        "target": TARGET if standard else None,
        "reached": ratio <= TARGET if standard else None,
        "peak MB": {name: peak_megabytes(call) for name, call in methods.items()}
        if device == "cuda"
        else {},
    }


def options():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("libraries", type=pathlib.Path)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--sizes", type=int, nargs=3, default=list(SIZES))
    parser.add_argument("--repetitions", type=int, default=10)
    return parser.parse_args()


def main():
    chosen = options()
    torch.manual_seed(0)
    on_gpu = chosen.device == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        tether = imported(chosen.libraries, pathlib.Path(folder))
        report = {
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "kernels": sorted(tether._cuda.KERNELS),
            **measure(tether, chosen),
        }
    if chosen.json:
        chosen.json.write_text(json.dumps(report, indent=1))
    print(json.dumps(report, indent=1))
    return 1 if on_gpu and not report["kernels"] else 0


if __name__ == "__main__":
    sys.exit(main())
