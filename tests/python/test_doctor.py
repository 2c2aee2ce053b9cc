"""python -m tether doctor."""

import subprocess
import sys

import pytest
import tether
from tether import __main__ as program
from tether import _trainers


def run(*arguments):
    command = [sys.executable, "-m", "tether", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_prints_versions_and_what_is_good():
    out = run("doctor")
    assert out.returncode == 0, out.stderr
    lines = out.stdout.splitlines()
    assert lines[0].startswith(f"tether {tether.__version__} in ")
    assert lines[-1].endswith(": good")
    for trainer, (version,) in _trainers.KNOWN.items():
        assert any(f"tether.{trainer}, for {trainer} {version}: " in line for line in lines)


def test_a_wrong_kernel_is_found(monkeypatch, capsys):
    def off(*arguments, **settings):
        out = tether.reference.policy_loss(*arguments, **settings)
        return (out.loss * (1 + 1e-9),)

    monkeypatch.setattr(program.tether, "policy_loss", off)
    assert program.doctor() == 1
    assert capsys.readouterr().out.endswith(": BAD\n")
    nan = lambda logps, **_: ((logps * float("nan")).sum(),)  # noqa: E731
    monkeypatch.setattr(program.tether, "policy_loss", nan)
    assert program.doctor() == 1


def test_states_of_a_trainer(monkeypatch):
    said = {}
    for version in (None, "1.16.0", "1.17.0"):
        monkeypatch.setattr(program, "version_of", lambda name, version=version: version)
        said[version] = next(line for line in program.report() if line.startswith("tether.trl"))
    start = "tether.trl, for trl 1.16.0: "
    assert said[None] == start + "not installed"
    assert said["1.16.0"] == start + "1.16.0 installed: known"
    assert said["1.17.0"] == start + "1.17.0 installed: not known"


def test_another_version_is_refused(monkeypatch):
    for version, got in ((None, "none"), ("0.10.0", "0.10.0")):
        monkeypatch.setattr(_trainers, "version_of", lambda name, version=version: version)
        with pytest.raises(RuntimeError, match=rf"^tether.verl: verl must be 0.9.1, got {got}$"):
            _trainers.check_version("verl")


def test_without_a_command_the_usage():
    out = run()
    assert out.returncode == 2 and out.stderr.startswith("usage: python -m tether")
