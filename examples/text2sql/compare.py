#!/usr/bin/env python3
"""Draws the curves of several runs over one another.

compare.py docs/stale.png "no weight=runs/reinforce-stale7-seed0" "weighed=runs/..."

Runs of one label, say of other seeds, are drawn in one colour.
"""

import argparse
import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from plot import read, smooth


def labelled_run(text):
    label, _, folder = text.rpartition("=")
    if not label or not (pathlib.Path(folder) / "curve.csv").is_file():
        raise argparse.ArgumentTypeError(
            f"must be LABEL=FOLDER with a curve.csv in FOLDER, got {text}"
        )
    return label, pathlib.Path(folder)


def draw(axes, runs):
    labels = list(dict.fromkeys(label for label, _ in runs))
    seen = set()
    for label, folder in runs:
        rows = read(folder / "curve.csv")["rl"]
        colour = f"C{labels.index(label)}"
        name = None if label in seen else label
        seen.add(label)
        steps = [row["step"] for row in rows]
        axes[0].plot(steps, smooth([row["entropy"] for row in rows]), color=colour, label=name)
        evaluated = [row for row in rows if "held_out" in row]
        axes[1].plot(
            [row["step"] for row in evaluated],
            [100 * row["held_out"] for row in evaluated],
            "o-",
            color=colour,
            label=name,
        )
    axes[0].set(title="Entropy, nats per token, mean of 5 steps", xlabel="step")
    axes[1].set(title="Held-out questions answered right", xlabel="step", ylabel="%", ylim=(0, 100))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("picture", type=pathlib.Path)
    parser.add_argument("runs", nargs="+", type=labelled_run, metavar="LABEL=FOLDER")
    options = parser.parse_args()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    draw(axes, options.runs)
    for each in axes:
        each.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(options.picture, dpi=120)
    print(options.picture)


if __name__ == "__main__":
    sys.exit(main())
