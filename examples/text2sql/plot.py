#!/usr/bin/env python3
"""Draws curve.png from the curve.csv of a run: plot.py runs/grpo-seed0"""

import csv
import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"sft": "tab:grey", "rl": "tab:blue", "control": "tab:orange"}
NAMES = {
    "sft": "supervised fine-tuning",
    "rl": "reinforcement learning",
    "control": "the same time, more SFT",
}


def read(path):
    """{phase: [row]}, numbers as floats, missing ones left out."""
    phases = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            phase = row.pop("phase")
            numbers = {name: float(value) for name, value in row.items() if value}
            phases.setdefault(phase, []).append(numbers)
    return phases


def smooth(values, width=5):
    return [
        sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))
    ]


def draw_accuracy(axes, phases):
    """Held-out accuracy over processor time; RL and its control start where SFT ends."""
    end, last = 0.0, None
    for phase in ("sft", "rl", "control"):
        rows = [row for row in phases.get(phase, []) if "held_out" in row]
        if not rows:
            continue
        x = [row["seconds"] + (0 if phase == "sft" else end) for row in rows]
        y = [100 * row["held_out"] for row in rows]
        if phase == "sft":
            end, last = x[-1], y[-1]
        elif last is not None:
            x, y = [end, *x], [last, *y]
        axes.plot(x, y, "o-", color=COLOURS[phase], label=NAMES[phase])
    axes.set(
        title="Held-out questions answered right",
        xlabel="processor seconds of training",
        ylabel="%",
        ylim=(0, 100),
    )
    axes.legend(loc="lower right")


def draw_reward(axes, rows):
    steps = [row["step"] for row in rows]
    reward = [row["reward"] for row in rows]
    axes.plot(steps, reward, color=COLOURS["rl"], alpha=0.3)
    axes.plot(steps, smooth(reward), color=COLOURS["rl"], label="reward, mean of 5 steps")
    axes.plot(
        steps,
        smooth([row["entropy"] for row in rows]),
        color="tab:green",
        label="entropy, nats per token",
    )
    axes.set(title="Reinforcement learning", xlabel="step", ylim=(0, 1))
    axes.legend(loc="center right")


def main():
    if len(sys.argv) != 2:
        sys.exit("usage: plot.py FOLDER")
    folder = pathlib.Path(sys.argv[1])
    if not (folder / "curve.csv").is_file():
        sys.exit(f"plot.py: FOLDER must hold a curve.csv, got {folder}")
    phases = read(folder / "curve.csv")
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    draw_accuracy(axes[0], phases)
    draw_reward(axes[1], phases.get("rl", []))
    for each in axes:
        each.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(folder / "curve.png", dpi=120)
    print(folder / "curve.png")


if __name__ == "__main__":
    main()
