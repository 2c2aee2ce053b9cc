"""gpu_doors.so: functions that take tensors of the current device and stream, or of the host."""

from __future__ import annotations

import ctypes

import torch

DTYPES = {torch.float32: 1, torch.bfloat16: 3, torch.float16: 4}
DEVICE = "cuda"


class Library:
    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))

    def call(self, name, *arguments):
        function = getattr(self.library, f"tether_{name}")
        function.restype = ctypes.c_char_p
        error = function(*map(raw, arguments))
        if error is not None:
            raise RuntimeError(error.decode())

    def number(self, name, *arguments):
        function = getattr(self.library, f"tether_{name}")
        function.restype = ctypes.c_int64
        return function(*map(raw, arguments))

    def names(self, name):
        function = getattr(self.library, f"tether_{name}")
        function.restype = ctypes.c_char_p
        return function().decode().split()


def largest(errors):
    """NaN if one of them is, which passes no bound; Python's max may lose it."""
    return float(torch.tensor(list(errors), dtype=torch.float64).max())


def raw(value):
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, bool | int):
        return ctypes.c_int64(value)
    return ctypes.c_double(value) if isinstance(value, float) else value


def pointers(tensors):
    return (ctypes.c_void_p * len(tensors))(*(each.data_ptr() for each in tensors))


def stream():
    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)


def stream_of(tensor):
    """Null for one of the host."""
    return stream() if tensor.is_cuda else None
