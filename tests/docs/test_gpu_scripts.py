"""The scripts of ./dev gpu, without a GPU: what they ask of the kernels is what these take."""

import json
import pathlib
import subprocess
import sys

import pytest

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
