"""The examples on ranks: two processes on this machine."""

import pathlib
import re
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent.parent / "examples"
COMPARED = {
    "ddp_grpo": ["gradients", "parameters", "metrics"],
    "parallel_grpo": [
        "FSDP",
        "vocabulary in shards",
        "the same from hidden states",
        "pieces of rows, ratios of tokens",
        "pieces of rows, ratios of sequences",
    ],
}


@pytest.mark.parametrize("name", COMPARED)
def test_two_ranks_are_one_process(name):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    out = subprocess.run(
        [*command, EXAMPLES / f"{name}.py"], capture_output=True, text=True, timeout=300
    )
    assert out.returncode == 0, out.stdout + out.stderr
    # Gloo may say something too.
    lines = re.findall(r"^(.+): (\d\.\de[+-]\d+)$", out.stdout, re.MULTILINE)
    assert [what for what, _ in lines] == COMPARED[name]
    assert all(float(gap) < 1e-12 for _, gap in lines)
