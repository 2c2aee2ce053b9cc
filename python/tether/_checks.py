"""What is asked of one argument, in the words of the C++ faces."""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.autograd import forward_ad
from torch.nn.parameter import UninitializedTensorMixin

Number = float | Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SMALLEST_WEIGHT = 2.0**-126  # below it the inverse of a weight is no float
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def kind_of(value: Any) -> str:
    """What was given, for the end of an error."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    kind = type(value)
    return f"numpy.{kind.__name__}" if kind.__module__ == "numpy" else kind.__name__


def shape_text(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def dtype_text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def result_dtype(tensor: Tensor) -> torch.dtype:
    """Of the arithmetic and of results: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _check_class(where: str, tensor: Any) -> None:
    if tensor is None:
        raise ValueError(f"{where} must be given, got none")
    if not isinstance(tensor, Tensor) or isinstance(tensor, UninitializedTensorMixin):
        raise TypeError(f"{where} must be a tensor, got {kind_of(tensor)}")
    if type(tensor).__name__ == "DTensor" and tensor.device.type == "cpu":
        raise TypeError(
            f"{where} must be a plain tensor, got a DTensor. Pass its to_local() or full_tensor()"
        )


def check_given(where: str, tensor: Tensor | None) -> None:
    if type(tensor) is not Tensor:
        _check_class(where, tensor)
    if tensor.layout != torch.strided or tensor.is_nested:
        got = "a nested one" if tensor.is_nested else dtype_text(tensor.layout)
        raise TypeError(f"{where} must be a dense tensor, got {got}")


def check_floating(where: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATING:
        raise TypeError(
            f"{where} must be float32, float64, bfloat16 or float16, got {dtype_text(tensor.dtype)}"
        )


def check_dtype(where: str, dtype: torch.dtype) -> None:
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{where} must be a torch.dtype, got {kind_of(dtype)}")
    check_floating(where, torch.empty(0, dtype=dtype, device="meta"))


def check_logits(where: str, logits: Tensor, last: str = "V") -> None:
    check_given(where, logits)
    check_floating(where, logits)
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(
            f"{where} must be [..., {last}] with {last} at least 1, got {shape_text(logits)}"
        )


def check_device(where: str, tensor: Tensor, name: str, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{where} must be on {like.device} like {name}, got {tensor.device}")


def savable(value: Any) -> Any:
    """Autograd saves no tensor that was made under inference_mode: a copy of such a one."""
    if not isinstance(value, Tensor) or torch.compiler.is_compiling():
        return value
    inference = value.is_inference() and not torch.is_inference_mode_enabled()
    return value.clone() if inference else value


def parameters_of(where: str, function: Callable) -> tuple[inspect.Parameter, ...]:
    """Of the caller's function; a module's are its forward's."""
    if isinstance(function, type) or not callable(function):
        raise TypeError(f"{where} must be a function or a module, got {kind_of(function)}")
    called = function.forward if isinstance(function, torch.nn.Module) else function
    try:
        return tuple(inspect.signature(called).parameters.values())
    except ValueError:
        name = getattr(function, "__name__", kind_of(function))
        raise ValueError(
            f"{where} must say what it takes, got {name} without a signature. Wrap it in a function"
        ) from None


# Words of trainers.
_WORDS = {
    "a2c": "reinforce",
    "aot": "cdpo",
    "apo_zero_unpaired": "kto",
    "batch": "batch_std",
    "bco": "bco_pair",
    "bypass_mode": "ppo_dual_clip",
    "clip_eps": "epsilon_low",
    "clip_epsilon": "epsilon_low",
    "clip_ppo": "ppo",
    "clip_ratio": "epsilon_low",
    "clip_ratio_c": "dual_clip",
    "clip_ratio_high": "epsilon_high",
    "clip_ratio_low": "epsilon_low",
    "cliprange": "epsilon_low",
    "delta": "dual_clip",
    "dppo": "dppo_tv",
    "entropy_coeff": "entropy_coef",
    "eps_clip": "epsilon_low",
    "eps_clip_high": "epsilon_high",
    "epsilon": "epsilon_low",
    "geo_mean": "gmpo",
    "group": "group_std",
    "group_norm": "grpo",
    "grpo_vectorized": "grpo",
    "icepop": "masked_importance",
    "importance_sampling_level": "level",
    "kl": "k1",
    "kl_coef": "beta",
    "kl_loss_coef": "beta",
    "kl_loss_type": "kl_estimator",
    "kto_pair": "kto",
    "loo": "leave_one_out",
    "loss_agg_mode": "aggregation",
    "loss_scale_factor": "constant",
    "loss_type": "objective",
    "mis": "masked_importance",
    "mse": "k2",
    "pg": "reinforce",
    "ppo_clip": "ppo",
    "ratio_clip_c": "dual_clip",
    "ratio_clip_max": "epsilon_high",
    "ratio_clip_min": "epsilon_low",
    "rloo_vectorized": "rloo",
    "sequence": "sequence_mean",
    "sigmoid": "dpo",
    "sigmoid_norm": "dpo",
    "std": "group_std",
    "tis": "truncated_importance",
    "truncated_is": "truncated_importance",
    "use_bias_correction_kl": "kl_correction",
    "vanilla": "ppo_dual_clip",
}


def hint(word: str, known: Iterable[str]) -> str:
    """For the end of an error: the known name that is meant, if one is."""
    known = list(known)
    meant = re.sub("^seq_", "sequence_", word.lower().replace("-", "_"))
    meant = _WORDS.get(meant, meant)
    found = [meant] if meant in known else difflib.get_close_matches(meant, known, 1, 0.8)
    return f". Did you mean {found[0]}?" if found else ""


def check_known(function: str, what: str, name: Any, known: Iterable[str]) -> None:
    """A name of a catalogue."""
    check_strings(function, **{what: name})
    if name not in known:
        raise ValueError(
            f'{function}: {what} must be one of {", ".join(known)}, got "{name}"{hint(name, known)}'
        )


def in_name_of(function: str, callee: str, run: Callable):
    """run(); its errors, which begin with the name of the callee, begin with `function`."""
    try:
        return run()
    except (ValueError, TypeError, IndexError, NotImplementedError) as error:
        if not str(error).startswith(f"{callee}: "):
            raise
        raise type(error)(function + str(error).removeprefix(callee)) from None


def check_no_tangents(function: str, **tensors: Tensor | None) -> None:
    """Kernels know no forward-mode derivative, and torch would take it for 0."""
    if forward_ad._current_level < 0:  # the usual case: no words are made
        return
    for name, tensor in tensors.items():
        if tensor is not None:
            check_no_tangent(f"{function}: {name}", tensor)


def check_no_tangent(where: str, tensor: Tensor) -> None:
    if has_tangent(tensor):
        raise NotImplementedError(
            f"{where} must have no tangent, got one. Forward-mode derivatives are not supported: "
            "use backward"
        )


def has_tangent(tensor: Tensor) -> bool:
    """At any level of torch.func: in a hessian the gradient's own level hides that of forward mode
    below it."""
    if forward_ad._current_level < 0 or torch.compiler.is_compiling():
        return False
    if forward_ad.unpack_dual(tensor).tangent is not None:
        return True
    functorch = torch._C._functorch
    level = functorch.maybe_current_level()
    if level is None:
        return False
    if functorch.is_functorch_wrapped_tensor(tensor) and functorch.maybe_get_level(tensor) == level:
        tensor = functorch.get_unwrapped(tensor)
    with temporarily_pop_interpreter_stack():
        return has_tangent(tensor)


def is_differentiated_twice(tensor: Tensor) -> bool:
    """Whether torch.func takes a second derivative by it, one of which in forward mode."""
    if not has_tangent(tensor):
        return False
    functorch, levels = torch._C._functorch, 0
    while functorch.is_functorch_wrapped_tensor(tensor):
        levels += functorch.is_gradtrackingtensor(tensor)
        tensor = functorch.get_unwrapped(tensor)
    return levels > 1


def check_constant(where: str, name: str, tensor: Tensor) -> None:
    check_no_tangent(where, tensor)
    if tensor.requires_grad:
        raise ValueError(
            f"{where} must not require grad, got a tensor that does. It is a constant of the loss: "
            f"pass {name}.detach()"
        )


# ---- numbers, strings, flags ---------------------------------------------------------------------


def scalar(value: Number) -> Number:
    """A tensor of one number has no dimensions and is float64, whatever it came as: what is
    calculated of it is not rounded or wrapped. torch takes no integer beyond int64."""
    if isinstance(value, Tensor):
        wide = torch.float32 if value.device.type == "mps" else torch.float64
        return value.reshape(()).to(wide)
    return float(value) if isinstance(value, int) and abs(value) >= 2**63 else value


def stands_in(tensor: Tensor) -> bool:
    """Whether it cannot be looked at: it stands for another, as those of vmap do, or is traced."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    functorch = torch._C._functorch
    while functorch.is_gradtrackingtensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    others = type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
    return others or functorch.is_functorch_wrapped_tensor(tensor)


def holds_numbers(tensor: Tensor) -> bool:
    """Whether they can be looked at without waiting for a device."""
    return tensor.device.type == "cpu" and not stands_in(tensor)


def number_of(value: Number) -> float | None:
    """What is known of it without waiting for a device or breaking a graph."""
    if not isinstance(value, Tensor):
        return value
    return value.item() if holds_numbers(value) else None


def check_number(function: str, name: str, value: Number) -> None:
    if isinstance(value, Tensor):
        check_given(f"{function}: {name}", value)
        if value.dtype not in FLOATING + INTEGERS:
            raise TypeError(
                f"{function}: {name} must be a number, got a tensor of {dtype_text(value.dtype)}"
            )
        if value.numel() != 1:
            raise ValueError(f"{function}: {name} must be one number, got {shape_text(value)}")
        if value.device.type == "meta":
            raise ValueError(f"{function}: {name} must be a number, got a tensor on meta")
        check_constant(f"{function}: {name}", name, value)
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{function}: {name} must be a number, got {kind_of(value)}")
    elif isinstance(value, int) and abs(value) > 2**1023:
        raise ValueError(f"{function}: {name} must be a number of float64, got a larger one")


def check_numbers(function: str, **values: Number) -> None:
    for name, value in values.items():
        check_number(function, name, value)


def check_positive(function: str, name: str, value: Number, *, zero: bool = False) -> None:
    """A finite number above 0, or with `zero` at least 0."""
    check_number(function, name, value)
    number = number_of(value)
    if number is None or ((number > 0 or (zero and number == 0)) and number < math.inf):
        return
    rule = "at least 0" if zero else "greater than 0"
    raise ValueError(f"{function}: {name} must be {rule} and finite, got {number:g}")


def check_count(function: str, name: str, value: Number) -> None:
    """Of tokens or sequences: 0, or no smaller than the weight of a token may be."""
    check_positive(function, name, value, zero=True)
    number = number_of(value)
    if number is not None and 0 < number < SMALLEST_WEIGHT:
        raise ValueError(
            f"{function}: {name} must be at least {SMALLEST_WEIGHT:g} and finite, got {number:g}"
        )


def check_integers(function: str, **values: int) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{function}: {name} must be an int, got {kind_of(value)}")
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"{function}: {name} must be an int of 64 bits, got {value}")


def check_flags(function: str, **values: bool) -> None:
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{function}: {name} must be a bool, got {kind_of(value)}")


def check_strings(function: str, **values: str) -> None:
    for name, value in values.items():
        if not isinstance(value, str):
            raise TypeError(f"{function}: {name} must be a string, got {kind_of(value)}")


def names_of(where: str, value: Iterable[str]) -> tuple[str, ...]:
    """Several strings; one alone would be read letter by letter."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise TypeError(f"{where} must be a list of strings, got {kind_of(value)}")
    names = tuple(value)
    for each in names:
        if not isinstance(each, str):
            raise TypeError(f"{where} must be a list of strings, got {kind_of(each)} in it")
    return names


def check_merged(one: Any, other: Any) -> None:
    if not isinstance(other, type(one)):
        raise TypeError(f"merge: other must be {type(one).__name__}, got {kind_of(other)}")
