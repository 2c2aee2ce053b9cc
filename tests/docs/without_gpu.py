#!/usr/bin/env python3
"""A script of bench/gpu on a machine without a GPU: its tensors are of the host, its times made up,
and the doors take their arguments as far as the launch.

usage: without_gpu.py NAME DOORS [OPTION...]

Prints what became of each door: "ran", on memory of the host, or "launched".
"""

import contextlib
import importlib
import json
import pathlib
import re
import sys

import torch

FOLDER = pathlib.Path(__file__).parents[2] / "bench/gpu"
SIGNATURE = re.compile(r"tether_(\w+)\(([^)]*)\)\s*\{")
NO_LAUNCH = "CUDA must accept the launch"


class Stream:
    cuda_stream = 0


class Event:
    def __init__(self, **_):
        pass

    def record(self):
        pass

    def synchronize(self):
        pass

    def elapsed_time(self, _):
        return 1.0


class Graph:
    def replay(self):
        pass


@contextlib.contextmanager
def nothing(*_):
    yield


def without_device():
    fakes = {
        "get_device_name": lambda: "none",
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "current_stream": lambda: Stream,
        "CUDAGraph": Graph,
        "graph": nothing,
        "stream": nothing,
        "Stream": nothing,
        "Event": Event,
    }
    for name, fake in fakes.items():
        setattr(torch.cuda, name, fake)
    torch.compile = lambda function, **_: function


def watched(library):
    """Its doors, called with as many arguments as they have; what became of each."""
    sources = "".join(file.read_text() for file in FOLDER.glob("*.cc"))
    sizes = {name: len(list(filter(str.strip, each.split(",")))) for name, each in
             SIGNATURE.findall(sources)}  # fmt: skip
    call, number, became = library.call, library.number, {}

    def watched_call(self, name, *arguments):
        assert len(arguments) == sizes[name], f"{name} takes {sizes[name]}, got {len(arguments)}"
        try:
            call(self, name, *arguments)
            became.setdefault(name, "ran")
        except RuntimeError as error:
            if NO_LAUNCH not in str(error):
                raise
            became[name] = "launched"

    def watched_number(self, name, *arguments):
        assert len(arguments) == sizes[name], f"{name} takes {sizes[name]}, got {len(arguments)}"
        return number(self, name, *arguments)

    library.call, library.number = watched_call, watched_number
    return became


def main():
    name = sys.argv[1]
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(FOLDER))
    without_device()
    import library

    library.DEVICE = "cpu"
    became = watched(library.Library)
    import check

    parts_of = importlib.import_module(name).parts_of
    with contextlib.redirect_stdout(sys.stderr):
        check.main(parts_of)
    print(json.dumps(became))


if __name__ == "__main__":
    main()
