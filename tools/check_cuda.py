#!/usr/bin/env python3
"""Every kernel compiles for the device without spills, within the registers of its launch.

Runs nvcc -Xptxas -v on each .cu file of the library and on tests/device/formulas.cu, every formula
as device code; nothing is run. A kernel without a line in REGISTERS, with more registers than it
allows, with a stack or with spills is an error. Without nvcc there is nothing to do.
"""

import concurrent.futures
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDERS = ["core", "estimators", "logits", "rl"]
FORMULAS = "tests/device/formulas.cu"
ARCHITECTURE = "sm_90"

# What a thread may use, by the beginning of the kernel's name; the first that fits counts. 65536
# over them is how many threads a multiprocessor holds.
REGISTERS = {
    "support_statistics_kernel": 64,
    "support_gradient_kernel": 128,
    "support_kl_kernel": 96,
    "statistics_kernel<.*true, (true|false)>": 64,
    "statistics_kernel": 32,
    "gradient_kernel<.*true>": 64,
    "gradient_kernel": 40,
    "rows_kernel": 80,
    "tokens_kernel<.*true,": 96,
    "tokens_kernel<float": 128,
    "tokens_kernel": 80,
    "weight_kernel": 40,
    "find_turns_kernel": 64,
    "turn_statistic_kernel": 64,
    "turn_ratio_kernel": 64,
    "turn_slope_kernel": 64,
    "turn_gradient_kernel": 64,
    "count_rows_kernel": 32,
    "set_numbers_kernel": 32,
    "add_counts_kernel": 32,
    "add_rows_kernel": 64,
    "value_kernel": 128,
    "count_values_kernel": 40,
    "add_value_counts_kernel": 40,
    "merge_values_kernel": 128,
    "answers_kernel": 64,
    "count_examples_kernel": 40,
    "examples_kernel": 168,
    "answer_gradient_kernel": 40,
    "scan_kernel": 64,
    "group_kernel": 64,
    "batch_std_kernel": 64,
    "moments_kernel": 64,
    "merge_moments_kernel": 64,
    "whitening_kernel": 40,
    "pair_kl_kernel": 64,
    "held_pair_kernel": 128,
}
# nvcc's own host code has the parentheses that g++ would warn of.
FLAGS = ["-std=c++20", f"-arch={ARCHITECTURE}", "-O3", "-I.", "-Werror=all-warnings",
         "-Xcompiler=-Wall,-Wextra,-Wno-parentheses", "-Xptxas=-v"]  # fmt: skip

ENTRY = re.compile(r"Compiling entry function '(\w+)'")
USED = re.compile(r"Used (\d+) registers")
MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


def compile_notes(source):
    """What ptxas says of a source, or an exit with nvcc's errors."""
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder, "out.o")
        command = ["nvcc", *FLAGS, "-c", source, "-o", str(out)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}cuda: {source} does not compile")
    return done.stdout + done.stderr


def kernels_of(notes):
    """[(demangled name, registers, bytes of stack and spills)]"""
    found, name, memory = [], "", 0
    for line in notes.splitlines():
        if match := ENTRY.search(line):
            name = match.group(1)
        elif match := MEMORY.search(line):
            memory = sum(map(int, match.groups()))
        elif name and (match := USED.search(line)):
            found.append((name, int(match.group(1)), memory))
            name = ""
    names = subprocess.run(
        ["c++filt"], input="\n".join(each[0] for each in found), capture_output=True, text=True
    ).stdout.splitlines()
    return [(name, *each[1:]) for name, each in zip(names, found, strict=True)]


def short(name):
    """The kernel without its namespaces, its return type and its arguments."""
    bare = re.sub(r"tether::(\w+::)*|\(anonymous namespace\)::", "", name)
    return re.sub(r"\(.*", "", bare.removeprefix("void "))


def errors_of(kernel, registers, memory, limited):
    if memory:
        yield f"{kernel}: {memory} bytes of stack and spills"
    if not limited:
        return
    limit = next((each for name, each in REGISTERS.items() if re.match(name, kernel)), None)
    if limit is None:
        yield f"{kernel}: has no line in REGISTERS of {pathlib.Path(__file__).name}"
    elif registers > limit:
        yield f"{kernel}: {registers} registers, at most {limit}"


def main():
    if not shutil.which("nvcc"):
        print("cuda: nothing compiled, no nvcc")
        return 0
    sources = sorted(
        file.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for file in (ROOT / folder).rglob("*.cu")
    )
    start, sources = time.monotonic(), [*sources, FORMULAS]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        notes = list(pool.map(compile_notes, sources))
    errors, count = [], 0
    for source, each in zip(sources, notes, strict=True):
        for name, registers, memory in kernels_of(each):
            count += 1
            found = errors_of(short(name), registers, memory, limited=source != FORMULAS)
            errors += [f"{source}: {error}" for error in found]
    result = "\n".join(errors) if errors else f"cuda: {count} kernels for {ARCHITECTURE}, no spills"
    print(f"{result} ({time.monotonic() - start:.0f} s)")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
