"""Losses of preferences and of value heads on the GPU, beside the CPU kernels."""

from __future__ import annotations

import torch
from library import DEVICE, largest, pointers, stream_of


def loss(doors, kind, objective, arrays, mask):
    """[totals], gradients"""
    gradients = torch.full(mask.shape, 7.0, device=mask.device)
    totals = torch.zeros(
        doors.number("loss_totals_bytes") // 8, dtype=torch.float64, device=mask.device
    )
    size = doors.number("loss_workspace_bytes", *mask.shape)
    workspace = torch.empty(size, dtype=torch.uint8, device=DEVICE) if mask.is_cuda else None
    doors.call(f"{kind}_loss", objective.encode(), *mask.shape, pointers(arrays), mask, gradients,
               totals, workspace, stream_of(mask))  # fmt: skip
    return totals, gradients


def batch_of(kind, rows, columns):
    mask = (torch.rand(rows, columns) < 0.8).byte()
    if kind == "value":
        return list(torch.randn(3, rows, columns)), mask
    logps = -1 - torch.randn(rows, columns).abs()
    labels = (torch.arange(rows) % 3 == 0).float()
    return [logps, logps + 0.3 * torch.randn(rows, columns), labels], mask


def check_losses(doors, kind, shapes):
    torch.manual_seed(4)
    found = []
    for shape in shapes:
        arrays, mask = batch_of(kind, *shape)
        on_device = [each.to(DEVICE) for each in arrays], mask.to(DEVICE)
        for objective in doors.names(f"{kind}_objectives"):
            want, dwant = loss(doors, kind, objective, arrays, mask)
            got, dgot = loss(doors, kind, objective, *on_device)
            again, dagain = loss(doors, kind, objective, *on_device)
            same = torch.equal(got, again) and torch.equal(dgot, dagain)
            size = dwant.abs().max().clamp(min=1e-30)
            errors = {
                "totals": float(((got.cpu() - want).abs() / (1e-3 + want.abs())).max()),
                "gradients": float(((dgot.cpu() - dwant).abs() / size).max()),
            }
            found.append({"objective": objective, "shape": shape, "same_bits": same, **errors,
                          "passed": same and largest(errors.values()) < 1e-5})  # fmt: skip
    return found


def quick_parts(doors):
    return {
        kind: lambda kind=kind: check_losses(doors, kind, [(4, 100)])
        for kind in ("preference", "value")
    }


def parts(doors):
    shapes = ((64, 1000), (2, 70001))
    return {
        kind: lambda kind=kind: check_losses(doors, kind, shapes)
        for kind in ("preference", "value")
    }
