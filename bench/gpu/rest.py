#!/usr/bin/env python3
"""The other CUDA kernels on a GPU: advantages, KL of two rows, preference and value losses.

usage: rest.py DOORS [--json FILE] [--repetitions N] [--quick]

Options and the report are those of check.py. Ends with 1 if an error is larger than its bound, or
bits differ.
"""

from __future__ import annotations

import sys

import advantages
import check
import losses
import pairs


def parts_of(doors, chosen):
    if chosen.quick:
        parts = [each.quick_parts(doors) for each in (advantages, losses, pairs)]
    else:
        parts = [
            advantages.parts(doors, chosen.repetitions),
            losses.parts(doors),
            pairs.parts(doors, chosen.repetitions),
        ]
    return {name: call for each in parts for name, call in each.items()}


if __name__ == "__main__":
    sys.exit(check.main(parts_of))
