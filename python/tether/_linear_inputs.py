"""What the functions of hidden states and a head take, checked."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from tether._checks import check_integers, result_dtype
from tether._functions import FUNCTIONS, Call
from tether.logits import RowSettings

_MADE_HERE = ("logps", "entropies", "turn_ids")  # or known not to be needed
_LISTED = [each.name for each in FUNCTIONS["policy_loss"].arguments]
_MOST_ROWS = 2**31 - 1  # of a matrix product
LOSS_ARRAYS = (*(name for name in _LISTED if name not in _MADE_HERE), "offsets")


class Linear(NamedTuple):
    """logits = hidden @ weight.T + bias"""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    def in_one_dtype(self) -> Linear:
        """As torch's own linear: under autocast in its dtype, else nothing is rounded."""
        given = [each for each in self if each is not None]
        dtype = functools.reduce(torch.promote_types, (each.dtype for each in given))
        device = self.hidden.device.type
        traced = torch.compiler.is_compiling()  # where torch 2.10 cannot ask
        known = traced or torch.amp.is_autocast_available(device)
        autocast = known and torch.is_autocast_enabled(device)
        if autocast and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        return Linear(*(None if each is None else each.to(dtype).resolve_neg() for each in self))


def stand_in(linear: Linear, targets: Tensor) -> Tensor:
    """For the checks, log-probabilities that are still to be made."""
    return linear.hidden.new_zeros(targets.shape, dtype=result_dtype(linear.hidden))


def checked_linear(
    function: str,
    linear: Linear,
    targets: Tensor,
    settings: RowSettings,
    chunk_bytes: int | None,
    rows_per_chunk: int,
) -> tuple[Linear, Tensor, Call]:
    """The tensors in one dtype; the targets as int64, contiguous."""
    check_integers(
        function,
        ignore_index=settings.ignore_index,
        chunk_bytes=1 if chunk_bytes is None else chunk_bytes,
        rows_per_chunk=rows_per_chunk,
    )
    tensors = {**linear._asdict(), "targets": targets}
    call = FUNCTIONS["linear_token_logps"].call(tensors, settings._asdict(), function)
    if chunk_bytes is not None and chunk_bytes < 1:
        raise ValueError(f"{function}: chunk_bytes must be at least 1, got {chunk_bytes}")
    if not 0 <= rows_per_chunk <= _MOST_ROWS:
        raise ValueError(
            f"{function}: rows_per_chunk must be in [0, {_MOST_ROWS}], got {rows_per_chunk}"
        )
    return linear.in_one_dtype(), targets.to(torch.int64).contiguous(), call
