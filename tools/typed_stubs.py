"""What type checkers and editors know of tether.objective and tether.weight, whose classes are made
from the catalogue at run time.

    .venv/bin/python tools/typed_stubs.py objective            prints python/tether/objective.pyi
    .venv/bin/python tools/typed_stubs.py [objective] --write   writes it, or both
"""

import dataclasses
import importlib
import math
import pathlib
import sys
import textwrap
import typing

PACKAGE = pathlib.Path(__file__).parent.parent / "python" / "tether"
MODULES = ("objective", "weight")
HEAD = '''# Written by tools/typed_stubs.py.
"""{doc}"""

from dataclasses import dataclass
{inf}from typing import Literal, TypeAlias

from tether._checks import Number as Number
from tether._typed import Chosen as Chosen
'''


def default_text(value):
    if isinstance(value, str):
        return f'"{value}"'
    return "inf" if value == math.inf else repr(value)


def docstring(text):
    text = text.replace("\\", "\\\\")
    if len(text) <= 90:
        return f'    """{text}"""'
    return "\n".join(textwrap.wrap(f'"""{text}', 96, initial_indent="    ",
                                   subsequent_indent="    ")) + '\n    """'  # fmt: skip


def class_text(made):
    base = made.__bases__[0]
    known = {f.name: f for f in dataclasses.fields(base)} if dataclasses.is_dataclass(base) else {}
    lines = [
        "@dataclass(frozen=True, kw_only=True)",
        f"class {made.__name__}({base.__name__}):",
        docstring(made.__doc__),
    ]
    own = [
        f"    {f.name}: {f.type} = {default_text(f.default)}"
        for f in dataclasses.fields(made)
        if f.name not in known or (f.type, f.default) != (known[f.name].type, known[f.name].default)
    ]
    return "\n".join([*lines, *([""] if own else []), *own])


def alias_text(name, literal):
    names = "".join(f'    "{each}",\n' for each in typing.get_args(literal))
    return f"{name}: TypeAlias = Literal[\n{names}]"


def stub(name):
    module = importlib.import_module(f"tether.{name}")
    parts = {each: getattr(module, each) for each in module.__dir__()}
    classes = [class_text(each) for each in parts.values() if dataclasses.is_dataclass(each)]
    aliases = {k: each for k, each in parts.items() if typing.get_origin(each) is typing.Literal}
    doc = module.__doc__.split("\n")[0].rstrip(":,") + "."
    inf = "from math import inf\n" if any(" = inf\n" in each + "\n" for each in classes) else ""
    head = HEAD.format(doc=doc, inf=inf)
    names = "\n".join(alias_text(*each) for each in aliases.items())
    return "\n".join([head, names, "", "\n\n".join(classes), ""])


def main(arguments):
    write = "--write" in arguments
    names = [each for each in arguments if each != "--write"]
    if any(each not in MODULES for each in names) or not (names or write):
        sys.exit(__doc__)
    for name in names or MODULES:
        if write:
            (PACKAGE / f"{name}.pyi").write_text(stub(name))
        else:
            print(stub(name), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
