"""Losses and log-probabilities: tether beside plain torch, torch.compile, TRL, verl and Liger.

    python -m tether.bench [--policy 8x16 ...] [--preference 64x256 ...] [--logits 512x32000 ...]
                           [--kl 512x32000 ...] [--linear 512x1024x32000 ...]
                           [--dtypes float32 bfloat16] [--threads 1 2] [--methods NAME ...]
                           [--full] [--repetitions N] [--seconds S] [--no-peak]
                           [--json FILE] [--picture FILE]

The peers' real functions, in one process; one that is not installed is left out with a line.
Medians of wall time by torch.utils.benchmark, repetitions interleaved. The heap is kept warm (glibc
is told to keep memory), the best case for whoever allocates. "MB" is the peak above the inputs in a
fresh process. The machine's own figures are torch's: sum for reading, copy_ for copying, add_ for
in place.
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
import re
import sys
from collections.abc import Callable

from tether.bench.clock import KINDS, Settings, child, measured
from tether.bench.tables import picture, table, targets

# A minute or two, and those of docs/speed.md, which take an hour.
SHAPES = {
    "policy": ["8x16", "64x1024"],
    "preference": ["64x256"],
    "logits": ["256x32000"],
    "kl": ["256x32000"],
    "linear": ["256x512x32000"],
}
FULL = {
    "policy": ["8x16", "64x1024", "512x4096"],
    "preference": ["8x16", "64x1024"],
    "logits": ["512x32000", "512x128256", "512x151936"],
    "kl": ["512x32000"],
    "linear": ["512x1024x32000"],
}


def keep_heap_warm() -> None:
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: what was freed stays


def versions() -> dict[str, str]:
    out = {}
    for package in ("torch", "tether", "trl", "verl", "liger-kernel"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            out[package] = importlib.metadata.version(package)
    return out


def cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(": ")[2]
    return platform.processor()


def positive(word: str) -> int:
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {word}")
    return number


def shape_of(kind: str) -> Callable[[str], str]:
    """Of words like those of SHAPES."""
    example = SHAPES[kind][0]

    def checked(word: str) -> str:
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", word) or word.count("x") != example.count("x"):
            raise argparse.ArgumentTypeError(f"must be numbers like {example}, got {word}")
        return word

    return checked


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tether.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,
    )
    add = parser.add_argument
    for kind in KINDS:
        add(f"--{kind}", nargs="+", type=shape_of(kind), metavar="SHAPE")
    add("--full", action="store_true", help="the shapes, dtypes and threads of docs/speed.md")
    add("--methods", nargs="*")
    add("--dtypes", nargs="*", choices=("float32", "float64", "bfloat16", "float16"))
    add("--threads", nargs="*", type=positive)
    add("--repetitions", type=positive, default=5)
    add("--seconds", type=float, default=0.05, help="at least, of each repetition")
    add("--no-peak", action="store_true")
    add("--json", type=pathlib.Path)
    add("--picture", type=pathlib.Path)
    return parser.parse_args()


def shapes_of(options: argparse.Namespace) -> dict[str, list[str]]:
    """Those of kinds that are named, or of all where none is."""
    named = {kind: getattr(options, kind) for kind in KINDS}
    if all(each is None for each in named.values()):
        return FULL if options.full else SHAPES
    return {kind: each for kind, each in named.items() if each}


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        return child(*sys.argv[2:])
    options = parsed()
    keep_heap_warm()
    header = {"cpu": cpu_model(), "cores": os.cpu_count(), "versions": versions()}
    print(f"{header['cpu']}, {header['cores']} cores; {header['versions']}")
    dtypes = options.dtypes or (["float32", "bfloat16"] if options.full else ["float32"])
    threads = options.threads or ([1, 2] if options.full else [1])
    settings = Settings(
        options.methods, options.repetitions, options.seconds, peak=not options.no_peak
    )
    results = []
    for kind, shapes in shapes_of(options).items():
        for shape in (tuple(map(int, words.split("x"))) for words in shapes):
            for dtype in dtypes:
                for count in threads:
                    results.append(measured(kind, shape, dtype, count, settings))
                    print("\n".join(table(results[-1])), flush=True)
    print("\n".join(targets(results)))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(header | {"results": results}, indent=1) + "\n")
    if options.picture:
        picture(results, options.picture)


if __name__ == "__main__":
    main()
