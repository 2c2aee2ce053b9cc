"""A device of Python's own, by torch's backend for such: its tensors hold numbers of the CPU, and
where waiting is forbidden every operation that would wait for a device is an error."""

import contextlib

import pytest
import torch
from torch.utils import _pytree as pytree

NAME = "elsewhere"
# What gives numbers to Python, or a shape that numbers decide.
WAITS = {
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique_dim",
}
_forbidden = False


class Elsewhere(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here):
        out = torch.Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), dtype=here.dtype, device=f"{NAME}:0"
        )
        out.here = here
        return out

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return _run(operator, args, kwargs or {})


def _here(each):
    return each.here if isinstance(each, Elsewhere) else each


def _there(each):
    return Elsewhere(each) if type(each) is torch.Tensor else each


def _check_wait(operator, tensors, target):
    inside = [isinstance(each, Elsewhere) for each in tensors]
    name = operator._schema.name.removeprefix("aten::")
    by_mask = name.startswith("index") and any(x.dtype == torch.bool for x in tensors[1:])
    gives = any(inside) and (name in WAITS or by_mask or target == "cpu")
    takes = target == NAME and tensors and not any(inside)
    if name == "copy_":
        gives, takes = inside == [False, True], inside == [True, False]
    if _forbidden and (gives or takes):
        raise AssertionError(f"waits for the device: {operator}")


def _run(operator, args, kwargs):
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    target = kwargs.get("device")
    target = None if target is None else torch.device(target).type
    _check_wait(operator, tensors, target)
    own = kwargs if target is None else kwargs | {"device": torch.device("cpu")}
    out = operator(*pytree.tree_map(_here, args), **pytree.tree_map(_here, own))
    if target == "cpu":
        return out
    written = [x.name for x in operator._schema.arguments if x.alias_info and x.alias_info.is_write]
    if written and out is not None:  # what is written to comes back
        given = dict(zip([x.name for x in operator._schema.arguments], args, strict=False)) | kwargs
        return given[written[0]]
    return pytree.tree_map(_there, out)


def _arange(*args, dtype=None, **_):
    return Elsewhere(torch.arange(*args, dtype=dtype, device="cpu"))


_LIBRARIES = []


def install():
    """Once a process; skips where torch has no such backend."""
    if _LIBRARIES:
        return
    registration = pytest.importorskip("torch.utils.backend_registration")
    if not hasattr(registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch has no devices of Python's")
    registration._setup_privateuseone_for_python_backend(NAME)
    every, own = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    every.fallback(lambda operator, *args, **kwargs: _run(operator, args, kwargs), "PrivateUse1")
    for overload in ("arange", "arange.start", "arange.start_step"):
        own.impl(overload, _arange, "PrivateUse1")
    _LIBRARIES.extend((every, own))


def moved(arguments):
    """Its tensors on the device."""
    return {k: x.to(NAME) if isinstance(x, torch.Tensor) else x for k, x in arguments.items()}


@contextlib.contextmanager
def no_waiting():
    global _forbidden
    _forbidden = True
    try:
        yield
    finally:
        _forbidden = False
