"""python -m tether.bench: every method computes the same, and what is printed and written."""

import json
import sys

import pytest
import torch
from tether.bench import __main__ as program
from tether.bench import tables
from tether.bench.clock import KINDS, calls

SHAPES = {
    "policy": (4, 9),
    "preference": (4, 9),
    "logits": (5, 40),
    "kl": (5, 40),
    "linear": (8, 6, 40),
}
# Of others' code, of other results, or compiled for minutes.
LEFT_OUT = ("torch.compile", "products", "liger", "DAPO", "kept", "trl", "verl")


@pytest.mark.parametrize("kind", KINDS)
def test_methods_agree(kind):
    inputs = KINDS[kind].inputs(SHAPES[kind], torch.float32)
    names = [name for name in KINDS[kind].methods if not any(part in name for part in LEFT_OUT)]
    assert {"eager", "tether"} <= set(names)
    found = calls(kind, inputs, names)
    for (name, both), function in found.items():
        for mine, theirs in zip(outputs(function()), outputs(found["eager", both]()), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-6, msg=name)


def outputs(out):
    return [out] if isinstance(out, torch.Tensor) else list(out)


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["tether.bench", *words])
    before = torch.get_num_threads()
    try:
        program.main()
    finally:
        torch.set_num_threads(before)


def test_tables_json_and_picture(monkeypatch, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    json_file, picture = tmp_path / "new/out.json", tmp_path / "out.png"
    words = ["--policy", "8x16", "--kl", "4x40", "--methods", "eager", "tether", "--no-peak"]
    words += ["--repetitions", "1", "--seconds", "0.001", "--threads", "1"]
    run(monkeypatch, *words, "--json", str(json_file), "--picture", str(picture))
    printed = capsys.readouterr().out.splitlines()
    assert "policy 8x16 float32, 1 thread(s)" in printed
    assert sum(line.startswith("  tether ") for line in printed) == 2
    assert "policy 8x16 float32, forward: " in printed[-1] and "at most 25" in printed[-1]
    written = json.loads(json_file.read_text())
    assert [each["kind"] for each in written["results"]] == ["policy", "kl"]
    rows = written["results"][0]["rows"]
    assert [(row["method"], row["both"]) for row in rows] == [
        ("eager", False),
        ("eager", True),
        ("tether", False),
        ("tether", True),
    ]
    assert all(row["ms"] > 0 and row["peak_mb"] is None for row in rows)
    assert written["results"][1]["machine_gb_per_s"].keys() == {"read", "copy", "in place"}
    assert picture.stat().st_size > 1000


def test_a_peer_that_is_absent_is_left_out_with_a_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "verl", None)
    inputs = KINDS["policy"].inputs((2, 4), torch.float32)
    assert not calls("policy", inputs, ["verl"])
    assert capsys.readouterr().err.startswith("left out: verl: ")


def test_without_matplotlib_there_is_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match=r"^tether.bench: matplotlib must be installed for --pict"):
        tables.picture([], tmp_path / "out.png")


def result(kind, shape, **times):
    rows = [
        {"method": name, "both": both, "ms": value, "peak_mb": None}
        for name, values in times.items()
        for both, value in zip((False, True), values, strict=True)
    ]
    settings = {"dtype": "float32", "threads": 1, "machine_gb_per_s": {}}
    return {"kind": kind, "shape": shape, "rows": rows, **settings}


def test_targets_are_of_the_pass_that_they_name():
    logits = result("logits", "512x151936", tether=(1.0, 2.0), eager=(99.0, 17.0))
    policy = result("policy", "8x16", tether=(0.02, 0.08), eager=(0.01, 0.06))
    assert list(tables.targets([logits, policy])) == [
        "missed   logits 512x151936 float32, both passes: eager over tether 8.50, at least 9",
        "reached  policy 8x16 float32, forward: 20.0 us a call, at most 25",
    ]
    lines = list(tables.table(policy))
    assert lines[-1].split() == ["eager", "0.01", "0.50", "0.06", "0.75"]


def test_kinds_that_are_named_are_the_only_ones(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tether.bench", "--kl", "2x3"])
    assert program.shapes_of(program.parsed()) == {"kl": ["2x3"]}
    monkeypatch.setattr(sys, "argv", ["tether.bench", "--full"])
    assert program.shapes_of(program.parsed()) == program.FULL
    assert program.FULL.keys() == program.SHAPES.keys() == KINDS.keys()
