"""The kernels for CUDA tensors, where the package was built with them (`./dev wheel --cuda`)."""

from __future__ import annotations

import pathlib
import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from tether._ops import is_tracked

_OPERATORS = ("policy_loss", "local_counts", "token_logps_forward", "token_logps_backward")


def load(library: pathlib.Path) -> frozenset[str]:
    """The operators that have a kernel now. A library that does not load is a warning: everything
    that it does torch's operations do too."""
    if library.exists():
        try:
            torch.ops.load_library(str(library))
        except OSError as error:
            warnings.warn(
                f"tether: {library.name} must load, got the error: {error.__cause__ or error}. "
                "CUDA tensors take torch's operations",
                RuntimeWarning,
                stacklevel=2,
            )
    registered = torch._C._dispatch_has_kernel_for_dispatch_key
    return frozenset(each for each in _OPERATORS if registered(f"tether::{each}", "CUDA"))


KERNELS = load(pathlib.Path(__file__).with_name("libtether_cuda.so"))


def has_kernel(operator: str, tensors: Iterable[Tensor | None]) -> bool:
    """For tensors on CUDA in float32, bfloat16 or float16; torch.func differentiates torch's
    operations alone."""
    given = [each for each in tensors if each is not None]
    if operator not in KERNELS or given[0].device.type != "cuda":
        return False
    if given[0].dtype == torch.float64:
        return False
    return torch.compiler.is_compiling() or not any(map(is_tracked, given))


def has_policy_kernel(
    operator: str,
    tensors: Mapping[str, Tensor | None],
    numbers: Mapping[str, object],
    choices: Mapping[str, str],
) -> bool:
    """Of a policy loss with these settings: not at levels of turns, not with settings on the
    device, which would have to be waited for."""
    of_turns = any(each.startswith("turn_") for each in choices.values())
    waited = any(
        isinstance(each, Tensor) and each.device.type != "cpu" for each in numbers.values()
    )
    if of_turns or waited or choices.get("kl_correction") == "level_ratio":
        return False
    return has_kernel(operator, tensors.values())
