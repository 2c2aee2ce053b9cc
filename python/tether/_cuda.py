"""The kernels for CUDA tensors, where the package was built with them (`./dev wheel --cuda`)."""

from __future__ import annotations

import pathlib
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from tether._functions import FUNCTIONS, Call, Function
from tether._ops import is_tracked

_OPERATORS = (
    "policy_loss",
    "policy_loss_by_counts",
    "policy_gradient_of_logits",
    "local_counts",
    "token_logps_forward",
    "token_logps_backward",
)


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
    return frozenset(
        each
        for each in _OPERATORS
        if hasattr(torch.ops.tether, each) and registered(f"tether::{each}", "CUDA")
    )


KERNELS = load(pathlib.Path(__file__).with_name("libtether_cuda.so"))


def has_kernel(operator: str, tensors: Iterable[Tensor | None]) -> bool:
    """For tensors on CUDA in float32, bfloat16 or float16; torch.func differentiates torch's
    operations alone."""
    if operator not in KERNELS:
        return False
    given = [each for each in tensors if each is not None]
    if given[0].device.type != "cuda":
        return False
    if given[0].dtype == torch.float64:
        return False
    return torch.compiler.is_compiling() or not any(map(is_tracked, given))


# ---- policy losses ------------------------------------------------------------------------------

COUNTS = ("normalizer.policy", "normalizer.kl", "normalizer.sequences")


def function_by_counts() -> Function:
    return FUNCTIONS["policy_loss"].by_operator("policy_loss_by_counts")


_BY_COUNTS = function_by_counts() if "policy_loss_by_counts" in KERNELS else None


def policy_call(call: Call) -> Call | None:
    """The call as an operator on CUDA takes it. None where there is no kernel: at levels of turns,
    for a surrogate of one's own, and for settings on the device, which would have to be waited for.
    """
    if call.own or not has_kernel(call.function.name, call.tensors.values()):
        return None
    numbers, choices = call.settings
    on_device = [name for name, each in numbers.items() if _is_on_device(each)]
    of_turns = any(each.startswith("turn_") for each in choices.values())
    if of_turns or choices.get("kl_correction") == "level_ratio":
        return None
    if not set(on_device) <= set(COUNTS):
        return None
    return by_counts(call) if on_device and call.function.gradient else call


def _is_on_device(number: object) -> bool:
    return isinstance(number, Tensor) and number.device.type != "cpu"


def by_counts(call: Call) -> Call:
    """The denominators as one tensor on the device. One that is not given is not looked at, but for
    that of the penalty, which is the policy's then."""
    numbers = call.settings.numbers
    policy, kl, sequences = (numbers.get(name) for name in COUNTS)
    given = [policy, policy if kl is None else kl, sequences]
    device = call.tensors["logps"].device
    counts = torch.stack([_on_device(0.0 if each is None else each, device) for each in given])
    rest = {name: each for name, each in numbers.items() if name not in COUNTS}
    settings = call.settings._replace(numbers=rest)
    return call._replace(function=_BY_COUNTS, settings=settings, more=(counts,))


def _on_device(number: float | Tensor, device: torch.device) -> Tensor:
    """Nothing waits: a fill, or a copy to the device."""
    if isinstance(number, Tensor):
        return number.detach().to(device, torch.float64, non_blocking=True).reshape(())
    return torch.full((), number, dtype=torch.float64, device=device)
