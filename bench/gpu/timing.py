"""Times and memory of methods on the GPU, beside what is wanted of them."""

from __future__ import annotations

import statistics

import torch

# What an H200 is to reach; a report says so and does not fail by it. Rates, in those of a copy in
# the same run: {method: [(dtype, rows, vocabulary, share of masked rows, at least)]}. Masked rows
# are not read, and count all the same.
OF_COPY = {
    "forward": [
        ("bfloat16", 8192, 151936, 0.0, 0.92),
        ("bfloat16", 256, 151936, 0.0, 0.6),
    ],
    "backward": [
        ("bfloat16", 8192, 151936, 0.0, 0.92),
        ("bfloat16", 256, 151936, 0.0, 0.6),
    ],
    "one": [
        ("bfloat16", 8192, 151936, 0.0, 0.88),
        ("bfloat16", 8192, 151936, 0.4, 0.88 / 0.85),
        ("float32", 8192, 151936, 0.0, 0.92),
        ("bfloat16", 8192, 32000, 0.0, 0.85),
        ("bfloat16", 256, 151936, 0.0, 0.6),
    ],
    "values": [("bfloat16", 2048, 151936, 0.0, 0.88)],
}
# {method: (rows, columns, at most)}
MILLISECONDS = {"ppo": (512, 4096, 0.016), "gae": (8192, 2048, 0.055)}


def interleaved(methods, repetitions):
    """Medians in ms; a method that fails is left out with its error."""
    times, errors = {name: [] for name in methods}, {}
    for repetition in range(repetitions + 3):
        for name, (call, _) in methods.items():
            if name in errors:
                continue
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            try:
                start.record()
                call()
                end.record()
            except Exception as error:  # a compiler that is not there, memory
                errors[name] = str(error).splitlines()[0]
                continue
            end.synchronize()
            if repetition >= 3:
                times[name].append(start.elapsed_time(end))
    return {name: statistics.median(each) for name, each in times.items() if each}, errors


def peak_megabytes(call):
    """What a call takes of the device beside its inputs and the results that are there before."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def of_tokens(shape, methods, repetitions):
    """Times of methods whose bytes nobody counts."""
    times, errors = interleaved(methods, repetitions)
    target = {
        name: most
        for name, (*size, most) in MILLISECONDS.items()
        if name in times and size == list(shape)
    }
    reached = {name: times[name] <= most for name, most in target.items()}
    return {"shape": list(shape), "ms": times, "errors": errors, "target": target,
            "reached": reached}  # fmt: skip


def of_logits(logits, methods, repetitions, masked=0.0):
    """Times, memory, and rates by how many times the logits' bytes each method must move."""
    times, errors = interleaved(methods, repetitions)
    size = logits.numel() * logits.element_size()
    rates = {name: methods[name][1] * size / ms / 1e6 for name, ms in times.items()}
    of_copy = {name: rate / rates["copy"] for name, rate in rates.items()}
    case = (str(logits.dtype).removeprefix("torch."), *logits.shape, masked)
    target = {
        name: least
        for name in times
        for *each, least in OF_COPY.get(name, [])
        if tuple(each) == case
    }
    return {
        "shape": list(logits.shape),
        "dtype": str(logits.dtype),
        "masked": masked,
        "ms": times,
        "GB/s": rates,
        "of_copy": of_copy,
        "target": target,
        "reached": {name: of_copy[name] >= least for name, least in target.items()},
        "peak MB": {name: peak_megabytes(methods[name][0]) for name in times},
        "errors": errors,
    }
