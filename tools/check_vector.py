#!/usr/bin/env python3
"""Every loop marked `// VECTOR` is vectorised with 64 byte vectors: a lost one is silent and slow.

usage: check_vector.py BUILD_FOLDER

The mark stands on the line of the `for` or alone on the line before it. Each source of the build's
compile_commands.json, but for tests and CUDA, is compiled once more with GCC's vectoriser dump,
which tells for each function which loops it vectorised and which it could not. In every AVX-512
clone that holds a marked loop the loop must be vectorised, so one bad formula in a template is
found.
"""

import concurrent.futures
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDERS = ["core", "estimators", "logits", "rl"]
FUNCTION = re.compile(r"^;; Function (.*?) \((\S+), funcdef_no")
NOTE = re.compile(
    r"^(\S+?):(\d+):\d+: "
    r"(optimized: loop vectorized using (\d+) byte|missed: couldn't vectorize loop)"
)


def marked_loops():
    """{(file, line of the for)}"""
    loops = set()
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix not in {".h", ".cc"}:
                continue
            for number, line in enumerate(file.read_text().splitlines(), start=1):
                code, mark, _ = line.partition("// VECTOR")
                if mark:
                    loops.add((str(file), number if code.strip() else number + 1))
    return loops


def dump_of(entry):
    """The vectoriser's notes on one source: [(function, file, line, bytes or 0)]."""
    command = shlex.split(entry["command"])
    while not re.search(r"(g\+\+|c\+\+|gcc)[^/]*$", command[0]):
        command.pop(0)  # a launcher such as ccache
    command[command.index("-o") + 1] = os.devnull
    with tempfile.TemporaryDirectory() as folder:
        dump = pathlib.Path(folder, "vect")
        command.append(f"-fdump-tree-vect-optimized-missed={dump}")
        if subprocess.run(command, cwd=entry["directory"]).returncode:
            sys.exit(f"vector loops: {entry['file']} does not compile")
        notes = []
        function = ""
        dump.touch()  # GCC writes none for a source without functions
        for line in dump.read_text(errors="replace").splitlines():
            if match := FUNCTION.match(line):
                function = f"{match.group(1)} {match.group(2)}"
            elif match := NOTE.match(line):
                file = str(pathlib.Path(entry["directory"], match.group(1)).resolve())
                notes.append((function, file, int(match.group(2)), int(match.group(4) or 0)))
        return notes


def demangled(function):
    symbol = function.split()[-1].split(".")[0]
    return subprocess.run(["c++filt", symbol], capture_output=True, text=True).stdout.strip()


def main():
    (build,) = sys.argv[1:]
    loops = marked_loops()
    entries = [
        entry
        for entry in json.loads(pathlib.Path(build, "compile_commands.json").read_text())
        if not entry["file"].startswith(str(ROOT / "tests")) and not entry["file"].endswith(".cu")
    ]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        notes = [note for found in pool.map(dump_of, entries) for note in found]

    widest = {}  # {(function, file, line): widest vectors}, AVX-512 clones only
    for function, file, line, width in notes:
        if "arch_x86_64_v4" in function and (file, line) in loops:
            key = (function, file, line)
            widest[key] = max(width, widest.get(key, 0))

    def place(file, line):
        return f"{pathlib.Path(file).relative_to(ROOT)}:{line}"

    errors = [
        f"{place(file, line)}: got {width or 'no'} byte vectors in {demangled(function)}"
        for (function, file, line), width in widest.items()
        if width < 64
    ]
    seen = {(file, line) for _, file, line in widest}
    errors += [
        f"{place(file, line)}: no loop here in any AVX-512 clone "
        "(not instantiated, or unrolled: mark the loop around it)"
        for file, line in loops - seen
    ]
    print(
        "\n".join(sorted(errors))
        if errors
        else f"vector loops: {len(loops)} marked, {len(widest)} instances, all with 64 byte vectors"
    )
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
