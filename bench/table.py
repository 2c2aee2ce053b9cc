#!/usr/bin/env python3
"""Makes a table of what tether_bench wrote.

usage: table.py RESULTS.json

Medians of CPU time over the repetitions, one thread. "x eager" compares with torch's operations in
the same shape: of the same function, of PPO for every policy loss; "of stream" with the loop that
moves the same bytes in the same shape, "of memory" with the copy of 1 GiB, in bytes per second.
"""

import json
import sys

NANOSECONDS = {"ns": 1, "us": 1e3, "ms": 1e6, "s": 1e9}
LARGE = ("64x1024", "512x4096")


def medians(results):
    """{name: (ns per call, bytes per second, tokens per second)}"""
    out = {}
    for run in sorted(results["benchmarks"], key=lambda run: run["family_index"]):
        if run.get("aggregate_name") == "median":
            out[run["run_name"].split("/iterations:")[0]] = (
                run["cpu_time"] * NANOSECONDS[run["time_unit"]],
                run.get("bytes_per_second", 0),
                run.get("items_per_second", 0),
            )
    return out


def stream_of(shape, row):
    dtype = "bfloat16" if "bfloat16" in row else "float32"
    return f"{shape}/{'stream_with_ref' if '/grpo/' in row else 'stream'}/{dtype}"


def ratio(times, numerator, denominator):
    if numerator not in times or denominator not in times:
        return None
    return times[numerator][0] / times[denominator][0]


def eager_of(times, shape, row):
    if row.count("/") < 2:  # of the machine
        return None
    name, dtype = row.split("/")[1:3]
    for words in (name, *(name.rsplit("_", count)[0] for count in (1, 2))):
        for each in (dtype, "float32"):
            own = f"{shape}/eager/{words}/{each}"
            if own in times:
                return own
    return f"{shape}/eager/ppo/float32"


def cell(value, digits=2):
    return "" if value is None else f"{value:.{digits}f}"


def table(times):
    yield (
        f"{'shape':>9}  {'row':38} {'us':>10} {'ns/item':>9} {'x eager':>8} {'of stream':>9} "
        f"{'of memory':>9}"
    )
    memory = times.get("machine/copy", (0, 0, 0))[1]
    for name, (nanoseconds, bytes_per_second, tokens_per_second) in times.items():
        shape, _, row = name.partition("/")
        if shape == "machine":
            continue
        other = eager_of(times, shape, row)
        eager = other and ratio(times, other, name)
        stream = ratio(times, stream_of(shape, row), name)
        share = bytes_per_second / memory if memory and shape in LARGE else None
        yield (
            f"{shape:>9}  {row:38} {nanoseconds / 1e3:10.2f} {1e9 / tokens_per_second:9.3f} "
            f"{cell(eager, 1):>8} {cell(stream):>9} {cell(share):>9}"
        )
    for name in ("read", "copy", "in_place", "copy_past_caches"):
        if f"machine/{name}" in times:
            bandwidth = times[f"machine/{name}"][1] / 1e9
            yield f"  machine  {name:38} {bandwidth:10.1f} GB/s"


def bandwidth(times, name, limit):
    """The share of the machine's own bandwidth."""
    if name not in times or f"machine/{limit}" not in times:
        return None
    return times[name][1] / times[f"machine/{limit}"][1]


def time_of_bytes(times, count, limit):
    """Nanoseconds that the machine takes for so many bytes."""
    return count / times[f"machine/{limit}"][1] * 1e9 if f"machine/{limit}" in times else None


def logits_targets(times):
    shape = "512x151936"
    raw = f"{shape}/raw/logits"
    for row in ("forward", "forward_logp"):
        name = f"{raw}_{row}/float32"
        yield f"{name}: of read", bandwidth(times, name, "read"), ">=", 0.8
        half = f"{raw}_{row}/bfloat16"
        speed = times[half][2] / 1e9 if half in times else None
        yield f"{half}: G elements/s", speed, ">=", 5
    name = f"{raw}_backward_in_place/float32"
    yield f"{name}: of in place", bandwidth(times, name, "in_place"), ">=", 0.85
    name = f"{raw}_row_loss/float32"
    if name in times:
        once = 512 * 151936 * 4
        limits = (
            time_of_bytes(times, once, "read"),
            time_of_bytes(times, 2 * once, "copy_past_caches"),
        )
        if None not in limits:
            yield f"{name}: x (read + copy)", times[name][0] / sum(limits), "<=", 1.05
    for name in ("both", "both_own_buffer"):
        name = f"{shape}/autograd/logits_{name}/float32"
        yield f"{name}: x eager", ratio(times, f"{shape}/eager/logits_both/float32", name), ">=", 9
    for dtype in ("float32", "bfloat16"):
        gemm = f"1024x1024x32000/gemm/logits_linear/{dtype}"
        for rows in (256, 512, 1024):
            name = f"1024x1024x32000/autograd/logits_linear_chunk_{rows}/{dtype}"
            yield f"{name}: x products", ratio(times, name, gemm), "<=", 1.1


def targets(times):
    """(what, value, at least or at most, bound)"""
    yield from logits_targets(times)
    gae = "256x2048/raw/gae/float32"
    yield f"{gae}: x eager", ratio(times, "256x2048/eager/gae/float32", gae), ">=", 20
    for row in ("ppo", "user"):
        for shape in LARGE:
            raw = f"{shape}/raw/{row}/float32"
            eager = f"{shape}/eager/ppo/float32"
            yield f"{raw}: x eager", ratio(times, eager, raw), ">=", 20
            yield f"{raw}: of stream", ratio(times, f"{shape}/stream/float32", raw), ">=", 0.6
            through = f"{shape}/autograd/{row}/float32"
            yield f"{through}: x eager", ratio(times, eager, through), ">=", 10
        for name, bound in (("raw", 1), ("autograd", 15)):
            key = f"8x16/{name}/{row}/float32"
            yield f"{key}: us", times[key][0] / 1e3 if key in times else None, "<=", bound


def main():
    (path,) = sys.argv[1:]
    with open(path) as file:
        results = json.load(file)
    context = results["context"]
    kept = ("date", "cpu", "instruction_set", "compiler", "torch", "threads", "load_avg")
    print(", ".join(f"{key} {context[key]}" for key in kept if key in context))
    times = medians(results)
    print("\n".join(table(times)))
    for what, value, relation, bound in targets(times):
        if value is not None:
            met = value >= bound if relation == ">=" else value <= bound
            word = "reached" if met else "missed"
            print(f"{word:7}  {what} {value:.2f}, wanted {relation} {bound}")


if __name__ == "__main__":
    main()
