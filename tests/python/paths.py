"""The CPU's kernels beside torch's operations, which other devices take."""

import tether

PATHS = (frozenset({"cpu"}), frozenset())


def on_both_paths(run, monkeypatch):
    """What run() gives by the kernels, and by torch's operations, which stay."""
    out = []
    for kernels in PATHS:
        monkeypatch.setattr(tether._ops, "KERNELS", kernels)
        out.append(run())
    return out
