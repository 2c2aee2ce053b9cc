"""Estimators on the GPU beside the CPU kernels: errors, bits of two runs, times."""

from __future__ import annotations

import torch
from library import DEVICE, pointers, stream_of
from timing import of_tokens

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
    return of_tokens((rows, columns), methods, repetitions)


# ---- groups and whitening ------------------------------------------------------------------------


def group_advantage(doors, name, size, rewards, ids, lengths):
    out = torch.full_like(rewards, 7.0)
    doors.call("group_advantage", name.encode(), len(rewards), size, rewards, ids, lengths, out,
               rewards.is_cuda, stream_of(rewards))  # fmt: skip
    return out


def check_groups(doors, count=4096):
    torch.manual_seed(3)
    rewards, lengths = torch.randn(count), torch.randint(1, 1000, (count,)).float()
    arrays = rewards, torch.randint(count // 8, (count,)), lengths
    on_device = [each.to(DEVICE) for each in arrays]
    found = []
    for name in doors.names("group_rules"):
        for size in (0, 1, 8):
            want = group_advantage(doors, name, size, *arrays)
            got = group_advantage(doors, name, size, *on_device)
            same = torch.equal(got, group_advantage(doors, name, size, *on_device))
            error = float(((got.cpu() - want).abs() / (1 + want.abs())).max())
            found.append({"rule": name, "group_size": size, "error": error, "same_bits": same,
                          "passed": same and error < 1e-6})  # fmt: skip
    return found


def whiten(doors, values, mask):
    out = torch.full_like(values, 7.0)
    size = doors.number("moments_bytes", *values.shape)
    workspace = torch.empty(size, dtype=torch.uint8, device=values.device)
    doors.call("whiten", *values.shape, values, mask, workspace, out, values.is_cuda,
               stream_of(values))  # fmt: skip
    return out


def check_whitening(doors, shapes=((64, 1000), (1, 300001))):
    found = []
    for shape in shapes:
        values, mask = 1000 + 0.1 * torch.randn(shape), (torch.rand(shape) < 0.7).byte()
        want = whiten(doors, values, mask)
        got = whiten(doors, values.to(DEVICE), mask.to(DEVICE))
        same = torch.equal(got, whiten(doors, values.to(DEVICE), mask.to(DEVICE)))
        error = float((got.cpu() - want).abs().max())
        found.append({"shape": shape, "error": error, "same_bits": same,
                      "passed": same and error < 1e-5})  # fmt: skip
    return found


# ---- report --------------------------------------------------------------------------------------


def quick_parts(doors):
    return {
        "scan": lambda: check_scan(doors, [(3, 1030)]),
        "groups": lambda: check_groups(doors, 64),
        "whitening": lambda: check_whitening(doors, [(3, 2100)]),
    }


def parts(doors, repetitions):
    return {
        "scan": lambda: check_scan(doors),
        "groups": lambda: check_groups(doors),
        "whitening": lambda: check_whitening(doors),
        "scan_times": lambda: measure_scan(doors, repetitions),
    }
