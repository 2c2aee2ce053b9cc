#!/usr/bin/env python3
"""clang-format over every C++ file, in the version that tools/requirements.txt pins.

usage: check_format.py [--write]
"""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDERS = [
    "face",
    "logits",
    "bench",
    "core",
    "estimators",
    "examples",
    "libtorch",
    "python",
    "rl",
    "testing",
    "tests",
    "tools",
]


def main():
    files = [
        str(file.relative_to(ROOT))
        for folder in FOLDERS
        for file in sorted((ROOT / folder).rglob("*"))
        if file.suffix in {".h", ".cc", ".cu"}
    ]
    mode = ["-i"] if "--write" in sys.argv[1:] else ["--dry-run", "--Werror"]
    clang_format = pathlib.Path(sys.executable).parent / "clang-format"
    result = subprocess.run([clang_format, *mode, *files], cwd=ROOT, capture_output=True, text=True)
    if result.returncode == 0:
        print(f"format: {len(files)} files")
        return 0
    unformatted = sorted(set(re.findall(r"^(\S+?):\d+:\d+: error", result.stderr, re.MULTILINE)))
    print("\n".join(f"{file}: not formatted" for file in unformatted) or result.stderr)
    print("format: run .venv/bin/python tools/check_format.py --write")
    return 1


if __name__ == "__main__":
    sys.exit(main())
