#!/usr/bin/env python3
"""Plots what estimator_variance wrote.

usage: plot_estimator_variance.py RESULTS.json

Bias and standard deviation over the exact KL, with 95 % intervals, the exact values as lines; the
picture lies beside the file.
"""

import json
import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main():
    (path,) = map(pathlib.Path, sys.argv[1:])
    results = json.loads(path.read_text())
    rows = results["rows"]
    names = list(dict.fromkeys(row["estimator"] for row in rows))
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5))
    for axis, what in zip(axes, ("bias", "std"), strict=True):
        for i, name in enumerate(names):
            own = [row for row in rows if row["estimator"] == name]
            shifts = [row["shift"] * 1.03**i for row in own]  # beside one another
            axis.plot(shifts, [row[f"exact_{what}"] for row in own], color=f"C{i}", alpha=0.5)
            axis.errorbar(
                shifts,
                [row[what] for row in own],
                [row[f"{what}_interval"] for row in own],
                fmt=".",
                color=f"C{i}",
                capsize=3,
                label=name,
            )
        axis.set(xscale="log", xlabel="shift between the means", ylabel=f"{what} / KL")
    axes[1].set_yscale("log")
    axes[1].legend()
    figure.suptitle(f"KL estimators, {results['samples']:,} samples; lines: exact")
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=120)
    print(path.with_suffix(".png"))


if __name__ == "__main__":
    main()
