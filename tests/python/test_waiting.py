"""Nothing waits for a device. In a process of its own: autograd counts the devices once."""

import pathlib
import subprocess
import sys

import pytest


@pytest.mark.parametrize("file", ["waiting_cases.py", "cuda_waiting_cases.py"])
def test_no_function_waits_for_a_device(file):
    cases = pathlib.Path(__file__).with_name(file)
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", str(cases)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
