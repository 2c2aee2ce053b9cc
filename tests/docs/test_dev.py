"""./dev says in one line what is wrong with its arguments, and before it builds anything."""

import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
BENCH = ROOT / "build/release/bench/tether_bench"


def dev(*arguments):
    return subprocess.run(["./dev", *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["build"],
            "COMMAND must be demo, compare, test, check, docs, bench, catalogue, gpu or wheel, "
            "got build",
        ),
        (["demo", "fast"], "demo: option must begin with -, got fast"),
        (["compare"], "compare: takes PICTURE and LABEL=RUN..., got nothing"),
        (["compare", "a.png"], "compare: takes PICTURE and LABEL=RUN..., got a.png"),
        *[
            (
                ["test", *options],
                "test: option must be --long, --sanitize, --peers or --torch MAJOR.MINOR, got "
                + " ".join(options),
            )
            for options in (["--short"], ["--long", "x"], ["--torch"], ["--torch", "2.10.0"])
        ],
        (["check", "--write"], "check: takes no option, got --write"),
        (["docs", "x"], "docs: takes no option, got x"),
        (["wheel", "x"], "wheel: option must be --cuda, got x"),
        (["catalogue", "write"], "catalogue: option must be --write, got write"),
        (["gpu", "quick"], "gpu: option must begin with -, got quick"),
        (["bench", "ppo", "64x1024"], "bench ppo: option must begin with -, got 64x1024"),
        (["bench", "peers", "x"], "bench peers: option must begin with -, got x"),
        (["bench", "readme", "x"], "bench readme: takes no option, got x"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, list) else "",
)
def test_a_wrong_argument_gets_one_line(arguments, message):
    out = dev(*arguments)
    assert (out.returncode, out.stdout, out.stderr) == (1, "", f"./dev: {message}\n")


@pytest.mark.parametrize(
    "command", ["compare", "test", "check", "docs", "bench", "catalogue", "gpu", "wheel"]
)
def test_help_is_the_usage(command):
    out = dev(command, "--help")
    assert out.returncode == 0
    assert out.stdout.startswith("usage: ./dev COMMAND")


def test_curves_of_runs_are_drawn_over_one_another(tmp_path):
    picture = tmp_path / "both.png"
    for run, accuracy in (("a", 0.5), ("b", 0.7)):
        (tmp_path / run).mkdir()
        (tmp_path / run / "curve.csv").write_text(
            f"phase,step,entropy,held_out\nrl,0,0.3,\nrl,1,0.2,{accuracy}\n"
        )
    out = dev("compare", str(picture), f"one={tmp_path}/a", f"other={tmp_path}/b")
    assert out.returncode == 0, out.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    out = dev("compare", str(picture), f"one={tmp_path}/c")
    assert out.stderr.splitlines()[-1] == (
        "compare.py: error: argument LABEL=FOLDER: must be LABEL=FOLDER with a curve.csv in "
        f"FOLDER, got one={tmp_path}/c"
    )


def test_readme_figures_need_a_run(tmp_path):
    runs = ROOT / "runs/bench/logits.json"
    if runs.exists():
        pytest.skip(f"{runs} is there")
    out = dev("bench", "readme")
    assert out.stderr == (
        "./dev: bench readme: runs/bench/logits.json must be there. Run ./dev bench logits first\n"
    )


@pytest.mark.skipif(not BENCH.exists(), reason="the benchmarks are not built")
def test_a_benchmark_that_is_not_there_gets_one_line():
    out = dev("bench", "8x16/no_such_row")
    assert out.stderr == (
        "./dev: bench: NAME must match a benchmark, got 8x16/no_such_row. "
        "build/release/bench/tether_bench --benchmark_list_tests lists them\n"
    )


@pytest.mark.skipif(not BENCH.exists(), reason="the benchmarks are not built")
def test_the_name_of_a_benchmark_may_have_a_slash():
    out = dev(
        "bench", "8x16/raw/ppo/float32", "--benchmark_repetitions=2", "--benchmark_min_time=0.001"
    )
    assert out.returncode == 0, out.stderr
    assert (ROOT / "runs/bench/8x16_raw_ppo_float32.json").exists()
