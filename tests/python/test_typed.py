"""tether.objective and tether.weight: objectives and weights as typed values."""

import dataclasses
import importlib.util
import math
import os
import pathlib
import pickle
import subprocess
import sys
import typing

import pytest
import tether
import torch
from batches import assert_same_bits, evaluated, padded_batch
from tether import objective, weight

ROOT = pathlib.Path(__file__).parent.parent.parent
FAMILIES = ("policy", "preference", "value")
DAPO = ", ".join(each.name for each in dataclasses.fields(objective.Dapo))
BASES = (objective.PolicyObjective, objective.PreferenceObjective, objective.ValueObjective)
CLASSES = {
    each.name: each
    for each in (getattr(objective, name) for name in dir(objective))
    if dataclasses.is_dataclass(each) and each not in BASES
}
WEIGHTS = {
    each.name: each
    for each in (getattr(weight, name) for name in dir(weight))
    if dataclasses.is_dataclass(each) and each is not weight.TokenWeight
}


def row_of(name):
    dialect = tether.dialects().get(name)
    rows = {k: each for family in FAMILIES for k, each in tether.objectives(family).items()}
    return rows[dialect.objective if dialect else name], dialect


# ---- from the catalogue --------------------------------------------------------------------------


def test_every_row_has_a_class():
    rows = {name for family in FAMILIES for name in tether.objectives(family)}
    assert set(CLASSES) == rows | set(tether.dialects())
    assert set(WEIGHTS) == set(tether.weights())
    assert objective.VerlGeoMean.name == "verl.geo_mean"
    assert weight.TruncatedImportance.name == "truncated_importance"


@pytest.mark.parametrize("name", CLASSES)
def test_fields_are_the_options_with_their_defaults(name):
    row, dialect = row_of(name)
    made = CLASSES[name]()
    expected = {k: each.default for k, each in row.options.items() if "." not in k}
    for k, each in row.choices.items():
        expected[k] = each.default == "true" if each.legal == ("false", "true") else each.default
    assert dataclasses.asdict(made) == expected | (dialect.options if dialect else {})
    assert isinstance(made, BASES[FAMILIES.index(row.family)])
    assert made.settings() == {} and row.paper in CLASSES[row.name].__doc__
    hints = typing.get_type_hints(CLASSES[name])
    for k in expected:
        if k in row.choices and not isinstance(expected[k], bool):
            assert typing.get_args(hints[k]) == row.choices[k].legal
        else:
            assert hints[k] == (bool if k in row.choices else float | torch.Tensor)


@pytest.mark.parametrize("name", [*tether.objectives(), *tether.dialects()])
def test_is_the_objective_of_that_name(name):
    batch = padded_batch()
    assert_same_bits(evaluated(batch, objective=CLASSES[name]()), evaluated(batch, objective=name))


def stubs():
    spec = importlib.util.spec_from_file_location("typed_stubs", ROOT / "tools/typed_stubs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["objective", "weight"])
def test_what_type_checkers_read_is_of_this_catalogue(name):
    """./dev catalogue --write writes it."""
    assert (ROOT / f"python/tether/{name}.pyi").read_text() == stubs().stub(name)


# ---- in a call -----------------------------------------------------------------------------------


def test_settings_are_those_of_the_call_and_its_keywords_win():
    batch = padded_batch()
    named = {"epsilon_high": 0.05, "level": "turn_mean", "beta": 0.3, "kl_gradient": "k2"}
    expected = evaluated(batch, objective="dapo", **named)
    made = objective.Dapo(**named)
    assert_same_bits(evaluated(batch, objective=made), expected)
    other = objective.Dapo(epsilon_high=0.7, level="token", beta=0.1)
    assert_same_bits(evaluated(batch, objective=other, **named), expected)
    over_a_dialect = objective.VerlCispo(ratio_high=1.1, kl_gradient="k1")
    expected = evaluated(batch, objective="verl.cispo", ratio_high=1.1, kl_gradient="k1")
    assert_same_bits(evaluated(batch, objective=over_a_dialect), expected)
    in_a_tensor = objective.Dapo(**named | {"beta": torch.tensor(0.3, dtype=torch.float64)})
    assert_same_bits(evaluated(batch, objective=in_a_tensor), evaluated(batch, objective=made))


def test_every_loss_takes_them(monkeypatch):
    batch = padded_batch(poison=-1.0)
    tight = objective.Ppo(epsilon_high=0.01, level="sequence_mean", beta=0.2)
    named = {"objective": "ppo", "epsilon_high": 0.01, "level": "sequence_mean", "beta": 0.2}
    gate = {"weights": {"ratio_gate": {"high": 1.1}}}
    typed_gate = {"weights": weight.RatioGate(high=1.1)}
    a = tether.policy_token_losses(**batch, objective=tight, **typed_gate)
    assert torch.equal(a, tether.policy_token_losses(**batch, **named, **gate))
    a = tether.local_counts(**batch, objective=tight, **typed_gate)
    assert a == tether.local_counts(**batch, **named, **gate)
    hidden, head = torch.rand(5, 9, 3).double(), torch.rand(7, 3).double()
    linear = {**batch, "targets": torch.zeros(5, 9, dtype=torch.int64)}
    del linear["logps"]
    for level in ("sequence_mean", "token"):
        of_level = {"level": level}
        a = tether.linear_policy_loss(
            hidden, head, **linear, **typed_gate, objective=tight, **of_level
        )
        b = tether.linear_policy_loss(hidden, head, **linear, **gate, **named | of_level)
        assert torch.equal(a.loss, b.loss)

    x, mask = torch.rand(4, 3).double(), torch.ones(4, 3)
    ipo = objective.Ipo(beta=0.3, link="js", reference=False)
    named = {"objective": "ipo", "beta": 0.3, "link": "js", "reference": False}
    pairs = tether.preference_loss(x, None, mask, **named).loss
    assert tether.preference_loss(x, None, mask, objective=ipo).loss == pairs
    of_head = (torch.rand(4, 3, 2).double(), torch.rand(5, 2).double())
    targets = torch.zeros(4, 3, dtype=torch.int64)
    pairs = tether.linear_preference_loss(*of_head, targets, None, mask, **named).loss
    a = tether.linear_preference_loss(*of_head, targets, None, mask, objective=ipo)
    assert a.loss == pairs
    huber = tether.value_loss(x, 2 * x + 1, mask, objective="huber", delta=0.1).loss
    assert tether.value_loss(x, 2 * x + 1, mask, objective=objective.Huber(delta=0.1)).loss == huber
    monkeypatch.setattr("tether.value.has_kernel", lambda tensor, *others: False)
    a = tether.value_loss(x, 2 * x + 1, mask, objective=objective.Huber(delta=0.1)).loss
    torch.testing.assert_close(a, huber)


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_those_of_that_name(name):
    batch = padded_batch()
    batch["entropies"] = torch.where(batch["response_mask"], -batch["logps"], math.nan)
    expected = evaluated(batch, weights={name: {}})
    assert_same_bits(evaluated(batch, weights=WEIGHTS[name]()), expected)
    row = tether.weights()[name]
    settings = {k: each.default for k, each in row.options.items()} | {"level": row.level}
    assert dataclasses.asdict(WEIGHTS[name]()) == settings


def test_several_weights_in_a_list():
    batch = padded_batch()
    truncated = {"high": 1.2, "level": "sequence_sum"}
    named = {"truncated_importance": truncated, "tv_mask": {"low": 0.01}}
    typed = [weight.TruncatedImportance(**truncated), weight.TvMask(low=0.01)]
    for name in ("ppo", "dppo_tv", "prime_rl.default"):
        expected = evaluated(batch, objective=name, weights=named)
        assert_same_bits(evaluated(batch, objective=name, weights=typed), expected)
    assert_same_bits(evaluated(batch, weights=[]), evaluated(batch))


# ---- values --------------------------------------------------------------------------------------


def test_are_values():
    dapo = objective.Dapo(epsilon_high=0.3, level="turn_mean")
    assert repr(dapo) == "Dapo(level='turn_mean', epsilon_high=0.3)"
    assert dataclasses.replace(dapo, level="token") == objective.Dapo(epsilon_high=0.3)
    assert pickle.loads(pickle.dumps(dapo)) == dapo and hash(dapo) == hash(dapo)
    with pytest.raises(dataclasses.FrozenInstanceError):
        dapo.epsilon_high = 0.1


def test_in_a_compiled_function():
    batch, dapo = padded_batch(), objective.Dapo(epsilon_high=0.05)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(logps):
        weights = weight.TruncatedImportance(high=1.1)
        return tether.policy_loss(**batch | {"logps": logps}, objective=dapo, weights=weights).loss

    named = {"truncated_importance": {"high": 1.1}}
    expected = evaluated(batch, objective="dapo", epsilon_high=0.05, weights=named)
    assert compiled(batch["logps"]) == expected.loss


@pytest.mark.parametrize(
    "error, sentence, make",
    [
        (ValueError, "Dapo: epsilon_high must be at least 0, got -1",
         lambda: objective.Dapo(epsilon_high=-1)),
        (TypeError, "Dapo: level must be a string, got int", lambda: objective.Dapo(level=3)),
        (TypeError, f"Dapo: option must be one of {DAPO}, got \"epsilon_hgh\". Did you mean "
         "epsilon_high?", lambda: objective.Dapo(epsilon_hgh=0.3)),
        (TypeError, "K3Gate: option must be one of level, high, got \"hig\". Did you mean high?",
         lambda: weight.K3Gate(hig=0.3)),
        (ValueError, "TvMask: level must be one of token, sequence_mean, sequence_sum, "
         "sequence_min, sequence_max, turn_mean, turn_sum, turn_min, turn_max, got \"tokens\". Did "
         "you mean token?", lambda: weight.TvMask(level="tokens")),
        (AttributeError, "module 'tether.objective' has no attribute 'Dappo'",
         lambda: objective.Dappo),
        (AttributeError, "module 'tether.weight' has no attribute 'Nothing'",
         lambda: weight.Nothing),
    ],
)  # fmt: skip
def test_errors_when_they_are_made(error, sentence, make):
    with pytest.raises(error) as caught:
        make()
    assert str(caught.value) == sentence


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    "error, sentence, call",
    [
        (ValueError, 'value_loss: objective must be one of clipped_squared, huber, got "dapo"',
         lambda: tether.value_loss(X, X, X, objective=objective.Dapo())),
        (ValueError, "policy_loss: weights must be different ones, got tv_mask twice",
         lambda: tether.policy_loss(X, X, X, weights=[weight.TvMask(), weight.TvMask(low=0)])),
        (TypeError, "linear_policy_loss: weights must be a list of those of tether.weight, or a "
         "dict, got str in it", lambda: tether.linear_policy_loss(X, X, X, X, X, weights=["x"])),
        (TypeError, "policy_loss: weights must be a list of those of tether.weight, or a dict, got "
         "str", lambda: tether.policy_loss(X, X, X, weights="tv_mask")),
    ],
)  # fmt: skip
def test_errors_of_losses(error, sentence, call):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == sentence


# ---- type checkers -------------------------------------------------------------------------------

TORCH = """
from typing import Any
class Tensor:
    def __getattr__(self, name: str) -> Any: ...
    def __neg__(self) -> Tensor: ...
    def __mul__(self, other: Tensor) -> Tensor: ...
def __getattr__(name: str) -> Any: ...
"""
HEAD = """
import tether
import torch
from tether import objective, weight
x: torch.Tensor = torch.zeros(2, 3)
"""
RIGHT = """
dapo = objective.Dapo(epsilon_high=0.3, level="turn_mean", beta=x)
truncated = weight.TruncatedImportance(high=2, level="sequence_sum")
loss, metrics = tether.policy_loss(x, x, x, objective=dapo, weights=truncated)
tether.local_counts(x, x, x, objective=objective.VerlGspo(aggregation="token_sum"))
tether.preference_loss(x, x, objective=objective.Ipo(link="js", reference=False))
tether.value_loss(x, x, x, objective=objective.Huber(delta=2))
@tether.Surrogate
def linear(token: tether.Token, scale: float = 1.0) -> torch.Tensor:
    return -token.ratio * token.advantage
tether.policy_token_losses(x, x, x, objective=linear, scale=2.0, weights=[truncated])
tether.linear_policy_loss(x, x, x, x, x, objective="dapo", weights={"tv_mask": {"low": 0.1}})
level: objective.Level = "sequence_sum"
"""
WRONG = """
objective.Dapo(epsilon_hihg=0.3)
objective.Dapo(level="turns")
objective.Dapo(beta="0.1")
objective.Dappo()
tether.preference_loss(x, x, objective=objective.Dapo())
weight.TruncatedImportance(level="sequence_token")
objective.Dapo().epsilon_high = 0.3
tether.policy_loss(x, x, x, objective=lambda token: token.ratio)
"""


def test_mypy_takes_what_is_right_and_refuses_typos(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "torch").mkdir()  # torch itself takes mypy half a minute
    (tmp_path / "torch/__init__.pyi").write_text(TORCH)
    (tmp_path / "right.py").write_text(HEAD + RIGHT)
    (tmp_path / "wrong.py").write_text(HEAD + WRONG)
    options = ["--strict", "--no-site-packages", "--ignore-missing-imports"]
    out = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "--follow-imports=silent", "right.py", "wrong.py"],
        cwd=tmp_path,
        env=os.environ | {"MYPYPATH": os.pathsep.join([".", str(ROOT / "python")])},
        capture_output=True,
        text=True,
    )
    errors = [line for line in out.stdout.splitlines() if ": error: " in line]
    first = HEAD.count("\n") + 2
    places = [line.split(": error: ")[0] for line in errors]
    assert places == [f"wrong.py:{first + i}" for i in range(WRONG.count("\n") - 1)], out.stdout
    assert 'Unexpected keyword argument "epsilon_hihg" for "Dapo"' in errors[0]


def test_pickled_settings_are_those_that_were_given():
    for value in (tether.objective.Dapo(epsilon_high=0.3), tether.weight.RingMask()):
        again = pickle.loads(pickle.dumps(value))
        assert (again, again.settings()) == (value, value.settings())


@pytest.mark.parametrize("name", ["sppo", "a2po"])
def test_the_scale_of_logits_is_none_of_an_objective(name):
    kind = CLASSES[name]
    generator = torch.Generator().manual_seed(2)
    hidden, head = torch.randn(2, 3, 4, generator=generator), torch.randn(8, 4, generator=generator)
    targets, mask = torch.tensor([[1, 0, 7], [3, 2, 2]]), torch.ones(2, 3)
    batch = (torch.tensor([1.0, -0.5]), mask)
    of_head = {"hidden": hidden, "weight": head, "targets": targets, "scale": 0.5}
    logps = tether.linear_token_logps(**of_head).logps
    given = {"old_logps": logps + 0.1, "objective": kind(scale=0.3)}
    got = tether.linear_policy_loss(hidden, head, targets, *batch, scale=0.5, **given).loss
    torch.testing.assert_close(got, tether.policy_loss(logps, *batch, **given).loss)

    with pytest.raises(ValueError) as caught:
        tether.linear_policy_loss(hidden, head, targets, *batch, objective=name, scale=0.5)
    assert str(caught.value) == (
        "linear_policy_loss: scale must be 1 beside the name of an objective with such an option, "
        f'got 0.5 of "{name}". Pass tether.objective.{kind.__name__}(scale=...)'
    )
