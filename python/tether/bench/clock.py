"""Time and memory of one kind of functions, method by method."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils.benchmark import Measurement, Timer

from tether.bench import losses, rows


class Kind(NamedTuple):
    methods: dict[str, Callable]  # makes the method, or raises ImportError
    inputs: Callable
    run: Callable
    moves_logits: bool = False  # is measured by its peak and the machine's bandwidth
    has_peak: bool = True


KINDS = {
    "policy": Kind(losses.POLICY_METHODS, losses.policy_inputs, losses.run_policy, has_peak=False),
    "preference": Kind(
        losses.PREFERENCE_METHODS, losses.policy_inputs, losses.run_preference, has_peak=False
    ),
    "logits": Kind(rows.LOGITS_METHODS, rows.logits_inputs, rows.run_logits, moves_logits=True),
    "kl": Kind(rows.KL_METHODS, rows.kl_inputs, rows.run_kl, moves_logits=True),
    "linear": Kind(rows.LINEAR_METHODS, rows.linear_inputs, rows.run_linear),
}


class Settings(NamedTuple):
    methods: list[str] | None = None  # None: all
    repetitions: int = 5
    seconds: float = 0.05  # at least, of each repetition
    peak: bool = True


def calls(kind: str, inputs: dict[str, Any], only: list[str] | None = None):
    """{(name, whether with backward): function without arguments}; a method whose package is not
    there is left out with a line."""
    out = {}
    for name, make in KINDS[kind].methods.items():
        if only is not None and name not in only:
            continue
        try:
            method = make()
        except ImportError as error:
            print(f"left out: {name}: {error}", file=sys.stderr)
            continue
        for both in (False, True):
            if both or not name.endswith("own buffer"):
                run = KINDS[kind].run
                out[name, both] = lambda run=run, method=method, both=both: run(
                    method, inputs, both
                )
    return out


def medians(functions: dict[Any, Callable], settings: Settings) -> dict[Any, float]:
    """Milliseconds of each by torch.utils.benchmark, interleaved, after a call that is not
    counted."""
    timers, found = {}, {key: [] for key in functions}
    for key, function in functions.items():
        function()
        timers[key] = Timer(
            "function()", globals={"function": function}, num_threads=torch.get_num_threads()
        )
    for _ in range(settings.repetitions):
        for key, timer in timers.items():
            found[key].append(timer.blocked_autorange(min_run_time=settings.seconds))
    return {key: 1e3 * Measurement.merge(each)[0].median for key, each in found.items()}


def measured(kind: str, shape: tuple[int, ...], dtype: str, threads: int, settings: Settings):
    """A configuration, as it stands in the JSON."""
    torch.set_num_threads(threads)
    torch._dynamo.reset()  # else the eighth configuration would run uncompiled
    inputs = KINDS[kind].inputs(shape, getattr(torch, dtype))
    times = medians(calls(kind, inputs, settings.methods), settings)
    limits = machine(inputs["logits"], settings) if KINDS[kind].moves_logits else {}
    found = []
    for (name, both), milliseconds in times.items():
        asked = both and settings.peak and threads == 1 and KINDS[kind].has_peak
        peak = peak_of_child(kind, shape, dtype, name) if asked else None
        found.append({"method": name, "both": both, "ms": milliseconds, "peak_mb": peak})
    return {
        "kind": kind,
        "shape": "x".join(map(str, shape)),
        "dtype": dtype,
        "threads": threads,
        "machine_gb_per_s": limits,
        "rows": found,
    }


def machine(logits: torch.Tensor, settings: Settings) -> dict[str, float]:
    """GB/s of reading, copying and changing in place as many bytes as the logits have."""
    flat, other = logits.detach().view(-1), torch.empty_like(logits).view(-1)
    size = flat.numel() * flat.element_size() / 1e6
    functions = {
        "read": lambda: flat.sum(),
        "copy": lambda: other.copy_(flat),
        "in place": lambda: other.add_(1),
    }
    passes = {"read": 1, "copy": 2, "in place": 2}
    times = medians(functions, settings)
    return {name: passes[name] * size / times[name] for name in functions}


# ---- memory --------------------------------------------------------------------------------------


def peak_of_child(kind: str, shape: tuple[int, ...], dtype: str, name: str) -> float | None:
    """MB above the inputs, of forward and backward in a fresh process; None if it failed."""
    words = ["--child", kind, "x".join(map(str, shape)), dtype, name]
    command = [sys.executable, "-m", "tether.bench", *words]
    child = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    return float(child.stdout.split()[-1]) if child.returncode == 0 else None


def child(kind: str, shape: str, dtype: str, name: str) -> None:
    sizes = tuple(map(int, shape.split("x")))
    make = KINDS[kind].inputs
    inputs = make(sizes, getattr(torch, dtype))
    # What the method loads and compiles is not its memory: a small run first.
    small = (8, *sizes[1:-1], 256)
    calls(kind, make(small, getattr(torch, dtype)), [name])[name, True]()
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _peak_memory()
    calls(kind, inputs, [name])[name, True]()
    print((_peak_memory() - before) / 1e6)


def _peak_memory() -> int:
    """Bytes that the process has held at most since the last reset."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmHWM in /proc/self/status")
