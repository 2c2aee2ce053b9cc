#!/usr/bin/env python3
"""Writes the tables of the logits layer from what the benchmarks left.

usage: readme.py README.md SPEED.md LOGITS.json PEERS.json ...

LOGITS.json is of `./dev bench logits`, each PEERS.json of a run of `./dev bench peers`: of a
configuration that several measured, the last counts. SPEED.md gets all tables, README.md the first
one, between the two comments that name this script.
"""

import json
import pathlib
import sys

import table

BEGIN, END = "<!-- begin: bench/readme.py -->", "<!-- end: bench/readme.py -->"


def number(value, digits=0):
    return "" if value is None else f"{value:.{digits}f}"


def configuration(result):
    return result["kind"], result["shape"], result["dtype"], result["threads"]


def peers(results, kind, shape, dtype):
    """{method: (forward ms, both ms, peak MB)} of one thread."""
    out = {}
    for result in results["results"]:
        if configuration(result) != (kind, shape, dtype, 1):
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


def every_shape(results):
    """Both passes of every configuration: tether's time, and how many times longer others take."""
    others = ("eager", "torch.compile", "trl", "trl add_fused_lm_head", "verl")
    yield "| both passes | dtype | threads | tether, ms | eager | torch.compile | TRL | verl |"
    yield "|---|---|---|---|---|---|---|---|"
    for result in results["results"]:
        times = {row["method"]: row["ms"] for row in result["rows"] if row["both"]}
        own = times.get("tether")
        if own is None or result["kind"] not in ("logits", "kl", "linear"):
            continue
        eager, compiled, trl, fused, verl = (
            number(times[name] / own, 1) if name in times else "" for name in others
        )
        what = f"{result['kind']} {result['shape'].replace('x', ' x ')}"
        yield (
            f"| {what} | {result['dtype']} | {result['threads']} | {own:.0f} | {eager} | "
            f"{compiled} | {trl or fused} | {verl} |"
        )


def products_table(results):
    """The fused loss beside its three matrix products alone, over all configurations."""
    yield "| x its three matrix products | dtype | threads | DAPO loss | torch.compile, logps |"
    yield "|---|---|---|---|---|"
    for result in results["results"]:
        times = {row["method"]: row["ms"] for row in result["rows"] if row["both"]}
        if result["kind"] != "linear":
            continue
        fused, compiled = (
            number(times.get(name) and times[name] / times["products"], 2)
            for name in ("tether DAPO (a loss)", "torch.compile")
        )
        yield (
            f"| {result['shape'].replace('x', ' x ')} | {result['dtype']} | {result['threads']} | "
            f"{fused} | {compiled} |"
        )


def first_table(results):
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    yield f"*{results['cpu']}, {results['cores']} cores, one thread; {versions}.*"
    yield ""
    yield from peers_table(results, "logits", "512x151936")


def all_tables(results, times):
    yield from first_table(results)
    yield ""
    yield from peers_table(results, "kl", "512x32000")
    yield ""
    yield from peers_table(results, "linear", "512x1024x32000")
    yield ""
    yield "How many times longer the peers take, in other shapes and with two threads:"
    yield ""
    yield from every_shape(results)
    yield ""
    yield from products_table(results)
    yield ""
    yield "Beside the limits of the machine (`./dev bench logits`):"
    yield ""
    yield "| | measured | wanted |"
    yield "|---|---|---|"
    for what, value, relation, bound in table.logits_targets(times):
        if value is not None:
            sign = "at least" if relation == ">=" else "at most"
            yield f"| {what.replace(': ', ', ')} | {value:.2f} | {sign} {bound} |"


def write(path, lines, begin=BEGIN, end=END):
    before, begins, rest = path.read_text().partition(begin)
    _, ends, after = rest.partition(end)
    if not (begins and ends):
        script = pathlib.Path(sys.argv[0]).name
        sys.exit(f"{script}: {path} must have the lines {begin} and {end}, got none")
    path.write_text("\n".join([before + begin, *lines, end + after]))


def main():
    readme, speed, logits_path, *peers_paths = map(pathlib.Path, sys.argv[1:])
    runs = [json.loads(path.read_text()) for path in peers_paths]
    last = {configuration(each): each for run in runs for each in run["results"]}
    results = runs[0] | {"results": list(last.values())}
    times = table.medians(json.loads(logits_path.read_text()))
    write(readme, first_table(results))
    write(speed, all_tables(results, times))


if __name__ == "__main__":
    main()
