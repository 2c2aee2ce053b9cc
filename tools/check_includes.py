#!/usr/bin/env python3
"""One-way includes: every folder sees only the folders below it, and torch and Eigen stay out.

The arrows are transitive: what a folder may see is written out in full.
"""

import pathlib
import posixpath
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent

# The folder of a file is its longest prefix here. Folders that are not listed see everything.
ALLOWED = {
    "core": {"core"},
    "estimators": {"core", "estimators"},
    "logits": {"core", "estimators", "logits"},
    "rl": {"core", "estimators", "rl"},
    "rl/kernels": {"core", "estimators", "logits", "rl", "rl/kernels"},
}
ALLOWED["face"] = ALLOWED["rl/kernels"] | {"face"}
ALLOWED["libtorch"] = ALLOWED["face"] | {"libtorch"}
ALLOWED["python"] = ALLOWED["face"] | {"python"}
ALLOWED["examples"] = ALLOWED["face"] | {"libtorch", "python", "examples"}
# rl/catalogue.h lists objectives; the kernels are instantiated from it, so it may not see them.
NO_TORCH = {"core", "estimators", "logits", "rl", "rl/kernels", "face"}
TORCH = re.compile(r"^(torch|ATen|c10|caffe2)/")
EIGEN = re.compile(r"^(unsupported/)?Eigen/")
FOLDERS = set(ALLOWED) | {"testing", "tests", "bench", "tools"}
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)


def folder_of(path):
    """The listed folder that holds this path, or None: a system header or an unlisted folder."""
    parents = [p.as_posix() for p in pathlib.PurePosixPath(path).parents]
    return next((p for p in parents if p in FOLDERS), None)


def errors_of(path, text):
    folder = folder_of(path)
    for match in INCLUDE.finditer(text):
        header = match.group(1)
        line = text.count("\n", 0, match.start(1)) + 1
        where = f"{path}:{line}: {folder} must not include {header}"
        if folder in NO_TORCH and TORCH.match(header):
            yield f"{where}: no torch here"
        if folder in NO_TORCH and folder != "face" and EIGEN.match(header):
            yield f"{where}: Eigen is for face"
        beside = posixpath.normpath(posixpath.join(posixpath.dirname(path), header))
        target = folder_of(beside if (ROOT / beside).exists() else header)
        if target and folder in ALLOWED and target not in ALLOWED[folder]:
            yield f"{where}: it sees only {', '.join(sorted(ALLOWED[folder]))}"


def main():
    errors = []
    files = 0
    for folder in sorted(f for f in ALLOWED if "/" not in f):
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix in {".h", ".cc", ".cu"}:
                files += 1
                errors += errors_of(file.relative_to(ROOT).as_posix(), file.read_text())
    print("\n".join(errors) if errors else f"includes: {files} files follow the arrows")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
