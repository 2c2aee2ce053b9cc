"""Shards of a vocabulary on CUDA: blocks of what kernels leave of a row (logits/rows_cuda.h), and
their merge. Nothing waits: ranks that do not fit together give NaN."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tether.reference.logps import multiplier


def block_of(states: Tensor, columns: int, targets: Tensor, words: tuple) -> Tensor:
    """[1 + N, 8] of this rank, which has so many columns: first its place and settings."""
    numbers = _numbers(words)
    own = (numbers.pop("first_id"), columns, numbers.pop("ids"))
    block = states.new_zeros(1 + len(states), 8, dtype=torch.float64)
    block[1:, :7] = states
    for i, number in enumerate((*own, *numbers.values())):
        block[0, i] = number
    # A sum that others hardly have: of whole numbers, exact.
    places = torch.arange(1, 1 + len(states), device=states.device)
    block[0, 7] = (targets.view(-1) * places).sum()
    return block


def merged(blocks: Tensor, targets: Tensor, words: tuple) -> tuple[Tensor, Tensor, Tensor]:
    """logps, entropies and states of blocks [shards, 1 + N, 8], as of the whole rows."""
    numbers = _numbers(words)
    factor = multiplier(**numbers)
    parts = blocks[:, 1:, :7]
    reference, total, weighted, target, squares, *counts = parts.unbind(-1)
    top = reference.amax(0)
    shift = ((reference - top) * (factor * math.log2(math.e))).clamp_min(-1100)
    power = shift.exp2()
    sums = (total * power, (weighted + total * shift) * power, squares * power.square(), *counts)
    total, weighted, *others = (each.sum(0) for each in sums)
    states = torch.stack([top, total, weighted, target.amax(0), *others], -1)
    # All ranks have the same of an ignored row.
    ignored = targets.view(-1) == numbers["ignore_index"]
    states = states.where(~ignored[:, None], parts[0])
    broken = ((states[:, 1] == 0) | ~_fit(blocks[:, 0])) & ~ignored
    states[:, 1].masked_fill_(broken, math.nan)
    top, total, weighted, target = states[:, :4].unbind(-1)
    log_total = total.log()
    logps = ((target - top) * factor - log_total).clamp_max(0)
    entropies = (log_total - math.log(2) * weighted / total).clamp_min(0)
    shaped = (each.float().view(targets.shape) for each in (logps, entropies))
    return *shaped, states.float()


def _fit(headers: Tensor) -> Tensor:
    """Whether their columns are all ids without gap or overlap, and the rest is the same."""
    first, order = headers[:, 0].sort()
    end = first + headers[:, 1][order]
    tiled = (first[0] == 0) & (first[1:] == end[:-1]).all() & (end[-1] == headers[0, 2])
    return tiled & (headers[:, 2:] == headers[:1, 2:]).all()


def _numbers(words: tuple) -> dict[str, float]:
    return dict(zip(words[0], words[1].tolist(), strict=True))
