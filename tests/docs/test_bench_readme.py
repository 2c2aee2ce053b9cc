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


GPU_BEGIN, GPU_END = (f"<!-- {word}: bench/gpu_tables.py -->" for word in ("begin", "end"))


def gpu_reports():
    rows = {
        "shape": [8192, 151936],
        "dtype": "torch.bfloat16",
        "masked": 0.4,
        "ms": {"copy": 1.25, "one": 1.5},
        "GB/s": {"copy": 3982.6, "one": 3318.8},
        "of_copy": {"copy": 1.0, "one": 0.8333},
        "target": {"one": 1.035},
        "peak MB": {"copy": 0.0, "one": 12.4},
    }
    tokens = {
        "shape": [512, 4096],
        "ms": {"ppo": 0.0151, "ppo eager": 0.4},
        "target": {"ppo": 0.016},
    }
    linear = {
        "sizes": [4096, 4096, 128256],
        "ms": {"products": 16.0, "linear_policy_loss": 17.0},
        "of_products": 1.0625,
        "target": 1.06,
        "peak MB": {"products": 100.0, "linear_policy_loss": 3000.0},
    }
    gpu = {"device": "A GPU"}
    checks = {"failed": [], "rows": [{"shape": [8, 7], "passed": True}]}
    return {
        "gpu": gpu | checks | {"times": [rows], "policy_times": tokens},
        "gpu_face": {"kernels": [], "times": {"ms of grpo": {"kernels": 1.0, "torch": 2.0}}},
        "gpu_linear": gpu | linear,
    }


def gpu_written(tmp_path, page, reports):
    paths = [tmp_path / f"{name}.json" for name in reports]
    for path, report in zip(paths, reports.values(), strict=True):
        path.write_text(json.dumps(report))
    return subprocess.run(
        [sys.executable, ROOT / "bench/gpu_tables.py", page, *paths], capture_output=True, text=True
    )


def test_the_page_of_speed_gets_what_a_gpu_was_seen_to_do(tmp_path):
    page = tmp_path / "speed.md"
    page.write_text(f"before\n\n{GPU_BEGIN}\nold\n{GPU_END}\n\nafter\n")
    out = gpu_written(tmp_path, page, gpu_reports())
    assert out.returncode == 0, out.stderr
    assert page.read_text() == (
        f"before\n\n{GPU_BEGIN}\n\n## On a GPU\n\n"
        "*A GPU.* By `./dev gpu`. MB: above the inputs and results. A copy reads\n"
        "and writes the logits once. Wanted: of an H200.\n\n"
        "| rows of logits | ms | GB/s | of a copy | wanted | MB |\n|---|---|---|---|---|---|\n"
        "| 8192 x 151936, bfloat16, 40% masked: copy | 1.250 | 3983 | 1.00 |  | 0 |\n"
        "| 8192 x 151936, bfloat16, 40% masked: one | 1.500 | 3319 | 0.83 | 1.03 | 12 |\n\n"
        "| losses and advantages of tokens | ms | wanted |\n|---|---|---|\n"
        "| 512 x 4096: ppo | 0.015 | 0.016 |\n| 512 x 4096: ppo eager | 0.400 |  |\n\n"
        "| tokens x hidden x vocabulary | ms | x its three products | wanted | MB |\n"
        "|---|---|---|---|---|\n"
        "| 4096 x 4096 x 128256: products | 16.00 | 1.00 |  | 100 |\n"
        "| 4096 x 4096 x 128256: linear_policy_loss | 17.00 | 1.06 | 1.06 | 3000 |\n\n"
        f"{GPU_END}\n\nafter\n"
    )


def test_reports_of_two_devices_are_not_put_together(tmp_path):
    page = tmp_path / "speed.md"
    page.write_text(f"{GPU_BEGIN}\n{GPU_END}\n")
    reports = gpu_reports()
    reports["gpu_linear"]["device"] = "Another"
    out = gpu_written(tmp_path, page, reports)
    assert out.stderr == "gpu_tables.py: reports must be of one device, got A GPU, Another\n"
    assert page.read_text() == f"{GPU_BEGIN}\n{GPU_END}\n"
    page.write_text("nothing\n")
    out = gpu_written(tmp_path, page, gpu_reports())
    assert out.stderr == (
        f"gpu_tables.py: {page} must have the lines {GPU_BEGIN} and {GPU_END}, got none\n"
    )


def test_the_page_of_speed_has_the_comments_of_a_gpu():
    text = (ROOT / "docs/speed.md").read_text()
    assert text.count(GPU_BEGIN) == text.count(GPU_END) == 1
