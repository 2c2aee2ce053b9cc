"""Times of methods on the GPU, by CUDA events."""

from __future__ import annotations

import statistics

import torch


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


def of_logits(logits, methods, repetitions, **shown):
    """Times, and rates by how many times the logits' bytes each method must move."""
    times, errors = interleaved(methods, repetitions)
    size = logits.numel() * logits.element_size()
    rates = {name: methods[name][1] * size / ms / 1e6 for name, ms in times.items()}
    return {
        "shape": list(logits.shape),
        "dtype": str(logits.dtype),
        **shown,
        "ms": times,
        "GB/s": rates,
        "of_copy": {name: rate / rates["copy"] for name, rate in rates.items()},
        "errors": errors,
    }
