"""What was measured, as text and as a picture."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

# (kind, shape, pass, what is to be so many times slower than tether, how many times)
RATIOS = (
    ("logits", "512x151936", True, "eager", 9),
    ("logits", "512x151936", True, "trl", 15),
    ("logits", "512x151936", True, "torch.compile", 3.5),
    ("kl", "512x32000", False, "torch.compile", 2.5),
)
# (kind, shape, pass, microseconds that a call of tether may take)
CALLS = (("policy", "8x16", False, 25),)


def times_of(result: dict, both: bool) -> dict[str, float]:
    return {row["method"]: row["ms"] for row in result["rows"] if row["both"] == both}


def table(result: dict) -> Iterator[str]:
    limits = ", ".join(f"{name} {v:.1f} GB/s" for name, v in result["machine_gb_per_s"].items())
    yield (
        f"{result['kind']} {result['shape']} {result['dtype']}, {result['threads']} thread(s)"
        + (f"; torch's {limits}" if limits else "")
    )
    yield f"  {'':28} {'forward ms':>11} {'x tether':>9} {'both ms':>9} {'x tether':>9} {'MB':>7}"
    peaks = {row["method"]: row["peak_mb"] for row in result["rows"] if row["both"]}
    for name in dict.fromkeys(row["method"] for row in result["rows"]):
        cells = []
        for both in (False, True):
            times = times_of(result, both)
            ours, value = times.get("tether"), times.get(name)
            cells += [
                "" if value is None else _digits(value),
                "" if value is None or ours is None else f"{value / ours:.2f}",
            ]
        peak = "" if peaks.get(name) is None else f"{peaks[name]:.0f}"
        yield f"  {name:28} {cells[0]:>11} {cells[1]:>9} {cells[2]:>9} {cells[3]:>9} {peak:>7}"


def _digits(milliseconds: float) -> str:
    return f"{milliseconds:.1f}" if milliseconds >= 10 else f"{milliseconds:.3g}"


def targets(results: list[dict]) -> Iterator[str]:
    """Of one thread in float32: whether each was reached."""
    for result in results:
        if (result["dtype"], result["threads"]) != ("float32", 1):
            continue
        here = result["kind"], result["shape"]
        what = f"{' '.join(here)} float32"
        for *where, both, method, bound in RATIOS:
            times = times_of(result, both)
            if here == tuple(where) and method in times and "tether" in times:
                value = times[method] / times["tether"]
                word = "reached" if value >= bound else "missed"
                yield (
                    f"{word:7}  {what}, {'both passes' if both else 'forward'}: {method} over "
                    f"tether {value:.2f}, at least {bound}"
                )
        for *where, both, bound in CALLS:
            times = times_of(result, both)
            if here == tuple(where) and "tether" in times:
                value = 1e3 * times["tether"]
                word = "reached" if value <= bound else "missed"
                yield f"{word:7}  {what}, forward: {value:.1f} us a call, at most {bound}"


def picture(results: list[dict], path: pathlib.Path) -> None:
    """How many times longer than tether each method takes, both passes; a panel a configuration."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit(
            f"tether.bench: matplotlib must be installed for --picture, got none ({error})"
        ) from None
    shown = [each for each in results if "tether" in times_of(each, True)]
    figure = Figure(figsize=(7, 0.6 + 1.9 * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), squeeze=False)[:, 0]
    for panel, result in zip(panels, shown, strict=True):
        times = times_of(result, True)
        ratios = {name: value / times["tether"] for name, value in times.items()}
        colors = ["C0" if name.startswith("tether") else "0.7" for name in ratios]
        bars = panel.barh(list(ratios), list(ratios.values()), color=colors)
        panel.bar_label(bars, [f"{_digits(value)} ms" for value in times.values()], padding=3)
        panel.axvline(1, color="0.3", linewidth=0.8)
        panel.margins(x=0.2)
        panel.invert_yaxis()
        panel.set_title(
            f"{result['kind']} {result['shape']} {result['dtype']}, {result['threads']} thread(s)",
            fontsize="medium",
        )
    panels[-1].set_xlabel("time of both passes, times tether's")
    figure.savefig(path)
