"""tether inside verl 0.9.1, beside verl's own functions in place. Skipped without verl.

In an environment of its own: tests/peers/requirements-verl.txt, pytest and a wheel of tether.
"""

import math
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

verl = pytest.importorskip("verl")

import hydra  # noqa: E402
import tether  # noqa: E402
import tether.verl as adapter  # noqa: E402
from tether import _peer_batch, _verl_losses  # noqa: E402
from tether import _verl_advantages as estimators  # noqa: E402
from verl.trainer.ppo import core_algos  # noqa: E402
from verl.utils import tensordict_utils, torch_functional  # noqa: E402
from verl.utils.config import omega_conf_to_dataclass  # noqa: E402
from verl.workers.utils.losses import ppo_loss  # noqa: E402
from verl_batches import (  # noqa: E402
    MODES,
    OF_LOSS,
    STEP,
    TOLERANCES,
    actor_config,
    grouped_batch,
    outcome,
    policy_batch,
)
from verl_engine import engine_batch, trained  # noqa: E402

torch.set_num_threads(1)  # the tensors are tiny
ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
LOSSES = tuple(_verl_losses.LOSSES)


@tether.Surrogate
def CLIPPED(token, epsilon_low=0.2):
    return -token.ratio.clamp_min(1 - epsilon_low) * token.advantage


@pytest.fixture
def calls(monkeypatch):
    """Names of the objectives that policy_loss was called with."""
    seen = []

    def counted(*args, **settings):
        seen.append(settings["objective"])
        return tether.policy_loss(*args, **settings)

    monkeypatch.setattr(_peer_batch, "policy_loss", counted)
    return seen


@pytest.fixture
def patched():
    adapter.patch(*adapter.PARTS)
    yield
    adapter.unpatch()


def both(name, batch, mode, config):
    """Of tether and of verl."""
    return [outcome(each, batch, mode, config) for each in (f"tether_{name}", name)]


def assert_same(ours, own, rtol, atol):
    for mine, theirs in zip(ours[:2], own[:2], strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol)
    assert ours[2] == pytest.approx(own[2], rel=max(rtol, 1e-7), abs=1e-7)


# ---- the losses ---------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("step", [{}, STEP], ids=["batch", "step"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LOSSES)
def test_value_gradient_and_metrics_equal_verl(name, mode, step, weighted, calls):
    for seed in range(3):
        batch, config = policy_batch(seed, weighted=weighted), actor_config(step)
        own = outcome(name, batch, mode, config)
        assert not calls
        ours = outcome(f"tether_{name}", batch, mode, config)
        assert calls[0] == f"verl.{name}"
        assert_same(ours, own, 1e-12, 1e-14)
        calls.clear()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LOSSES)
def test_in_float32(name, mode):
    batch, config = policy_batch(0, weighted=True, dtype=torch.float32), actor_config(STEP)
    assert_same(*both(name, batch, mode, config), *TOLERANCES[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", LOSSES)
def test_beyond_verls_clamps_too(name, dtype):
    batch, config = policy_batch(0, dtype=dtype), actor_config()
    for row, shift in ((0, 25.0), (1, -25.0), (3, 12.0), (4, 30.0)):
        for sign in (1, -1):
            batch["advantages"] = sign * batch["advantages"].abs()
            shifted = batch | {"old_log_prob": batch["old_log_prob"].clone()}
            shifted["old_log_prob"][row, :2] -= shift
            if name in ("clip_cov", "kl_cov") and dtype == torch.float32:
                continue  # sums of e^25: verl's own rounding
            assert_same(*both(name, shifted, "token-mean", config), *TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", LOSSES)
def test_on_other_devices(name, dtype, monkeypatch):
    """The path of tensors elsewhere, on the CPU."""
    monkeypatch.setattr("tether.policy.has_kernel", lambda tensor, *others: False)
    config = actor_config(STEP)
    for mode in MODES:
        batch = policy_batch(1, weighted=True, dtype=dtype)
        assert_same(*both(name, batch, mode, config), *TOLERANCES[dtype])


def test_integer_masks_and_missing_clips():
    batch = policy_batch(1)
    batch["response_mask"] = batch["response_mask"].long()
    config = actor_config(clip_ratio=0.1, clip_ratio_low=None, clip_ratio_high=None)
    for name in LOSSES:
        assert_same(*both(name, batch, MODES[4], config), *TOLERANCES[torch.float64])


def test_advantages_by_token():
    batch = policy_batch(2)
    batch["advantages"] = torch.randn(6, 9, generator=torch.Generator().manual_seed(3)).double()
    for name in LOSSES:
        if name != "geo_mean":
            pair = both(name, batch, MODES[0], actor_config())
            assert_same(*pair, *TOLERANCES[torch.float64])


def test_masked_slots_and_empty_batches():
    for name in LOSSES:
        batch, config = policy_batch(0, weighted=True), actor_config()
        expected = outcome(f"tether_{name}", batch, "seq-mean-token-mean", config)
        broken = dict(batch)
        for key in ("log_prob", "old_log_prob", "advantages", "rollout_is_weights"):
            broken[key] = batch[key].masked_fill(~batch["response_mask"], math.nan)
        found = outcome(f"tether_{name}", broken, "seq-mean-token-mean", config)
        assert_same(found, expected, 0, 0)
        batch["response_mask"] = torch.zeros_like(batch["response_mask"])
        loss, gradient, metrics = outcome(f"tether_{name}", batch, "token-mean", config)
        assert loss == 0 and not gradient.any() and not any(metrics.values())


def test_every_objective_has_a_name(calls):
    batch, config = policy_batch(0), actor_config(STEP)
    refused = set()
    for name in tether.objectives().keys() - _verl_losses.LOSSES.keys():
        calls.clear()
        try:
            loss, gradient, metrics = outcome(f"tether_{name}", batch, "token-mean", config)
        except ValueError as error:
            assert "rollout_logps" in str(error)
            refused.add(name)
            continue
        assert calls == [name] and loss.isfinite() and gradient.isfinite().all()
        assert (gradient[~batch["response_mask"]] == 0).all()
        assert set(metrics) == {"actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"}
    assert refused == {"decoupled_ppo"}


def test_an_objective_of_the_catalogue_has_verls_clips_and_its_own_options():
    batch, config = policy_batch(0), actor_config()
    arrays = {
        "logps": batch["log_prob"],
        "advantages": batch["advantages"],
        "response_mask": batch["response_mask"],
        "old_logps": batch["old_log_prob"],
        "aggregation": "token_mean",
    }
    clips = {"epsilon_low": 0.15, "epsilon_high": 0.28}
    for name, settings in (("dapo", clips), ("gmpo", {}), ("topr", {}), ("rloo", clips)):
        expected = tether.policy_loss(**arrays, objective=name, **settings).loss
        assert outcome(f"tether_{name}", batch, "token-mean", config)[0] == expected
    weights = {"opsm": {"high": 0.1}}
    topr = tether.objective.Topr(ratio_high=2.0)
    pulled = tether.objective.Dapo(epsilon_high=0.5, beta=0.0)
    for objective, settings, same in (
        ("topr", {"ratio_high": 2.0, "weights": weights}, {"objective": "topr"}),
        (topr, {"weights": weights}, {"objective": "topr", "ratio_high": 2.0}),
        (pulled, {}, {"objective": "dapo", "epsilon_low": 0.15, "epsilon_high": 0.5}),
        (CLIPPED, {"level": "sequence_mean"}, {"objective": CLIPPED, "epsilon_low": 0.15}),
        ("slime.cispo", {}, {"objective": "slime.cispo"}),
    ):
        adapter.register_loss("mine", objective, **settings)
        try:
            expected = tether.policy_loss(**arrays, **settings | same).loss
            assert outcome("mine", batch, "token-mean", config)[0] == expected
        finally:
            del core_algos.POLICY_LOSS_REGISTRY["mine"]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("vanilla", "ppo"), {}, 'name must not be one of verl\'s, got "vanilla"'),
        (("mine", "topr"), {"aggregation": "token_sum"},
         "aggregation must not be given, got it. It is verl's"),
        (("mine", "topr"), {"ratio_high": 0.0}, "ratio_high must be greater than 0, got 0"),
        (("mine", "topr"), {"response_mask": 1},
         "response_mask must not be given, got it. It is verl's"),
    ],
)  # fmt: skip
def test_a_registered_loss_is_checked_at_once(arguments, options, message):
    with pytest.raises(ValueError) as caught:
        adapter.register_loss(*arguments, **options)
    assert str(caught.value) == f"tether.verl.register_loss: {message}"
    assert "mine" not in core_algos.POLICY_LOSS_REGISTRY


def test_unknown_words_of_a_registered_loss_lead_to_known_ones():
    for options, meant in (({"objective": "toprr"}, "topr"), ({"ratio_hig": 2.0}, "ratio_high")):
        with pytest.raises(ValueError, match=rf"Did you mean {meant}\?$"):
            adapter.register_loss("mine", **{"objective": "topr"} | options)


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("name", ["vanilla", "gspo", "sapo"])
def test_infinity_is_clamped_as_in_verl(name, far):
    batch = policy_batch(0)
    batch["old_log_prob"][0, 0] = -math.inf
    if far:
        batch["old_log_prob"][1, 0] -= 30
    config = actor_config()
    assert_same(*both(name, batch, "token-mean", config), *TOLERANCES[torch.float64])


@pytest.mark.parametrize("given", [{"batch_num_tokens": 61.0}, {"global_batch_size": 9.0}])
@pytest.mark.parametrize("mode", MODES)
def test_a_count_that_the_mode_does_not_divide_by_is_not_looked_at(mode, given):
    pair = both("vanilla", policy_batch(0), mode, actor_config(given))
    assert_same(*pair, *TOLERANCES[torch.float64])


def test_what_cannot_be_said_is_refused():
    batch = policy_batch(0)
    by_token = batch | {"advantages": batch["log_prob"]}
    cases = [
        ("geo_mean", by_token, "token-mean", actor_config(),
         "tether.verl: advantages must be the same at every token of an answer for "
         "tether_geo_mean, got others"),
        ("vanilla", batch, "token-mean", actor_config({"dp_size": 2}),
         "tether.verl: batch_num_tokens must be given for token-mean with a dp_size of 2, got "
         "none"),
        ("vanilla", batch, "mean", actor_config(),
         f'tether.verl: loss_agg_mode must be one of {", ".join(MODES)}, got "mean"'),
        ("dro", batch, "token-mean", actor_config(of_loss={}),
         "tether.verl: policy_loss.dro_beta must be positive, got None"),
        ("vanilla", batch, "token-mean", actor_config(clip_ratio_c=1.0),
         "tether.verl: clip_ratio_c must be greater than 1, got 1.0"),
    ]  # fmt: skip
    for name, tensors, mode, config, message in cases:
        with pytest.raises(ValueError) as caught:
            outcome(f"tether_{name}", tensors, mode, config)
        assert str(caught.value) == message


def test_an_unknown_verl_is_refused(monkeypatch):
    monkeypatch.setattr("tether._trainers.version_of", lambda name: "0.10.0")
    message = "^tether.verl: verl must be 0.9.1, got 0.10.0$"
    with pytest.raises(RuntimeError, match=message):
        adapter.patch()
    with pytest.raises(RuntimeError, match=message):
        outcome("tether_vanilla", policy_batch(0), "token-mean", actor_config())


# ---- verl's engine ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    store = f"file://{tmp_path_factory.mktemp('store') / 'file'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


SETTINGS = {"use_kl_loss": True, "entropy_coeff": 0.01, "clip_ratio_c": 3.0}


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("mode", MODES)
def test_the_engines_loss_function(mode, weighted, calls):
    data = engine_batch(weighted)
    for name in ("dp_size", "batch_num_tokens", "global_batch_size"):
        tensordict_utils.assign_non_tensor(data, **{name: STEP[name]})
    tokens = data["input_ids"].offsets()
    found = []
    for name in ("vanilla", "tether_vanilla"):
        config = actor_config(of_loss={"loss_mode": name}, loss_agg_mode=mode, **SETTINGS)
        generator = torch.Generator().manual_seed(1)
        each = [-4.6 + 0.5 * torch.rand(tokens[-1], generator=generator) for _ in range(2)]
        leaves = [x.requires_grad_() for x in each]
        output = dict(zip(("log_probs", "entropy"), leaves, strict=True))
        output = {k: torch.nested.nested_tensor_from_jagged(x, tokens) for k, x in output.items()}
        loss, metrics = ppo_loss(config, output, data)
        gradients = torch.autograd.grad(loss, leaves)
        numbers = {k: getattr(x, "values", [x])[0] for k, x in metrics.items()}
        found.append((loss.detach(), torch.stack(gradients), numbers))
    assert calls == ["verl.vanilla"]
    assert_same(*reversed(found), 2e-6, 1e-7)


@pytest.mark.parametrize("name", [*LOSSES])
def test_ten_steps_of_the_engine(name, process_group, calls, monkeypatch):
    found = []
    for loss_mode in (name, f"tether_{name}"):
        config = actor_config(of_loss={**OF_LOSS, "loss_mode": loss_mode}, **SETTINGS)
        torch.manual_seed(0)
        if loss_mode != name:
            adapter.patch(*adapter.PARTS)
        try:
            found.append(trained(monkeypatch, config, steps=10))
        finally:
            adapter.unpatch()
    assert calls.count(f"verl.{name}") >= 20
    (own, of_own), (ours, of_ours) = found
    for mine, theirs in zip(ours, own, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-5)
    for mine, theirs in zip(of_ours, of_own, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=2e-6, abs=2e-6)
        assert mine["metrics"].keys() == theirs["metrics"].keys()


# ---- patches ------------------------------------------------------------------------------------


def test_patches_reach_every_module_and_are_taken_back():
    from verl.trainer.ppo import ray_trainer
    from verl.workers.engine.fsdp import transformer_impl
    from verl.workers.utils import losses

    own = adapter._OWN["logprobs_from_logits"]
    before = core_algos.kl_penalty
    adapter.patch()
    adapter.patch()
    assert transformer_impl.logprobs_from_logits is adapter._logprobs_from_logits
    assert torch_functional.logprobs_from_logits is adapter._logprobs_from_logits
    assert core_algos.ADV_ESTIMATOR_REGISTRY["gae"] is estimators.gae
    assert core_algos.ADV_ESTIMATOR_REGISTRY["remax"] is estimators.remax
    assert ray_trainer.core_algos.compute_grpo_outcome_advantage is estimators.grpo
    assert losses.kl_penalty is before
    adapter.patch("kl")
    assert losses.kl_penalty is core_algos.kl_penalty is adapter._kl_penalty
    adapter.unpatch("kl")
    assert losses.kl_penalty is before
    assert core_algos.ADV_ESTIMATOR_REGISTRY["gae"] is estimators.gae
    adapter.unpatch()
    adapter.unpatch()
    assert transformer_impl.logprobs_from_logits is torch_functional.logprobs_from_logits is own
    assert core_algos.ADV_ESTIMATOR_REGISTRY["gae"] is core_algos.compute_gae_advantage_return
    assert core_algos.ADV_ESTIMATOR_REGISTRY["remax"] is core_algos.compute_remax_outcome_advantage
    with pytest.raises(ValueError) as caught:
        adapter.patch("adam")
    known = "logps, entropies, gae, grpo, advantages, kl"
    assert str(caught.value) == f'tether.verl: parts must be of {known}, got "adam"'
    with pytest.raises(TypeError) as caught:
        adapter.patch(["logps"])
    assert str(caught.value) == "tether.verl: parts must be a list of strings, got list in it"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_log_probabilities_and_entropies_equal_verl(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(5, 6, 1001, generator=generator, dtype=torch.float64)).to(dtype)
    labels = torch.randint(1001, (5, 6), generator=generator)
    flat = logits.view(30, 1001)
    upstream = torch.randn(5, 6, generator=generator).to(dtype)
    bounds = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-7}
    tolerance = {"rtol": bounds[dtype], "atol": 4 * bounds[dtype]}

    def results(name, logits, *rest, weights=upstream):
        leaf = logits.clone().requires_grad_()
        out = getattr(torch_functional, name)(leaf, *rest)
        return out.detach(), torch.autograd.grad(out, leaf, weights.to(out.dtype))[0]

    cases = [("logprobs_from_logits", logits, labels), ("entropy_from_logits", logits)]
    if dtype != torch.float64:
        cases.append(("entropy_from_logits_with_chunking", flat))
    for name, *arguments in cases:
        weights = upstream.view(-1) if arguments[0] is flat else upstream
        own = results(name, *arguments, weights=weights)
        adapter.patch()
        try:
            ours = results(name, *arguments, weights=weights)
        finally:
            adapter.unpatch()
        for mine, theirs in zip(ours, own, strict=True):
            assert mine.dtype == theirs.dtype
            torch.testing.assert_close(mine, theirs, **tolerance)


def test_labels_that_verl_refuses(patched):
    with pytest.raises(IndexError, match=r"targets must be in \[0, 9\)"):
        torch_functional.logprobs_from_logits(torch.randn(3, 9), torch.tensor([1, -100, 2]))


def test_other_devices_keep_verls_functions(patched, monkeypatch):
    monkeypatch.setattr(adapter, "has_kernel", lambda tensor, *others: False)
    monkeypatch.setattr(adapter, "token_logps", None)
    logits = torch.randn(3, 4, 9)
    labels = torch.zeros(3, 4, dtype=torch.int64)
    own = adapter._OWN
    logps = torch_functional.logprobs_from_logits(logits, labels)
    assert torch.equal(logps, own["logprobs_from_logits"](logits, labels))
    entropies = torch_functional.entropy_from_logits(logits)
    assert torch.equal(entropies, own["entropy_from_logits"](logits))


def test_the_engine_may_compile_the_entropy(patched):
    logits = torch.randn(7, 33)
    compiled = torch.compile(torch_functional.entropy_from_logits, dynamic=True, backend="eager")
    expected = adapter._OWN["entropy_from_logits"](logits)
    torch.testing.assert_close(compiled(logits), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kind", ["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"])
def test_kl_penalty_equals_verl(kind):
    d = torch.tensor([-24.0, -20.5, -3.0, -1e-3, 0.5, 2.25, 2.625, 19.5, 24.0], dtype=torch.float64)
    for name in (kind, f"{kind}+"):
        found = []
        for function in (adapter._kl_penalty, adapter._OWN["kl_penalty"]):
            leaf = (-30 - d).requires_grad_()
            value = function(logprob=leaf, ref_logprob=torch.full_like(d, -30), kl_penalty=name)
            found.append((value.detach(), torch.autograd.grad(value.sum(), leaf)[0]))
        for mine, theirs in zip(*found, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)
    with pytest.raises(NotImplementedError):
        adapter._kl_penalty(d, d, "full")


# ---- the plug-in and the page -------------------------------------------------------------------


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def test_verl_loads_it_by_itself():
    code = """
import verl
import sys
assert "tether.verl" in sys.modules
from verl.trainer.ppo import core_algos
assert callable(core_algos.get_policy_loss_fn("tether_vanilla"))
assert callable(core_algos.get_adv_estimator_fn("tether_rloo"))
"""
    out = run(code)
    assert out.returncode == 0, out.stderr
    assert run(code, VERL_USE_EXTERNAL_PLUGINS="none").returncode != 0


def test_tether_alone_imports_no_verl():
    out = run("import sys, tether; assert not {'verl', 'ray'} & set(sys.modules)")
    assert out.returncode == 0, out.stderr


def test_verl_survives_a_tether_that_does_not_load():
    out = run("import sys; sys.modules['tether'] = None; import verl; print(verl.__version__)")
    assert out.returncode == 0 and out.stdout.strip().endswith("0.9.1"), out.stderr


PAGE = (ROOT / "docs/verl.md").read_text()


def test_the_page_names_what_there_is():
    named = set(re.findall(r"`tether_(\w+)`", PAGE))
    assert named >= set(LOSSES) | {"rloo", "opo", "topr"}
    known = core_algos.POLICY_LOSS_REGISTRY | core_algos.ADV_ESTIMATOR_REGISTRY
    assert {f"tether_{name}" for name in named} <= known.keys()


def test_the_lines_of_the_page_run():
    """Through verl's own configuration, as a command line goes."""
    lines = re.findall(r"^(?:actor_rollout_ref|algorithm)\.\S+$", PAGE, re.MULTILINE)
    assert len(lines) == 2
    folder = str(pathlib.Path(verl.__file__).parent / "trainer/config")
    size = "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1"
    with hydra.initialize_config_dir(folder, version_base=None):
        whole = hydra.compose("ppo_trainer", overrides=[*lines, size])
    config = omega_conf_to_dataclass(whole.actor_rollout_ref.actor)
    loss, *_ = outcome(config.policy_loss.loss_mode, policy_batch(0), "token-mean", config)
    assert config.policy_loss.loss_mode == "tether_vanilla" and math.isfinite(loss)
    estimator = core_algos.get_adv_estimator_fn(whole.algorithm.adv_estimator)
    assert estimator(**grouped_batch(torch.float32), config=whole.algorithm)[0].isfinite().all()


def test_the_module_of_the_page_runs(tmp_path):
    (code,) = re.findall(r"^(# my_setup.py\n.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    (tmp_path / "my_setup.py").write_text(code)
    check = """
import verl
from verl.trainer.ppo import core_algos
from verl.workers.engine.fsdp import transformer_impl
assert callable(core_algos.get_policy_loss_fn("my_topr"))
assert transformer_impl.logprobs_from_logits.__module__ == "tether.verl"
"""
    out = run(check, VERL_USE_EXTERNAL_MODULES="my_setup", PYTHONPATH=str(tmp_path))
    assert out.returncode == 0, out.stderr
