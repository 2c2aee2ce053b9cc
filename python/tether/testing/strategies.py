"""Strategies of hypothesis, which is imported when one is asked for."""

from __future__ import annotations

import math
from typing import Any

import torch

from tether._checks import check_dtype, check_flags, check_integers, check_number, names_of
from tether.testing import policy

_WHERE = "ragged_batches"


def _hypothesis():
    try:
        import hypothesis.strategies
    except ImportError as error:
        raise ImportError(
            f"{_WHERE}: hypothesis must be installed, got none. pip install tether[testing]"
        ) from error
    return hypothesis.strategies


def ragged_batches(
    arrays: tuple[str, ...] = ("old_logps",),
    *,
    max_rows: int = 4,
    max_columns: int = 6,
    dtype: torch.dtype = torch.float64,
    row_advantages: bool = False,
    fractional_mask: bool = False,
    masked: float = math.nan,
) -> Any:
    """A strategy of hypothesis: batches of a policy loss, as dicts for `loss(**batch)`.

        @hypothesis.given(ragged_batches())
        def test_my_loss(batch): ...

    Each has logps and advantages, response_mask of the same dtype, and `arrays`: any of old_logps,
    ref_logps, rollout_logps, entropies and turn_ids. Rows are empty, short, with holes or full.
    Masked slots hold `masked` in every array of [B, T]. A failing batch shrinks to few tokens with
    log-ratios of 0 and advantages of 0. Numbers are exact in float32. Raises ImportError without
    hypothesis.
    """
    flags = {"row_advantages": row_advantages, "fractional_mask": fractional_mask}
    arrays = names_of(f"{_WHERE}: arrays", arrays)
    _check(arrays, max_rows, max_columns, dtype, masked, flags)
    st = _hypothesis()
    weights = st.sampled_from([0.0, 1.0, 0.5, 0.25] if fractional_mask else [0.0, 1.0])

    @st.composite
    def batches(draw) -> dict[str, torch.Tensor]:
        rows = draw(st.integers(1, max_rows))
        columns = draw(st.integers(1, max_columns))

        def numbers(low: float, high: float, *size: int, each=None) -> torch.Tensor:
            count = math.prod(size)
            each = st.floats(low, high, width=32) if each is None else each
            values = draw(st.lists(each, min_size=count, max_size=count))
            return torch.tensor(values, dtype=torch.float64).view(size)

        mask = numbers(0, 1, rows, columns, each=weights)
        logps = numbers(-6, -0.0625, rows, columns)
        shape = (rows,) if row_advantages else (rows, columns)
        out = {"logps": logps, "advantages": numbers(-2, 2, *shape)}
        for name in arrays:
            if name == "turn_ids":
                out[name] = numbers(0, 1, rows, columns, each=st.integers(0, 1)).cumsum(1)
            elif name == "entropies":
                out[name] = numbers(0, 3, rows, columns)
            else:
                out[name] = (logps - numbers(-3, 3, rows, columns)).float().double()
        return _handed_over(out, mask, dtype, masked)

    return batches()


def _check(
    arrays: tuple[str, ...],
    max_rows: int,
    max_columns: int,
    dtype: torch.dtype,
    masked: float,
    flags: dict[str, bool],
) -> None:
    check_number(_WHERE, "masked", masked)
    check_flags(_WHERE, **flags)
    known = [name for name in policy.ARRAYS if name not in ("logps", "advantages")]
    for name in arrays:
        if name not in known:
            raise ValueError(f'{_WHERE}: arrays must be of {", ".join(known)}, got "{name}"')
    check_integers(_WHERE, max_rows=max_rows, max_columns=max_columns)
    if min(max_rows, max_columns) < 1:
        raise ValueError(
            f"{_WHERE}: max_rows and max_columns must be at least 1, got {max_rows} and "
            f"{max_columns}"
        )
    check_dtype(f"{_WHERE}: dtype", dtype)


def _handed_over(
    arrays: dict[str, torch.Tensor], mask: torch.Tensor, dtype: torch.dtype, masked: float
) -> dict[str, torch.Tensor]:
    out = {}
    for name, each in arrays.items():
        if name == "turn_ids":
            out[name] = each.long()
            continue
        out[name] = (torch.where(mask != 0, each, masked) if each.dim() == 2 else each).to(dtype)
    return out | {"response_mask": mask.to(dtype)}
