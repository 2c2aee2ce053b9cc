#!/usr/bin/env python3
"""Writes math_golden.json: core/math.h's functions in double, by mpmath at 60 digits.

{"function": [[x, high, low], ...], ...}: the exact value at the double x is high + low, to 32
digits.
"""

import json
import math
import pathlib
import random

import mpmath
from mpmath import mpf

mpmath.mp.dps = 60
MIN_NORMAL = 2.0**-1022


def log_sigmoid(x):
    return -mpmath.log1p(mpmath.exp(-x))


def log1mexp(x):
    return mpmath.log1p(-mpmath.exp(x)) if x < -1 else mpmath.log(-mpmath.expm1(x))


def expm1_minus(d):
    with mpmath.workdps(400):
        return mpmath.expm1(d) - d


FUNCTIONS = {
    "exp": mpmath.exp,
    "expm1": mpmath.expm1,
    "log": mpmath.log,
    "log1p": mpmath.log1p,
    "sigmoid": lambda x: 1 / (1 + mpmath.exp(-x)),
    "log_sigmoid": log_sigmoid,
    "log1mexp": log1mexp,
    "expm1_minus": expm1_minus,
}


def neighbours(x):
    return [math.nextafter(x, -math.inf), x, math.nextafter(x, math.inf)]


def around_zero(rng):
    """Both signs: every 10th power of ten, and random mantissas down to 2^-70."""
    sizes = [10.0**-k for k in range(10, 310, 10)] + [MIN_NORMAL, 5e-324]
    sizes += [2.0 ** rng.uniform(-70, 0) for _ in range(50)]
    return [sign * size for size in sizes for sign in (1, -1)]


def exponents(rng):
    """Arguments of e^x: where the reduction changes its integer, the breaks, the ends."""
    points = around_zero(rng)
    for k in (-1074, -1023, -700, -60, -54, -53, -38, -3, -2, -1, 0, 1, 2, 37, 53, 54, 700, 1023):
        points += neighbours((k + 0.5) * math.log(2))
    for x in (-745.13, -708.4, -40.0, -38.0, -1.0, -0.5, 0.5, 1.0, 18.0, 709.78):
        points += neighbours(x)
    points += [rng.uniform(-2, 2) for _ in range(60)] + [rng.uniform(-40, 40) for _ in range(60)]
    return points + [rng.uniform(-745, 709) for _ in range(30)]


def positive(rng):
    """Arguments of log: where the reduction changes its integer, near 1, subnormal, huge."""
    points = [abs(x) for x in around_zero(rng)] + [1.7976931348623157e308, 2.0**1023]
    for k in (-1022, -3, -1, 0, 1, 2, 52, 53, 1023):
        points += neighbours(math.sqrt(0.5) * 2.0**k)
    points += neighbours(1.0) + [1 + s * 2.0**-k for k in range(2, 50, 3) for s in (1, -0.5)]
    return (
        points
        + [rng.uniform(0.3, 3) for _ in range(80)]
        + [10 ** rng.uniform(-300, 300) for _ in range(30)]
    )


def points_of(name, rng):
    if name == "log":
        return positive(rng)
    if name == "log1p":
        return [x for x in around_zero(rng) + [x - 1 for x in positive(rng)] if x > -1]
    points = exponents(rng)
    return [x for x in points if x < 0] if name == "log1mexp" else points


def row(function, x):
    exact = function(mpf(x))
    high = float(exact)
    return [x, high, float(exact - mpf(high))]


def main():
    golden = {}
    for name, function in FUNCTIONS.items():
        points = sorted(set(points_of(name, random.Random(name))))
        golden[name] = [row(function, x) for x in points]
    lines = ",\n".join(
        f'"{name}": [\n' + ",\n".join(json.dumps(r, allow_nan=False) for r in rows) + "\n]"
        for name, rows in golden.items()
    )
    path = pathlib.Path(__file__).with_name("math_golden.json")
    path.write_text("{\n" + lines + "\n}\n", encoding="ascii")
    print({name: len(rows) for name, rows in golden.items()})


if __name__ == "__main__":
    main()
