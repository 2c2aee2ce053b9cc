"""Single modules of a peer: the `__init__` of its packages is not run, and what a module takes from
one, or from a package that is absent, is a stand-in: its losses do not call it.

    load("openrlhf.models.loss", absent=("deepspeed",))                      an installed peer
    load("slime.utils.ppo_utils", root=pathlib.Path("checkout"))             a checkout of one
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import pathlib
import subprocess
import sys
import types


class AnyAttribute(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (StandIn,), {})


class StandIn(metaclass=AnyAttribute):
    """Whatever is asked of it: an attribute, a base class, a decorator that changes nothing, no."""

    def __new__(cls, *arguments, **_):
        decorated = len(arguments) == 1 and callable(arguments[0])
        return arguments[0] if decorated else super().__new__(cls)

    def __init__(self, *_, **__):
        pass

    def __init_subclass__(cls, **_):
        pass

    def __class_getitem__(cls, _):
        return cls

    def __getattr__(self, name):
        return StandIn()

    def __call__(self, *arguments, **_):
        return StandIn(*arguments)

    def __bool__(self):
        return False


class StandInModule(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (StandIn,), {})


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds stand-ins below the packages that are absent."""

    def __init__(self, absent):
        self.absent = absent

    def find_spec(self, name, path=None, target=None):
        if any(name == each or name.startswith(f"{each}.") for each in self.absent):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return StandInModule(spec.name)

    def exec_module(self, module):
        pass


def load(name, *, root=None, absent=()):
    """The module of that name, of the folder `root` or as installed."""
    sys.meta_path.insert(0, Finder(absent))
    top = name.partition(".")[0]
    if root is None:
        (folder,) = importlib.machinery.PathFinder.find_spec(top).submodule_search_locations
    else:
        folder = pathlib.Path(root) / top
    packages = name.split(".")[:-1]
    for length in range(1, len(packages) + 1):
        package = StandInModule(".".join(packages[:length]))
        package.__path__ = [str(pathlib.Path(folder, *packages[1:length]))]
        package = sys.modules.setdefault(package.__name__, package)
        if length > 1:
            setattr(sys.modules[".".join(packages[: length - 1])], packages[length - 1], package)
    return importlib.import_module(name)


def commit_of(checkout):
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
