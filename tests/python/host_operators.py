"""The way of CUDA tensors through the package, on tensors of the host: python/cuda_*.cc with
kernels that are teams of host threads (tests/cuda/host_*.cc, built by ./dev test)."""

import contextlib
import functools
import pathlib

import pytest
import tether
import torch
from tether import _cuda

LIBRARY = pathlib.Path(__file__).parents[2] / "build/release/tests/libtether_host_cuda.so"
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


def load():
    if _cuda.KERNELS:
        pytest.skip("the kernels for devices are installed")
    if not LIBRARY.exists():
        pytest.skip(f"no {LIBRARY.name}, which ./dev test builds")
    torch.ops.load_library(str(LIBRARY))


@functools.cache
def functions_on_device():
    return {name: _cuda.function_on_device(name) for name in _cuda.ON_DEVICE}


def _counted(calls, name, operator):
    def run(*arguments):
        calls.append(name)
        return operator.redispatch(CUDA, *arguments)

    return run


@contextlib.contextmanager
def kernels_of(device):
    """Tensors on `device`, whose numbers the host has, take the operators on CUDA. Gives the list
    of those that were called."""
    library, calls = torch.library.Library("tether", "IMPL"), []
    for name in _cuda._OPERATORS:
        operator = getattr(torch.ops.tether, name).default
        library.impl(name, _counted(calls, name, operator), "CPU", allow_override=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cuda, "KERNELS", frozenset(_cuda._OPERATORS))
        patch.setattr(_cuda, "_DEVICE", device)
        patch.setattr(_cuda, "_BY_DEVICE", functions_on_device())
        patch.setattr(tether._ops, "KERNELS", frozenset())
        patch.setattr(tether._ops, "on_cuda", lambda each: each.device.type == device)
        yield calls
    library._destroy()
