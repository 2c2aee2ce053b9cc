#!/usr/bin/env python3
"""Prints the polynomial coefficients of core/math.h and their error, by mpmath at 120 digits.

Interpolation at the Chebyshev nodes is within a small factor of the best polynomial; the error is
measured with the rounded coefficients, as a fraction of the function that the polynomial serves.
"""

import struct

from mpmath import cos, fac, log, lu_solve, matrix, mp, mpf, pi, sqrt

mp.dps = 120
TERMS = 70

half_log2 = log(mpf(2)) / 2 * (1 + mpf(2) ** -12)  # the reduction's n is rounded from a rounded x
log_low = sqrt(mpf(1) / 2) * (1 - mpf(2) ** -20) - 1
log_high = sqrt(mpf(2)) * (1 + mpf(2) ** -20) - 1
z_high = (log_high / (2 + log_high)) ** 2 * (1 + mpf(2) ** -10)
# log2 x by its bits, linear between powers of two, is too small by at most this; so is, or too
# large, that of a quotient, whose k is the nearest whole number.
bits_error = mpf(1) - (1 + log(log(mpf(2)))) / log(mpf(2))
quotient = mpf(2) ** (mpf(1) / 2 + bits_error) * (1 + mpf(2) ** -10)
quotient_z = ((quotient - 1) / (quotient + 1)) ** 2


def exp_tail(order):
    """(e^x - its series below x^order) / x^order."""
    return lambda x: sum(x**k / fac(k + order) for k in range(TERMS))


def log_tail(f):
    """(log(1 + f) - f + f^2 / 2) / f^3."""
    return (log(1 + f) - f + f**2 / 2) / f**3


def atanh_tail(z):
    """(log((1 + s) / (1 - s)) - 2 s) / s^3 at z = s^2."""
    return sum(2 * z**k / (2 * k + 3) for k in range(TERMS))


# name, float?, function, interval, degree, exactly known leading coefficients, weight of the error
POLYNOMIALS = [
    ("exp_polynomial", True, exp_tail(2), (-half_log2, half_log2), 5, [], lambda r: r),
    ("exp_polynomial", False, exp_tail(2), (-half_log2, half_log2), 10, [mpf(1) / 2], lambda r: r),
    ("cubic_polynomial", True, exp_tail(3), (-0.5, 0.5), 5, [], lambda d: d / exp_tail(2)(d)),
    ("cubic_polynomial", False, exp_tail(3), (-0.5, 0.5), 11, [], lambda d: d / exp_tail(2)(d)),
    ("log1p_minus", True, log_tail, (log_low, log_high), 8, [], lambda f: f**3 / log(1 + f)),
    ("log1p_minus", False, atanh_tail, (mpf(10) ** -40, z_high), 6, [], lambda z: z / 2),
    ("atanh_polynomial", True, atanh_tail, (mpf(10) ** -40, quotient_z), 3, [], lambda z: z / 2),
    ("atanh_polynomial", False, atanh_tail, (mpf(10) ** -40, quotient_z), 7, [], lambda z: z / 2),
]


def interpolate(function, interval, degree):
    low, high = map(mpf, interval)
    n = degree + 1
    nodes = [
        (low + high) / 2 + (high - low) / 2 * cos(pi * (2 * i + 1) / (2 * n)) for i in range(n)
    ]
    powers = matrix([[x**j for j in range(n)] for x in nodes])
    return list(lu_solve(powers, matrix([function(x) for x in nodes])))


def rounded(value, single):
    return struct.unpack("f", struct.pack("f", value))[0] if single else float(value)


def fit(single, function, interval, degree, leading):
    def rest(x):
        return (function(x) - sum(c * x**j for j, c in enumerate(leading))) / x ** len(leading)

    free = interpolate(rest if leading else function, interval, degree - len(leading))
    return [rounded(c, single) for c in leading + free]


def largest_error(coefficients, function, interval, weight):
    low, high = map(mpf, interval)
    points = [low + (high - low) * i / 1000 for i in range(1001)]
    points = [x for x in points if abs(x) > mpf(10) ** -30]

    def value(x):
        return sum(mpf(c) * x**j for j, c in enumerate(coefficients))

    return max(abs((value(x) - function(x)) * weight(x)) for x in points)


def main():
    for name, single, function, interval, degree, leading, weight in POLYNOMIALS:
        coefficients = fit(single, function, interval, degree, leading)
        error = largest_error(coefficients, function, interval, weight)
        print(f"{name}, {'float' if single else 'double'}: 2^{float(log(error, 2)):.1f}")
        print("  ", ", ".join(c.hex() for c in coefficients))


if __name__ == "__main__":
    main()
