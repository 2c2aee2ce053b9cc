"""A batch as plain numbers, which can be cut, permuted, printed and shrunk."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

PADDING = -1
DTYPES = {"turn_ids": torch.int64, "labels": torch.bool}  # of arrays that are not numbers
_ABSENT = {"labels": 0.0, "answer_weights": 1.0}  # what padding has; others: -1


@dataclasses.dataclass
class Case:
    mask: Tensor  # [B, T], as all in float64; every number is one of float32
    arrays: dict[str, Tensor]  # [B, T], or [B] where one number is the row's
    pairs: bool = False  # rows of chosen answers, then as many of rejected ones
    found: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False)  # of probes

    @property
    def leaf(self) -> str:
        """What the gradient is taken of."""
        return next(iter(self.arrays))

    @property
    def rows(self) -> int:
        return self.mask.shape[0]

    @property
    def columns(self) -> int:
        return self.mask.shape[1]

    @property
    def items(self) -> int:
        """What a batch is made of: rows, or pairs of them."""
        return self.rows // 2 if self.pairs else self.rows

    @property
    def active(self) -> Tensor:
        return self.mask != 0

    def rows_of(self, items: Sequence[int]) -> Tensor:
        rows = torch.tensor(items, dtype=torch.int64)
        if not self.pairs:
            return rows
        return torch.cat([rows, torch.where(rows == PADDING, PADDING, rows + self.items)])

    def changed(self, **arrays: Tensor) -> Case:
        """With other arrays; `mask` among them."""
        mask = arrays.pop("mask", self.mask)
        return Case(mask, {**self.arrays, **arrays}, self.pairs)


def gathered(case: Case, items: Sequence[int], columns: Sequence[int]) -> Case:
    """These items and columns, in this order; PADDING is one of masked slots."""
    rows, columns = case.rows_of(items), torch.tensor(columns, dtype=torch.int64)
    inside = (rows[:, None] != PADDING) & (columns != PADDING)

    def of(array: Tensor, absent: float) -> Tensor:
        if array.dim() == 1:
            return torch.where(rows != PADDING, array[rows.clamp(min=0)], absent)
        slots = array[rows.clamp(min=0)][:, columns.clamp(min=0)]
        return torch.where(inside, slots, absent)

    arrays = {name: of(array, _ABSENT.get(name, -1.0)) for name, array in case.arrays.items()}
    return Case(of(case.mask, 0.0), arrays, case.pairs)


def returned(to: Case, items: Sequence[int], columns: Sequence[int], values: Tensor) -> Tensor:
    """The reverse, for an array of values: each goes back to its slot, and adds up there."""
    rows, columns = to.rows_of(items), torch.tensor(columns, dtype=torch.int64)
    inside = (rows[:, None] != PADDING) & (columns != PADDING)
    places = (rows[:, None].expand(inside.shape)[inside], columns.expand(inside.shape)[inside])
    return torch.zeros_like(to.mask).index_put_(places, values[inside], accumulate=True)


class Random:
    """The same numbers for the same seed."""

    def __init__(self, seed: int):
        self._generator = torch.Generator().manual_seed(seed)

    def uniform(self, low: float, high: float, *size: int) -> Tensor:
        values = torch.rand(size, generator=self._generator, dtype=torch.float64)
        return rounded(low + (high - low) * values)

    def integers(self, low: int, high: int, *size: int) -> Tensor:
        """Inclusive."""
        return torch.randint(low, high + 1, size, generator=self._generator)

    def integer(self, low: int, high: int) -> int:
        return int(self.integers(low, high))

    def log_ratios(self, *size: int) -> Tensor:
        """Inside and outside of clip regions, not at their bounds: those in use lie between 0.15
        and 0.4, as log 1.2, log 0.8 and log 1.28."""
        kinds = self.integers(0, 5, *size)
        spans = [(0, 0), (-1e-3, 1e-3), (-0.15, 0.15), (-0.15, 0.15), (0.4, 3), (-3, -0.4)]
        drawn = torch.stack([self.uniform(*span, *size) for span in spans])
        return drawn.gather(0, kinds[None])[0]

    def row_mask(self, columns: int, fractional: bool) -> Tensor:
        """The weights of a row of any kind."""
        kind = self.integer(0, 5)
        slots = torch.arange(columns)
        mask = torch.ones(columns, dtype=torch.float64)
        if kind == 0:  # an empty row
            mask = mask * 0
        elif kind == 1:  # one token
            mask = (slots == self.integer(0, columns - 1)).double()
        elif kind == 3:  # a shorter answer
            mask = (slots < self.integer(1, columns)).double()
        elif kind == 4:  # a prompt, or left padding
            mask = (slots >= self.integer(0, columns - 1)).double()
        elif kind == 5:  # holes: tool output, say
            mask = (self.integers(0, 2, columns) > 0).double()
        if fractional:
            quarters = 0.25 * self.integers(0, 4, columns)
            mask = torch.where(self.integers(0, 1, columns) == 0, mask * quarters, mask)
        return mask

    def mask(self, rows: int, columns: int, fractional: bool) -> Tensor:
        fractional = fractional and self.integer(0, 3) == 0
        return torch.stack([self.row_mask(columns, fractional) for _ in range(rows)])


def rounded(values: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return values.to(dtype).double()
