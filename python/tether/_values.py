"""What the operators ask of the numbers in arrays, by torch's operations: where they are on the
host, so that nothing waits for a device."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tether._checks import SMALLEST_WEIGHT, holds_numbers

Tensors = Mapping[str, Tensor | None]


def _in_unit_interval(numbers: Tensor) -> Tensor:
    return (numbers >= 0) & (numbers <= 1)


def _nonnegative(numbers: Tensor) -> Tensor:
    return (numbers >= 0) & (numbers < math.inf)


_RULES: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "lambdas": ("in [0, 1]", _in_unit_interval),
    "labels": ("in [0, 1]", _in_unit_interval),
    "answer_weights": ("at least 0 and finite", _nonnegative),
}


def check_values(function: str, tensors: Tensors, *, of_turns: bool) -> None:
    """The first number that breaks its rule at a slot that counts; turn_ids if turns are read."""
    for name in ("response_mask", "nll_mask"):
        mask = tensors.get(name)
        if mask is not None:
            _check_weights(f"{function}: {name}", mask)
    mask, offsets = tensors.get("response_mask"), tensors.get("offsets")
    if offsets is not None:
        name, first = next(iter(tensors.items()))
        check_offset_values(function, offsets, name, first.shape[0])
    looks = [each for each in (mask, offsets) if each is not None]
    if mask is None or not all(map(holds_numbers, looks)):
        return
    for name, (rule, is_right) in _RULES.items():
        array = tensors.get(name)
        if array is None or not holds_numbers(array):
            continue
        counts = mask != 0
        if name != "lambdas" or array.shape != mask.shape:  # of rows
            counts, array = _rows_that_count(tensors, counts), array.reshape(-1)
        found = _first(counts & ~is_right(array.detach()))
        if found is not None:
            number = array[found].item()
            raise ValueError(f"{function}: {name} must be {rule}, got {number:g} at {list(found)}")
    ids = tensors.get("turn_ids")
    if of_turns and ids is not None and holds_numbers(ids):
        _check_ascending(f"{function}: turn_ids", ids, mask != 0, offsets)


def _first(places: Tensor) -> tuple[int, ...] | None:
    return tuple(places.nonzero()[0].tolist()) if places.any() else None


def _check_weights(where: str, mask: Tensor) -> None:
    if not mask.is_floating_point() or not holds_numbers(mask):
        return
    weights = mask.detach().double()
    found = _first(~(((weights >= SMALLEST_WEIGHT) & (weights <= 1)) | (weights == 0)))
    if found is None:
        return
    weight = weights[found].item()
    tiny = 0 < weight < SMALLEST_WEIGHT
    rule = f"0 or at least {SMALLEST_WEIGHT:g}" if tiny else "in [0, 1]"
    raise ValueError(f"{where} must be {rule}, got {weight:g} at {list(found)}")


def _rows_of(counts: Tensor, offsets: Tensor | None) -> Tensor:
    """The row of each slot."""
    rows = counts.shape[0] if offsets is None else offsets.numel() - 1
    row = torch.arange(rows, device=counts.device)
    if offsets is None:
        return row.unsqueeze(1).expand(counts.shape)
    return row.repeat_interleave(offsets.diff())


def _rows_that_count(tensors: Tensors, counts: Tensor) -> Tensor:
    """Those with an active token, and of pairs those beside one."""
    offsets = tensors.get("offsets")
    rows = counts.shape[0] if offsets is None else offsets.numel() - 1
    out = counts.new_zeros(rows)
    out[_rows_of(counts, offsets)[counts]] = True
    if "answer_weights" in tensors and tensors.get("labels") is None:
        pairs = rows // 2
        out[: 2 * pairs] = out[: 2 * pairs].view(2, pairs).any(0).repeat(2)
    return out


def _check_ascending(where: str, ids: Tensor, counts: Tensor, offsets: Tensor | None) -> None:
    row, id = _rows_of(counts, offsets)[counts], ids[counts]
    found = _first((id[1:] < id[:-1]) & (row[1:] == row[:-1]))
    if found is None:
        return
    k = found[0] + 1
    place = counts.nonzero()[k].tolist()
    raise ValueError(
        f"{where} must not decrease along a row, got {id[k].item()} after {id[k - 1].item()} at "
        f"{place}"
    )


def check_offset_values(function: str, offsets: Tensor, name: str, size: int) -> None:
    """The ends and the order, where they are on the host; the operators do it for their calls."""
    if offsets.shape[0] == 1 and offsets.device.type != "cpu" and size > 0:
        raise ValueError(
            f"{function}: offsets must run from 0 to {size}, the size of {name}, got one number"
        )
    if not holds_numbers(offsets):
        return
    numbers = offsets.tolist()
    if numbers[0] != 0 or numbers[-1] != size:
        raise ValueError(
            f"{function}: offsets must run from 0 to {size}, the size of {name}, got {numbers[0]} "
            f"to {numbers[-1]}"
        )
    for i in range(1, len(numbers)):
        if numbers[i] < numbers[i - 1]:
            raise ValueError(
                f"{function}: offsets must not decrease, got {numbers[i]} after {numbers[i - 1]} "
                f"at [{i}]"
            )
