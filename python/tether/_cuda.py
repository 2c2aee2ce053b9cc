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
    "preference_loss",
    "preference_loss_by_counts",
    "value_loss",
    "value_loss_by_counts",
    "advantage",
    "group_advantage",
    "moments",
    "whiten",
    "whiten_by_moments",
    "token_logps_forward",
    "token_logps_backward",
    "categorical_kl_forward",
    "categorical_kl_backward",
)
_DEVICE = "cuda"
# Their arithmetic is in double, and so may their arrays be.
_WIDE = frozenset({"advantage", "moments", "whiten", "whiten_by_moments"})


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
    if given[0].device.type != _DEVICE:
        return False
    if given[0].dtype == torch.float64 and operator not in _WIDE:
        return False
    return torch.compiler.is_compiling() or not any(map(is_tracked, given))


# ---- calls of functions -------------------------------------------------------------------------

# Numbers that may be on the device, and the operator that takes them from there, as one tensor.
ON_DEVICE = {
    "policy_loss": (
        "policy_loss_by_counts",
        ("normalizer.policy", "normalizer.kl", "normalizer.sequences"),
    ),
    "preference_loss": ("preference_loss_by_counts", ("normalizer.pairs", "normalizer.tokens")),
    "value_loss": ("value_loss_by_counts", ("normalizer.policy", "normalizer.sequences")),
    "whiten": ("whiten_by_moments", ("step.count", "step.mean", "step.squares")),
}
# Without the first the second is taken.
_INSTEAD = {"normalizer.kl": "normalizer.policy"}


def function_on_device(name: str) -> Function:
    """The function `name` by its operator of ON_DEVICE."""
    return FUNCTIONS[name].by_operator(ON_DEVICE[name][0])


_BY_DEVICE = {
    name: function_on_device(name) for name, (each, _) in ON_DEVICE.items() if each in KERNELS
}


def call_on_cuda(call: Call) -> Call | None:
    """The call as an operator on CUDA takes it. None where there is no kernel: for arrays in
    float64, for a surrogate of one's own, for a likelihood by the tokens of the step and the pairs
    of the batch, and for settings on the device, which would have to be waited for."""
    name, (numbers, choices) = call.function.name, call.settings
    if call.own or not has_kernel(name, call.tensors.values()) or _has_wide_arrays(call):
        return None
    if choices.get("kl_correction") == "level_ratio":
        return None
    if "normalizer.tokens" in numbers and "normalizer.pairs" not in numbers:
        return None
    on_device = {each for each, value in numbers.items() if _is_on_device(value)}
    if not on_device:
        return call
    return by_device(call) if on_device <= set(ON_DEVICE.get(name, (None, ()))[1]) else None


def _has_wide_arrays(call: Call) -> bool:
    """Beside the first."""
    if call.function.name in _WIDE:
        return False
    numbers = [each.name for each in call.function.arguments if each.kind in ("floating", "narrow")]
    given = [call.tensors[name] for name in numbers]
    return any(each is not None and each.dtype == torch.float64 for each in given)


def _is_on_device(number: object) -> bool:
    return isinstance(number, Tensor) and number.device.type != "cpu"


def by_device(call: Call) -> Call:
    """By the numbers of ON_DEVICE, of which the settings only say that they are given."""
    name = call.function.name
    known = dict.fromkeys(ON_DEVICE[name][1], 1.0)
    settings = call.settings._replace(
        numbers={each: known.get(each, value) for each, value in call.settings.numbers.items()}
    )
    more = (numbers_on_device(call),)
    return call._replace(function=_BY_DEVICE[name], settings=settings, more=more)


def numbers_on_device(call: Call) -> Tensor:
    """The numbers of ON_DEVICE side by side; one that is not given is not looked at."""
    numbers = call.settings.numbers
    device = next(iter(call.tensors.values())).device
    return torch.stack(
        [
            _on_device(numbers.get(each, numbers.get(_INSTEAD.get(each), 0.0)), device)
            for each in ON_DEVICE[call.function.name][1]
        ]
    )


def by_moments_of_batch(call: Call) -> Call:
    """Of whiten, whose moments never leave the device."""
    return call._replace(function=_BY_DEVICE["whiten"], more=(None,))


def _on_device(number: float | Tensor, device: torch.device) -> Tensor:
    """Nothing waits: a fill, or a copy to the device."""
    if isinstance(number, Tensor):
        return number.detach().to(device, torch.float64, non_blocking=True).reshape(())
    return torch.full((), number, dtype=torch.float64, device=device)
