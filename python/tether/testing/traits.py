"""What a loss promises."""

from __future__ import annotations

import dataclasses
import math

import torch

from tether._checks import check_dtype, check_flags, check_number, check_positive, kind_of


@dataclasses.dataclass(frozen=True)
class ClipRange:
    """Of the ratio, [1 - low, 1 + high]: beyond it, on the side that the advantage asks for, there
    is no gradient. Nor is there beyond `dual`, for a bad token."""

    low: float = 0.2
    high: float = 0.2
    dual: float = math.inf

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            check_number("ClipRange", each.name, value)
            if not value >= 0:
                raise ValueError(f"ClipRange: {each.name} must be at least 0, got {value:g}")


@dataclasses.dataclass(frozen=True)
class Traits:
    """What a loss promises beyond its signature. The defaults are what a good loss in plain torch
    can keep; what belongs to the formula is found from `objective` where one is named."""

    row_advantages: bool = False  # advantages are [B]; else like logps
    is_of_whole_batch: bool = False  # is never called with a part of a step: no micro-batches
    takes_fractional_mask: bool = True  # weights between 0 and 1
    takes_half_precision: bool = True  # widens bfloat16 and float16
    survives_runaways: bool = True  # finite for any log-ratio
    bitwise: bool = False  # any number of threads, strides: not one bit changes
    clip: ClipRange | None = None
    is_function_of_log_ratio: bool = True  # of logps - old_logps, and ref_logps - logps
    scales_with_advantages: bool = True  # where the penalty is 0
    is_per_token: bool = True  # False: a row's tokens share a ratio
    gradient_is_derivative: bool = True  # False where a gradient is stopped or straight through
    penalty_pulls: bool = True  # each token's penalty pulls it to the reference
    pulls_back: bool = True  # what ran away to the wrong side is brought back
    tolerance: float = 64  # rounding allowed, in epsilons of the sum of the terms' magnitudes
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)

    def __post_init__(self) -> None:
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        clip, tolerance, dtypes = (values.pop(each) for each in ("clip", "tolerance", "dtypes"))
        check_flags("Traits", **values)
        check_positive("Traits", "tolerance", tolerance)
        if not (clip is None or isinstance(clip, ClipRange)):
            raise TypeError(f"Traits: clip must be a ClipRange or None, got {kind_of(clip)}")
        if not isinstance(dtypes, tuple) or not dtypes:
            got = "none" if dtypes == () else kind_of(dtypes)
            raise TypeError(f"Traits: dtypes must be a tuple of floating dtypes, got {got}")
        for each in dtypes:
            check_dtype("Traits: dtypes", each)
