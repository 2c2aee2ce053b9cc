"""What is asked of ids: their type, and of those of tokens their range."""

from __future__ import annotations

import torch
from torch import Tensor

from tether._checks import check_flags, check_given, dtype_text, stands_in

_ids_on_devices = False


def check_id_type(where: str, tensor: Tensor | None) -> None:
    check_given(where, tensor)
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{where} must be int32 or int64, got {dtype_text(tensor.dtype)}")


def check_id_values(
    where: str,
    ids: Tensor,
    vocabulary: int,
    ignore_index: int | None = None,
    active: Tensor | None = None,
) -> None:
    """Where they are on the host; the operators do it for their calls. On devices where that is
    asked for."""
    looked_at = ids.device.type == "cpu" or (_ids_on_devices and ids.device.type != "meta")
    if not looked_at or stands_in(ids):
        return
    bad = (ids < 0) | (ids >= vocabulary)
    bad = bad if ignore_index is None else bad & (ids != ignore_index)
    bad = bad if active is None else bad & active
    if bad.any():
        place = bad.nonzero()[0].tolist()
        ignored = "" if ignore_index is None else f" or ignore_index {ignore_index}"
        raise IndexError(
            f"{where} must be in [0, {vocabulary}){ignored}, got {ids[tuple(place)].item()} at "
            f"{place}"
        )


def looks_at_ids() -> bool:
    """On devices too."""
    return _ids_on_devices


def check_asked_ids(where: str, ids: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Where a kernel runs, which refuses them on the CPU alone."""
    if _ids_on_devices:
        check_id_values(where, ids, vocabulary, ignore_index)


class check_ids:
    """Whether ids on a device are looked at: one out of range is an IndexError with its place, as
    on the CPU, in place of NaN for its token.

        with tether.check_ids():  # or tether.check_ids(True), until tether.check_ids(False)
            trainer.train()

    For finding a fault: every call waits for its device. It holds for all threads, for the targets
    of token_logps and linear_*, kept ids, and the ids of top_k_kl and head_logps; a compiled graph
    looks at nothing.
    """

    def __init__(self, enabled: bool = True):
        global _ids_on_devices
        check_flags("check_ids", enabled=enabled)
        self._before, _ids_on_devices = _ids_on_devices, enabled

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_) -> None:
        global _ids_on_devices
        _ids_on_devices = self._before
