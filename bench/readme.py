#!/usr/bin/env python3
"""Writes the README's tables of the logits layer from what the benchmarks left.

usage: readme.py PEERS.json LOGITS.json README.md

PEERS.json is of `./dev bench peers`, LOGITS.json of `./dev bench logits`; the tables stand between
the two comments that name this script.
"""

import json
import pathlib
import sys

import table

BEGIN, END = "<!-- begin: bench/readme.py -->", "<!-- end: bench/readme.py -->"


def number(value, digits=0):
    return "" if value is None else f"{value:.{digits}f}"


def peers(results, kind, shape, dtype):
    """{method: (forward ms, both ms, peak MB)} of one thread."""
    out = {}
    for result in results["results"]:
        if (result["kind"], result["shape"], result["dtype"], result["threads"]) != (
            kind,
            shape,
            dtype,
            1,
        ):
            continue
        for row in result["rows"]:
            forward, both, peak = out.get(row["method"], (None, None, None))
            if row["both"]:
                both, peak = row["ms"], row["peak_mb"]
            else:
                forward = row["ms"]
            out[row["method"]] = (forward, both, peak)
    return out


def peers_table(results, kind, shape):
    halves = peers(results, kind, shape, "bfloat16")
    yield (
        f"| {shape.replace('x', ' x ')}, ms | forward, float32 | with backward | MB | "
        "forward, bfloat16 | with backward | MB |"
    )
    yield "|---|---|---|---|---|---|---|"
    for method, floats in peers(results, kind, shape, "float32").items():
        cells = [number(each) for each in (*floats, *halves.get(method, (None,) * 3))]
        yield f"| {method} | " + " | ".join(cells) + " |"


def page(results, times):
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    yield f"*{results['cpu']}, {results['cores']} cores, one thread; {versions}.*"
    yield ""
    yield from peers_table(results, "logits", "512x151936")
    yield ""
    yield from peers_table(results, "linear", "512x1024x32000")
    yield ""
    yield "Beside the limits of the machine (`./dev bench logits`):"
    yield ""
    yield "| | measured | wanted |"
    yield "|---|---|---|"
    for what, value, relation, bound in table.logits_targets(times):
        if value is not None:
            sign = "at least" if relation == ">=" else "at most"
            yield f"| {what.replace(': ', ', ')} | {value:.2f} | {sign} {bound} |"


def main():
    peers_path, logits_path, readme = map(pathlib.Path, sys.argv[1:])
    results = json.loads(peers_path.read_text())
    times = table.medians(json.loads(logits_path.read_text()))
    text = readme.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    lines = "\n".join(page(results, times))
    readme.write_text(f"{before}{BEGIN}\n{lines}\n{END}{after}")


if __name__ == "__main__":
    main()
