#!/usr/bin/env python3
"""Writes the tables of a GPU from the reports of ./dev gpu.

usage: gpu_tables.py SPEED.md REPORT.json ...

SPEED.md gets them, with their heading, between the two comments that name this script.
"""

import json
import pathlib
import sys

import readme

BEGIN, END = "<!-- begin: bench/gpu_tables.py -->", "<!-- end: bench/gpu_tables.py -->"


def device_of(reports):
    """That of all reports that name one."""
    found = sorted({report["device"] for report in reports if "device" in report})
    if len(found) != 1:
        sys.exit(f"gpu_tables.py: reports must be of one device, got {', '.join(found) or 'none'}")
    return found[0]


def measured(reports):
    """What of_logits and of_tokens of bench/gpu/timing.py found."""
    for report in reports:
        for part in report.values():
            for each in part if isinstance(part, list) else [part]:
                if isinstance(each, dict) and {"shape", "ms"} <= each.keys():
                    yield each


def sizes(shape):
    return " x ".join(map(str, shape))


def logits_table(cases):
    yield "| rows of logits | ms | GB/s | of a copy | wanted | MB |"
    yield "|---|---|---|---|---|---|"
    for case in cases:
        what = f"{sizes(case['shape'])}, {case['dtype'].removeprefix('torch.')}"
        if case["masked"]:
            what += f", {case['masked']:.0%} masked"
        for name, ms in case["ms"].items():
            target = case["target"].get(name)
            yield (
                f"| {what}: {name} | {ms:.3f} | {case['GB/s'][name]:.0f} | "
                f"{case['of_copy'][name]:.2f} | {readme.number(target, 2)} | "
                f"{case['peak MB'][name]:.0f} |"
            )


def tokens_table(cases):
    yield "| losses and advantages of tokens | ms | wanted |"
    yield "|---|---|---|"
    for case in cases:
        for name, ms in case["ms"].items():
            target = readme.number(case["target"].get(name), 3)
            yield f"| {sizes(case['shape'])}: {name} | {ms:.3f} | {target} |"


def linear_table(report):
    yield "| tokens x hidden x vocabulary | ms | x its three products | wanted | MB |"
    yield "|---|---|---|---|---|"
    for name, ms in report["ms"].items():
        ratio, target = ms / report["ms"]["products"], report["target"]
        wanted = readme.number(target if name != "products" else None, 2)
        memory = readme.number(report["peak MB"].get(name))
        yield f"| {sizes(report['sizes'])}: {name} | {ms:.2f} | {ratio:.2f} | {wanted} | {memory} |"


def tables(reports):
    cases = list(measured(reports))
    rows = [each for each in cases if "of_copy" in each]
    yield from ["", "## On a GPU", ""]
    yield f"*{device_of(reports)}.* By `./dev gpu`. MB: above the inputs and results. A copy reads"
    yield "and writes the logits once. Wanted: of an H200."
    for table in (
        logits_table(rows),
        tokens_table([each for each in cases if "of_copy" not in each]),
        *(linear_table(each) for each in reports if "of_products" in each),
    ):
        lines = list(table)
        if len(lines) > 2:
            yield from ["", *lines]
    yield ""


def main():
    speed, *paths = map(pathlib.Path, sys.argv[1:])
    readme.write(speed, tables([json.loads(path.read_text()) for path in paths]), BEGIN, END)


if __name__ == "__main__":
    main()
