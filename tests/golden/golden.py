"""What the generators of golden values share: streams, grids, derivatives, and a file to be read.

Every row and batch draws from a stream that is seeded by its name, so that a new one changes no
number of the others.
"""

import json
import pathlib
import random

from mpmath import mp, mpf

mp.dps = 60
STEP = mpf(10) ** -25


def stream(name):
    return random.Random(name)


def grid(x):
    """A multiple of 2^-10: the same number in float32, float64 and here."""
    return mpf(round(x * 1024)) / 1024


def number(x):
    return float(mp.nstr(x, 20))


def assert_derivative(function, slope, what):
    """That slope is the derivative of function(step) at 0."""
    difference = (function(STEP) - function(-STEP)) / (2 * STEP)
    assert abs(difference - slope) < mpf(10) ** -18 * (1 + abs(slope)), what


def lines(value, indent=""):
    """JSON with a line for whatever holds nothing but numbers and words."""
    each = value.values() if isinstance(value, dict) else value
    if not any(isinstance(inner, (dict, list)) for inner in each):
        return json.dumps(value)
    deeper = indent + " "
    if isinstance(value, dict):
        inside = [f"{json.dumps(key)}: {text(inner, deeper)}" for key, inner in value.items()]
    else:
        inside = [text(inner, deeper) for inner in value]
    begin, end = "{}" if isinstance(value, dict) else "[]"
    body = ",\n".join(deeper + line for line in inside)
    return f"{begin}\n{body}\n{indent}{end}"


def text(value, indent=""):
    return lines(value, indent) if isinstance(value, (dict, list)) else json.dumps(value)


def write(name, value):
    pathlib.Path(__file__).with_name(name).write_text(text(value) + "\n")
