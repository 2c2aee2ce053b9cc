"""Estimators on the GPU beside the CPU kernels: errors, bits of two runs, times."""

from __future__ import annotations

import torch
from library import DEVICE, pointers, stream_of
from timing import interleaved

# ---- recursions over tokens ----------------------------------------------------------------------


def scan(doors, name, decay, arrays, mask, done, gamma=0.99, lam=0.95):
    """[2, rows, columns]: advantages and returns; arrays: rewards, values, log_ratios."""
    rows, columns = mask.shape
    out = torch.full((2, rows, columns), 7.0, device=mask.device)
    doors.call("scan_rows", name.encode(), decay, rows, columns, pointers(arrays), mask, done,
               gamma, lam, out[0], out[1], mask.is_cuda, stream_of(mask))  # fmt: skip
    return out


def scan_batch(rows, columns):
    arrays = list(torch.randn(3, rows, columns) * 0.3)
    mask, done = (torch.rand(2, rows, columns) < torch.tensor([0.8, 0.01])[:, None, None]).byte()
    return arrays, mask, done


def check_scan(doors, shapes=((64, 1000), (3, 70001), (512, 40))):
    torch.manual_seed(2)
    found = []
    for shape in shapes:
        arrays, mask, done = scan_batch(*shape)
        on_device = [each.to(DEVICE) for each in arrays], mask.to(DEVICE), done.to(DEVICE)
        for name in doors.names("recursions"):
            for decay in (False, True):
                want = scan(doors, name, decay, arrays, mask, done)
                got = scan(doors, name, decay, *on_device)
                again = scan(doors, name, decay, *on_device)
                error = float(((got.cpu() - want).abs() / (1 + want.abs())).max())
                same = torch.equal(got, again)
                found.append({"recursion": name, "shape": shape, "decay": decay, "error": error,
                              "same_bits": same, "passed": same and error < 1e-6})  # fmt: skip
    return found


def measure_scan(doors, repetitions, rows=8192, columns=2048):
    """GAE beside a copy of as many bytes as it must read and write: 17 a token."""
    arrays, mask, done = scan_batch(rows, columns)
    arrays, mask, done = [each.to(DEVICE) for each in arrays], mask.to(DEVICE), done.to(DEVICE)
    memory = torch.empty(2, rows * columns * 17 // 2, dtype=torch.uint8, device=DEVICE)
    methods = {"copy": (lambda: memory[0].copy_(memory[1]), 0)}
    for name in ("gae", "vtrace"):
        call = lambda name=name: scan(doors, name, False, arrays, mask, done)  # noqa: E731
        methods[name] = (call, 0)
    times, errors = interleaved(methods, repetitions)
    return {"shape": [rows, columns], "ms": times, "errors": errors}


# ---- report --------------------------------------------------------------------------------------


def quick_parts(doors):
    return {"scan": lambda: check_scan(doors, [(3, 1030)])}


def parts(doors, repetitions):
    return {
        "scan": lambda: check_scan(doors),
        "scan_times": lambda: measure_scan(doors, repetitions),
    }
