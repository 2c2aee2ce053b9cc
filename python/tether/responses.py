"""Targets and masks of responses from the tokens that a model reads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tether._checks import check_device, check_given, dtype_text, shape_text, stands_in
from tether._ids import check_id_type

_FUNCTION = "response_targets"


class ResponseTargets(NamedTuple):
    targets: Tensor  # [B, L - 1], int64: the token that comes next
    response_mask: Tensor  # [B, L - 1], bool: it belongs to the response


def response_targets(
    input_ids: Tensor, prompt_lengths: Tensor, attention_mask: Tensor | None = None
) -> ResponseTargets:
    """The shift by one between what a model reads and what it predicts.

    Logits at position t are for token t + 1. With a prompt of 2 and a response of 3 tokens,
    right-padded to L = 6:

        input_ids        p0    p1    r0    r1    r2    pad
        logits of        0     1     2     3     4     (5: of nothing)
        targets          p1    r0    r1    r2    pad
        response_mask    0     1     1     1     0

    so the response starts at position prompt_length - 1. The same left-padded, where prompt lengths
    count from the first attended token:

        input_ids        pad   p0    p1    r0    r1    r2
        attention_mask   0     1     1     1     1     1
        response_mask    0     0     1     1     1

    input_ids       [B, L]: int32 or int64
    prompt_lengths  [B]: int32 or int64, in [1, L]: a model predicts nothing without a token before
                    it
    attention_mask  [B, L]: bool or integer, not 0 where a token is; None: everywhere, then padding
                    on the right counts as response

    Use it as

        targets, response_mask = response_targets(input_ids, prompt_lengths, attention_mask)
        logps = token_logps(logits[:, :-1], targets).logps

    targets.masked_fill(~response_mask, -100) spares the reading of logits outside of the response.
    On any device; checking the prompt lengths waits for it, and is left out in compiled code and
    under torch.vmap. Raises ValueError or TypeError.
    """
    _check(input_ids, prompt_lengths, attention_mask)
    position = torch.arange(input_ids.shape[1], device=input_ids.device)
    response_start = prompt_lengths.to(torch.int64)[:, None]
    in_response = position >= response_start
    if attention_mask is not None:
        attended = attention_mask != 0
        first_attended = attended.to(torch.int32).argmax(1, keepdim=True)
        in_response = (position >= first_attended + response_start) & attended
    return ResponseTargets(
        input_ids[:, 1:].to(torch.int64).contiguous(), in_response[:, 1:].contiguous()
    )


# ---- checks --------------------------------------------------------------------------------------


def _check(input_ids: Tensor, prompt_lengths: Tensor, attention_mask: Tensor | None) -> None:
    check_id_type(f"{_FUNCTION}: input_ids", input_ids)
    check_id_type(f"{_FUNCTION}: prompt_lengths", prompt_lengths)
    if input_ids.dim() != 2 or input_ids.shape[1] < 1:
        raise ValueError(
            f"{_FUNCTION}: input_ids must be [B, L] with L at least 1, got {shape_text(input_ids)}"
        )
    _check_like("prompt_lengths", prompt_lengths, input_ids, list(input_ids.shape[:1]))
    if attention_mask is not None:
        where = f"{_FUNCTION}: attention_mask"
        check_given(where, attention_mask)
        if attention_mask.is_floating_point() or attention_mask.is_complex():
            raise TypeError(
                f"{where} must be bool or integer, got {dtype_text(attention_mask.dtype)}"
            )
        _check_like("attention_mask", attention_mask, input_ids, list(input_ids.shape))
    if stands_in(prompt_lengths):
        return
    for row, length in enumerate(prompt_lengths.tolist()):
        if not 1 <= length <= input_ids.shape[1]:
            raise ValueError(
                f"{_FUNCTION}: prompt_lengths must be in [1, {input_ids.shape[1]}], got {length} "
                f"at [{row}]"
            )


def _check_like(name: str, tensor: Tensor, input_ids: Tensor, shape: list[int]) -> None:
    where = f"{_FUNCTION}: {name}"
    check_device(where, tensor, "input_ids", input_ids)
    if list(tensor.shape) != shape:
        raise ValueError(
            f"{where} must be {shape} like input_ids {shape_text(input_ids)}, got "
            f"{shape_text(tensor)}"
        )
