"""Nothing waits for a device. In a process of its own: autograd counts the devices once."""

import pathlib
import subprocess
import sys


def test_no_function_waits_for_a_device():
    cases = pathlib.Path(__file__).with_name("waiting_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", str(cases)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
