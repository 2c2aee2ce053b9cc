"""tether.prime_rl against prime-rl's losses and metrics, as recorded by
tests/peers/record_prime_rl.py.

prime-rl is a stand-in here, which has the two classes that a loss takes and gives.
"""

import importlib
import math
import sys
import types
from typing import NamedTuple

import pytest
import tether
import torch
from recordings import blocks_of_page, named, recording, tensor
from tether import _trainers

RECORDING = recording("prime_rl_loss")
CASES = RECORDING["cases"]


class LossInputs(NamedTuple):
    trainer_logprobs: torch.Tensor
    inference_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor | None
    advantages: torch.Tensor
    loss_mask: torch.Tensor
    loss_weights: torch.Tensor | None = None


class LossOutputs(NamedTuple):
    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def adapter():
    names = ["prime_rl", "prime_rl.trainer", "prime_rl.trainer.rl", "prime_rl.trainer.rl.loss"]
    modules = {name: types.ModuleType(name) for name in names}
    modules[names[-1]].LossInputs, modules[names[-1]].LossOutputs = LossInputs, LossOutputs
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        patch.setattr(_trainers, "version_of", lambda _: "0.8.0")
        yield importlib.import_module("tether.prime_rl")
        del sys.modules["tether.prime_rl"]


def inputs_of(case, dtype=torch.float64, holes=None):
    """Masked slots hold `holes`."""
    arrays = {name: None if row is None else torch.tensor(row) if name == "loss_mask"
              else tensor(row).to(dtype) for name, row in case["inputs"].items()}  # fmt: skip
    if holes is not None:
        for name, row in arrays.items():
            if row is not None and name != "loss_mask":
                arrays[name] = torch.where(arrays["loss_mask"], row, holes)
    arrays["trainer_logprobs"].requires_grad_()
    return LossInputs(**arrays)


def run(function, inputs, **options):
    out = function(inputs, **options)
    assert out.loss.dim() == 0 and all(each.dim() == 0 for each in out.metrics.values())
    assert not any(each.requires_grad for each in out.metrics.values())
    (gradient,) = torch.autograd.grad(out.loss, inputs.trainer_logprobs)
    return out.loss, gradient, {name: each.item() for name, each in out.metrics.items()}


def assert_same(case, loss, gradient, metrics, rtol=1e-12, atol=1e-14):
    assert loss.item() == pytest.approx(case["loss"], rel=rtol, abs=10 * atol)
    torch.testing.assert_close(
        gradient, tensor(case["dlogps"]), rtol=rtol, atol=atol, check_dtype=False
    )
    assert metrics == pytest.approx(case["metrics"], rel=max(rtol, 1e-7), abs=max(atol, 1e-12))


def own(adapter, case, **how):
    function = getattr(adapter, f"{case['loss_type']}_loss")
    return run(function, inputs_of(case, **how), **case["options"])


@named(CASES)
def test_losses_equal_prime_rl(adapter, case):
    assert_same(case, *own(adapter, case))
    expected = own(adapter, case)
    for holes in (math.nan, math.inf):
        found = own(adapter, case, holes=holes)
        torch.testing.assert_close(found[:2], expected[:2], rtol=0, atol=0)
        assert found[2] == expected[2]


def test_on_other_devices(adapter, monkeypatch):
    """The path of tensors elsewhere, on the CPU."""
    monkeypatch.setattr("tether.policy.has_kernel", lambda *_: False)
    for case in CASES:
        assert_same(case, *own(adapter, case))


def test_in_float32(adapter):
    for case in CASES:
        assert_same(case, *own(adapter, case, dtype=torch.float32), rtol=1e-5, atol=2e-6)


def test_defaults_are_prime_rls(adapter):
    for name in ("default", "ipo"):
        case = next(each for each in CASES if each["name"] == name)
        assert_same(case, *run(getattr(adapter, f"{name}_loss"), inputs_of(case)))


def test_metrics_have_one_type_for_sequences_with_and_without_tokens(adapter):
    """prime-rl stacks them."""
    for name in ("default", "ipo"):
        function = getattr(adapter, f"{name}_loss")
        outs = [function(inputs_of(each)) for each in CASES if each["loss_type"] == name]
        for key in outs[0].metrics:
            found = [out.metrics[key] for out in outs]
            assert len({(each.dtype, each.shape) for each in found}) == 1, key


def test_the_configs_of_the_page_run(adapter):
    tomllib = pytest.importorskip("tomllib")
    blocks = [tomllib.loads(each)["trainer"]["loss"] for each in blocks_of_page("prime_rl")]
    assert [each["type"] for each in blocks] == ["custom"] * 2
    for loss in blocks:
        module, _, name = loss["import_path"].rpartition(".")
        function = getattr(sys.modules[module], name)
        value, gradient, _ = run(function, inputs_of(CASES[3]), **loss["kwargs"])
        assert value.isfinite() and gradient.isfinite().all()


def test_any_objective(adapter):
    case = CASES[3]
    for objective, options in (
        ("ppo", {"epsilon_high": 0.28}),
        ("gspo", {"epsilon_low": 0.05, "epsilon_high": 0.1}),
        ("topr", {"weights": {"opsm": {"high": 0.1}}}),
        ("linear", {"beta": 0.1, "kl_estimator": "k2", "kl_gradient": "k2", "kl_reference": "old"}),
        ("decoupled_ppo", {}),
        ("ppo", {"beta": 0.1}),
    ):
        inputs = inputs_of(case)
        if options == {"beta": 0.1}:
            inputs = inputs._replace(ref_logprobs=inputs.inference_logprobs - 0.1)
        loss, gradient, metrics = run(adapter.policy_loss, inputs, objective=objective, **options)
        arrays = {
            name: None if row is None else row[None] for name, row in inputs._asdict().items()
        }
        out = tether.policy_loss(
            arrays["trainer_logprobs"],
            arrays["advantages"],
            arrays["loss_mask"],
            objective=objective,
            old_logps=arrays["inference_logprobs"],
            rollout_logps=arrays["inference_logprobs"],
            ref_logps=arrays["ref_logprobs"],
            token_weights=arrays["loss_weights"],
            kl_weights=arrays["loss_weights"],
            aggregation="token_sum",
            **options,
        )
        expected = torch.autograd.grad(out.loss, inputs.trainer_logprobs)[0]
        torch.testing.assert_close((loss, gradient), (out.loss, expected), rtol=0, atol=0)
        values = out.metrics.to_dict()
        assert metrics == {name: values[name] for name in adapter._METRICS}


def test_what_is_not_prime_rls_is_refused(adapter, monkeypatch):
    inputs = inputs_of(CASES[0])
    for name in ("aggregation", "constant", "normalizer"):
        with pytest.raises(ValueError) as caught:
            adapter.policy_loss(inputs, objective="ppo", **{name: 1})
        assert str(caught.value) == (
            f"tether.prime_rl.policy_loss: {name} must not be given, got it. It is prime-rl's"
        )
    monkeypatch.setattr(_trainers, "version_of", lambda _: "0.9.0")
    for function, options in (
        (adapter.default_loss, {}),
        (adapter.ipo_loss, {}),
        (adapter.policy_loss, {"objective": "ppo"}),
    ):
        with pytest.raises(RuntimeError) as caught:
            function(inputs, **options)
        assert str(caught.value) == "tether.prime_rl: prime_rl must be 0.8.0, got 0.9.0"


def test_the_recording_is_of_the_source_that_the_dialects_are_of():
    assert RECORDING["prime_rl"] == recording("prime_rl_policy")["prime_rl"]
