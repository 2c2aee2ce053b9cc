"""bench/readme.py writes the figures where the pages have them, and nothing else."""

import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent.parent
BEGIN, END = "<!-- begin: bench/readme.py -->", "<!-- end: bench/readme.py -->"


def row(method, both, milliseconds):
    return {"method": method, "both": both, "ms": milliseconds, "peak_mb": 155.4}


def configuration(kind, shape, dtype):
    rows = [row(name, both, 10 + both) for name in ("eager", "tether") for both in (False, True)]
    return {"kind": kind, "shape": shape, "dtype": dtype, "threads": 1, "rows": rows}


def written(tmp_path, *pages):
    peers = {
        "cpu": "A processor",
        "cores": 2,
        "versions": {"torch": "2.13.0"},
        "results": [
            configuration("logits", "512x151936", dtype) for dtype in ("float32", "bfloat16")
        ],
    }
    (tmp_path / "peers.json").write_text(json.dumps(peers))
    (tmp_path / "logits.json").write_text(json.dumps({"benchmarks": []}))
    arguments = [*pages, tmp_path / "logits.json", tmp_path / "peers.json"]
    return subprocess.run(
        [sys.executable, ROOT / "bench/readme.py", *arguments], capture_output=True, text=True
    )


def test_the_readme_gets_one_table_and_the_page_all(tmp_path):
    readme, speed = tmp_path / "README.md", tmp_path / "speed.md"
    for page in (readme, speed):
        page.write_text(f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    out = written(tmp_path, readme, speed)
    assert out.returncode == 0, out.stderr
    table = (
        "*A processor, 2 cores, one thread; torch 2.13.0.*\n\n"
        "| 512 x 151936, ms | forward, float32 | with backward | MB | "
        "forward, bfloat16 | with backward | MB |\n|---|---|---|---|---|---|---|\n"
        "| eager | 10 | 11 | 155 | 10 | 11 | 155 |\n| tether | 10 | 11 | 155 | 10 | 11 | 155 |\n"
    )
    assert readme.read_text() == f"before\n\n{BEGIN}\n{table}{END}\n\nafter\n"
    assert speed.read_text().startswith(f"before\n\n{BEGIN}\n{table}\n")
    assert "How many times longer" in speed.read_text()
    assert speed.read_text().endswith(f"{END}\n\nafter\n")


def test_a_page_without_the_comments_is_left_alone(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("nothing\n")
    out = written(tmp_path, page, page)
    assert out.stderr == f"readme.py: {page} must have the lines {BEGIN} and {END}, got none\n"
    assert page.read_text() == "nothing\n"


def test_the_pages_have_the_comments():
    for page in (ROOT / "README.md", ROOT / "docs/speed.md"):
        text = page.read_text()
        assert text.count(BEGIN) == text.count(END) == 1
