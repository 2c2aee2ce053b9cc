"""Every code block of README.md and docs/ is run here, or is part of a file that is compiled.

python      run, all blocks of a page in order, in one namespace
cpp, cmake  paragraph by paragraph in one file of COMPILED, which a build of the tests compiles
sh          ./dev with a command of its usage, or a line of RUN_ELSEWHERE
text        nothing to run
"""

import os
import pathlib
import re
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMPILED = {
    "cpp": [*ROOT.glob("tests/docs/*.cc"), *ROOT.glob("tests/consumers/no_torch/*.cc"),
            *ROOT.glob("tests/cuda/*.cc"), *ROOT.glob("tests/consumers/*cuda/*.cu"),
            ROOT / "examples/consumer/main.cc"],
    "cmake": [*ROOT.glob("tests/consumers/*/CMakeLists.txt"),
              ROOT / "examples/consumer/CMakeLists.txt"],
}  # fmt: skip
COMPILER_CACHE = {"CMAKE_CXX_COMPILER_LAUNCHER": shutil.which("ccache") or ""}
FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page, language):
    return [code for name, code in FENCE.findall(page.read_text()) if name == language]


def name_of(page):
    return str(page.relative_to(ROOT))


def pages_with(language):
    pages = [page for page in PAGES if blocks(page, language)]
    return pytest.mark.parametrize("page", pages, ids=name_of)


def test_every_block_has_a_language_that_is_tested():
    known = {"python", "cpp", "cmake", "sh", "text", "{toctree}"}
    for page in PAGES:
        assert {name for name, _ in FENCE.findall(page.read_text())} <= known, name_of(page)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files(page):
    """The site checks its pages; README.md is none, and a link there must work without the site."""
    for target in re.findall(r"\]\(([^)#]+)", FENCE.sub("", page.read_text())):
        assert target.startswith("https:") or (page.parent / target).exists(), target


@pages_with("python")
def test_python_blocks_run(page):
    namespace = {}
    for code in blocks(page, "python"):
        exec(compile(code, name_of(page), "exec"), namespace)


def lines_of(text):
    """Without indentation."""
    return [line.strip() for line in text.splitlines()]


def is_part(paragraph, lines):
    count = len(paragraph)
    return any(lines[i : i + count] == paragraph for i in range(len(lines) - count + 1))


@pytest.mark.parametrize("language", COMPILED)
def test_compiled_blocks_are_in_a_file_that_is_compiled(language):
    files = [lines_of(file.read_text()) for file in COMPILED[language]]
    for page in PAGES:
        for block in blocks(page, language):
            paragraphs = [lines_of(each) for each in block.strip().split("\n\n")]
            assert any(
                all(is_part(paragraph, lines) for paragraph in paragraphs) for lines in files
            ), f"{name_of(page)}: no file holds\n{block}"


@pages_with("sh")
def test_shell_blocks_run(page, tmp_path):
    usage = subprocess.run(["./dev", "--help"], cwd=ROOT, capture_output=True, text=True).stdout
    known = set(re.findall(r"^  (\w+)", usage, re.MULTILINE))
    script = []
    for line in "".join(blocks(page, "sh")).replace("\\\n", "").splitlines():
        if line.startswith("./dev "):  # they take long, and have tests of their own
            assert line.split()[1] in known, line
        else:
            script.append(line)
    if not script:
        return
    if not (ROOT / "build/release/build.ninja").exists():
        pytest.skip("build/release is not there")
    out = subprocess.run(
        ["bash", "-euxc", "\n".join(script)],
        cwd=ROOT,
        env=os.environ | {"HOME": str(tmp_path)} | COMPILER_CACHE,
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stdout + out.stderr
