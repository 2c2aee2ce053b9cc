"""The scripts of ./dev gpu, without a GPU: what they ask of the kernels is what these take."""

import json
import pathlib
import subprocess
import sys

import pytest
import tether
import torch

ROOT = pathlib.Path(__file__).parents[2]
DOORS = ROOT / "build/no-torch/bench/gpu/gpu_doors.so"
LAUNCHED = {
    "check": {"row_statistics", "row_gradients", "policy_loss"},
    "logits_policy": {"row_statistics", "row_gradients", "policy_loss", "policy_loss_of_logits"},
    "rest": {"logits_kl"},
}


@pytest.mark.skipif(not DOORS.exists(), reason="./dev check builds the kernels where there is nvcc")
@pytest.mark.parametrize("script", LAUNCHED)
def test_a_script_gets_as_far_as_the_launches_and_writes_its_report(script, tmp_path):
    report = tmp_path / "report.json"
    command = [sys.executable, "tests/docs/without_gpu.py", script, str(DOORS)]
    done = subprocess.run(
        [*command, "--quick", "--json", str(report)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    became = json.loads(done.stdout)
    assert {name for name, each in became.items() if each == "launched"} == LAUNCHED[script]
    parts = json.loads(report.read_text())
    assert [each for each in parts.values() if isinstance(each, dict) and "error" in each] == []


def test_the_loss_of_hidden_states_is_measured_beside_its_products(tmp_path):
    report, installed = tmp_path / "report.json", pathlib.Path(tether.__file__).parent
    command = [sys.executable, "bench/gpu/linear.py", installed, "--json", report]
    small = ["--device", "cpu", "--sizes", "64", "32", "1000", "--repetitions", "1"]
    done = subprocess.run([*command, *small], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    assert found["sizes"] == [64, 32, 1000]
    assert found["of_products"] == found["ms"]["linear_policy_loss"] / found["ms"]["products"]
    assert found["target"] is found["reached"] is None  # of other sizes


class Event:
    """Of a clock that stands but for takes()."""

    now = 0.0

    def __init__(self, **_):
        self.at = None

    def record(self):
        self.at = Event.now

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return end.at - self.at


def takes(milliseconds):
    def call():
        Event.now += milliseconds

    return call


@pytest.fixture
def timing(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench/gpu")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    memory = iter(range(0, 1000, 7))
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: next(memory) * 10**6)
    for name in ("reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    import timing

    return timing


def test_rates_stand_beside_what_is_wanted_of_them(timing):
    logits = torch.empty(1, 1, dtype=torch.bfloat16).expand(8192, 151936)

    def absent():
        raise RuntimeError("no compiler\nhere")

    methods = {
        "copy": (takes(2), 2),
        "one": (takes(2.5), 2),
        "forward": (takes(1), 1),
        "three": (takes(4), 3),
        "compiled": (absent, 1),
    }
    found = timing.of_logits(logits, methods, 5)
    assert found["of_copy"] == {"copy": 1, "one": 0.8, "forward": 1, "three": 0.75}
    assert found["GB/s"]["copy"] == pytest.approx(2 * 8192 * 151936 / 1e6)
    assert found["target"] == {"one": 0.88, "forward": 0.92}
    assert found["reached"] == {"one": False, "forward": True}
    assert found["peak MB"] == dict.fromkeys(("copy", "one", "forward", "three"), 7)
    assert found["errors"] == {"compiled": "no compiler"}
    masked = timing.of_logits(logits, methods, 1, masked=0.4)
    assert masked["target"] == {"one": pytest.approx(1.0353, abs=1e-4)}
    assert timing.of_logits(logits[:5], methods, 1)["target"] == {}
    floats = torch.empty(1, 1).expand(256, 151936)
    assert timing.of_logits(floats, methods, 1)["target"] == {}


def test_times_of_losses_stand_beside_what_is_wanted_of_them(timing):
    methods = {"ppo": (takes(0.015625), 0), "ppo eager": (takes(3), 0)}
    found = timing.of_tokens((512, 4096), methods, 3)
    assert found["target"] == {"ppo": 0.016} and found["reached"] == {"ppo": True}
    methods["ppo"] = takes(0.25), 0
    assert timing.of_tokens((512, 4096), methods, 3)["reached"] == {"ppo": False}
    assert timing.of_tokens((512, 4095), methods, 3)["target"] == {}
