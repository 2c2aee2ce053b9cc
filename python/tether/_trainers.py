"""The trainers that have an adapter here, and the versions that it is tested with."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import sys
from typing import Any

KNOWN = {
    "nemo_rl": ("0.6.0",),
    "openrlhf": ("0.11.2",),
    "prime_rl": ("0.8.0",),
    "slime": ("0.3.1",),
    "torchrl": ("0.14.1",),
    "trl": ("1.16.0",),
    "verl": ("0.9.1",),
}


@functools.cache
def version_of(package: str) -> str | None:
    """That is installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_known(trainer: str, version: str | None) -> bool:
    """A build of a known version, which may name its commit behind a +, is known."""
    return version is not None and version.partition("+")[0] in KNOWN[trainer]


def check_version(trainer: str) -> None:
    """Raises RuntimeError where another version is installed, or none."""
    version = version_of(trainer)
    if not is_known(trainer, version):
        known = " or ".join(KNOWN[trainer])
        got = "none" if version is None else version
        raise RuntimeError(f"tether.{trainer}: {trainer} must be {known}, got {got}")


def module_of(trainer: str, name: str) -> Any:
    """A module of the trainer; RuntimeError where another version is installed that lacks it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        check_version(trainer)
        raise


def rebind(package: str, name: str, old: Any, new: Any) -> None:
    """In every loaded module of the package that has bound the name to `old`."""
    for key, module in list(sys.modules.items()):
        if key.split(".")[0] == package and vars(module).get(name) is old:
            setattr(module, name, new)
