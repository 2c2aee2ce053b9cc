"""tether.nemo_rl against NeMo-RL's losses and metrics, as recorded by
tests/peers/record_nemo_rl.py.

NeMo-RL is a stand-in here, of classes that have its settings and no loss.
"""

import enum
import importlib
import itertools
import math
import sys
import types

import pytest
import tether
import torch
from recordings import blocks_of_page, named, recording, tensor
from tether import _trainers

LOSS, DPO = (recording(f"nemo_rl_{name}") for name in ("loss", "dpo"))
COMMIT = recording("nemo_rl_policy")["nemo_rl"]


class LossType(enum.Enum):
    TOKEN_LEVEL = "token_level"
    SEQUENCE_LEVEL = "sequence_level"


class Config(dict):
    """Settings, and what else NeMo-RL's config is given."""


class StandIn:
    def __init__(self, settings):
        vars(self).update(settings)
        if "loss_type" in settings:
            self.loss_type = LossType(settings["loss_type"])


@pytest.fixture(scope="module")
def adapter():
    names = ["nemo_rl", "nemo_rl.algorithms", "nemo_rl.algorithms.loss"]
    names.append("nemo_rl.algorithms.loss.loss_functions")
    modules = {name: types.ModuleType(name) for name in names}
    for before, after in itertools.pairwise(names):
        setattr(modules[before], after.rpartition(".")[2], modules[after])
    modules[names[-1]].LossType = LossType
    for name in ("ClippedPGLossFn", "DPOLossFn"):
        for module in names[-2:]:
            setattr(modules[module], name, type(name, (StandIn,), {}))
        setattr(modules[names[-2]], name, getattr(modules[names[-1]], name))
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        patch.setattr(_trainers, "version_of", lambda _: "0.6.0+7ea279abf")
        yield importlib.import_module("tether.nemo_rl")
        del sys.modules["tether.nemo_rl"]


def run(loss, case, *, holes=0.0, dtype=torch.float64):
    """Loss, gradient and metrics; masked slots hold `holes`."""
    data = {name: tensor(each).to(dtype) for name, each in case["data"].items()}
    masks = {name: data[name].float() for name in ("token_mask", "sample_mask")}
    leaf = tensor(case["logps"]).to(dtype)
    if holes:
        taken = masks["token_mask"] * masks["sample_mask"][:, None] > 0
        for name, each in data.items():
            if name in masks or name == "rewards":
                continue
            kept = taken[:, 1:] if name == "filtered_by" else taken
            if each.dim() == 2 and name != "reference_policy_logprobs":
                data[name] = torch.where(kept, each, holes)
        leaf = torch.where(taken[:, 1:], leaf, holes)
    leaf.requires_grad_()
    given = data | masks
    if "filtered_by" in data:
        given["curr_logprobs_unfiltered"] = leaf - data["filtered_by"]
    step = {name: torch.tensor(each) for name, each in case["step"].items()}
    value, metrics = loss(leaf, given, **step)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value, gradient, metrics


def assert_same(case, value, gradient, metrics, rtol=1e-12, atol=1e-14):
    assert value.item() == pytest.approx(case["loss"], rel=rtol, abs=10 * atol)
    torch.testing.assert_close(
        gradient, tensor(case["dlogps"]), rtol=rtol, atol=atol, check_dtype=False
    )
    expected = dict(case["metrics"])
    if case["settings"].get("sequence_level_importance_ratios"):
        del expected["sampling_importance_ratio"], metrics["sampling_importance_ratio"]
    assert metrics == pytest.approx(expected, rel=max(rtol, 1e-6), abs=1e-7)


@named(LOSS["cases"])
def test_policy_losses_equal_nemo_rl(adapter, case):
    assert_same(case, *run(adapter.ClippedPGLossFn(case["settings"]), case))


@named(DPO["cases"])
def test_preference_losses_equal_nemo_rl(adapter, case):
    assert_same(case, *run(adapter.DPOLossFn(case["settings"]), case))


@named(LOSS["cases"])
def test_masked_slots_may_hold_anything(adapter, case):
    loss = adapter.ClippedPGLossFn(case["settings"])
    expected = run(loss, case)
    for holes in (math.nan, math.inf):
        value, gradient, metrics = run(loss, case, holes=holes)
        torch.testing.assert_close(value, expected[0], rtol=0, atol=0)
        torch.testing.assert_close(gradient, expected[1], rtol=0, atol=0)
        assert metrics == expected[2]


def test_on_other_devices(adapter, monkeypatch):
    """The path of tensors elsewhere, on the CPU."""
    for module in ("policy", "preference"):
        monkeypatch.setattr(f"tether.{module}.has_kernel", lambda *_: False)
    for cases, name in ((LOSS["cases"], "ClippedPGLossFn"), (DPO["cases"], "DPOLossFn")):
        for case in cases:
            assert_same(case, *run(getattr(adapter, name)(case["settings"]), case))


def test_in_float32(adapter):
    for case in LOSS["cases"]:
        out = run(adapter.ClippedPGLossFn(case["settings"]), case, dtype=torch.float32)
        assert_same(case, *out, rtol=1e-5, atol=1e-6)


def test_the_mean_weight_of_answers_is_not_their_sum(adapter):
    """NeMo-RL's is multiplied by the samples that are taken, and adds those that are not."""
    cases = [c for c in LOSS["cases"] if c["settings"]["sequence_level_importance_ratios"]]
    for case in cases:
        data = {name: tensor(each) for name, each in case["data"].items()}
        loss = adapter.ClippedPGLossFn(case["settings"])
        metrics = run(loss, case)[2]
        arrays = adapter._Arrays(loss, tensor(case["logps"]), data)
        weights, _ = loss._importance(arrays)
        samples, step = data["sample_mask"], case["step"]["global_valid_seqs"]
        theirs = weights.sum() * samples.sum() / step
        ours = (weights[:, 0] * samples).sum() / step
        assert case["metrics"]["sampling_importance_ratio"] == pytest.approx(theirs.item())
        assert metrics["sampling_importance_ratio"] == pytest.approx(ours.item())
    assert len(cases) >= 4


def test_micro_batches_add_up(adapter):
    """As the wrapper of packed sequences calls it: one at a time, one of them without a token."""
    for case in LOSS["cases"][:5]:
        loss = adapter.ClippedPGLossFn(case["settings"])
        data = {name: tensor(each) for name, each in case["data"].items()}
        data.pop("filtered_by", None)
        leaf = tensor(case["logps"]).requires_grad_()
        step = {name: torch.tensor(each) for name, each in case["step"].items()}
        whole, _ = loss(leaf, data, **step)
        parts = []
        for row in range(len(leaf)):
            of_row = {name: each[row : row + 1] for name, each in data.items()}
            value, metrics = loss(leaf[row : row + 1], of_row, **step)
            if not (of_row["token_mask"][:, 1:] * of_row["sample_mask"]).any():
                assert (metrics["probs_ratio_min"], metrics["probs_ratio_max"]) == (
                    math.inf,
                    -math.inf,
                )
            parts.append(value)
        torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=1e-14)


def test_a_step_without_a_token(adapter):
    cases = [("ClippedPGLossFn", LOSS["cases"][each]) for each in (0, 3)]
    for loss_of, case in [*cases, ("DPOLossFn", DPO["cases"][2])]:
        loss, data = getattr(adapter, loss_of)(case["settings"]), case["data"]
        nothing = data | {"sample_mask": [0.0] * len(case["logps"])}
        empty = case | {"data": nothing, "step": dict.fromkeys(case["step"], 0.0)}
        value, gradient, metrics = run(loss, empty)
        assert value == 0 and (gradient == 0).all()
        assert all(each in (0, math.inf, -math.inf) for each in metrics.values())


def test_patches_are_taken_back(adapter):
    home, package = (sys.modules[f"nemo_rl.algorithms.loss{x}"] for x in (".loss_functions", ""))
    own = home.ClippedPGLossFn
    adapter.patch()
    adapter.patch()
    assert home.ClippedPGLossFn is package.ClippedPGLossFn is adapter.ClippedPGLossFn
    assert home.DPOLossFn is adapter.DPOLossFn
    adapter.unpatch()
    assert home.ClippedPGLossFn is package.ClippedPGLossFn is own


def test_what_is_not_known_is_refused(adapter, monkeypatch):
    settings = LOSS["cases"][0]["settings"]
    with pytest.raises(ValueError) as caught:
        adapter.ClippedPGLossFn(settings | {"use_new": True, "also": 1})
    message = "tether.nemo_rl: settings of ClippedPGLossFn must be known, got also, use_new"
    assert str(caught.value) == message
    with pytest.raises(ValueError) as caught:
        adapter.ClippedPGLossFn(settings | {"truncated_importance_sampling_ratio": 2.0})
    assert str(caught.value) == (
        "tether.nemo_rl: truncated_importance_sampling_type must be given with "
        "truncated_importance_sampling_ratio, got a ratio of 2.0 and none"
    )
    monkeypatch.setattr(_trainers, "version_of", lambda _: "0.7.0")
    for act in (lambda: adapter.ClippedPGLossFn(settings), adapter.patch):
        with pytest.raises(RuntimeError) as caught:
            act()
        assert str(caught.value) == "tether.nemo_rl: nemo_rl must be 0.6.0, got 0.7.0"


def test_the_recording_is_of_the_source_that_the_dialects_are_of():
    assert LOSS["nemo_rl"] == DPO["nemo_rl"] == COMMIT


def with_choice(case, **choice):
    config = Config(case["settings"])
    config.tether = choice
    return config


def test_the_blocks_of_the_page_run(adapter):
    yaml = pytest.importorskip("yaml")
    code, config = blocks_of_page("nemo_rl")
    exec(code, {})
    try:
        home = sys.modules["nemo_rl.algorithms.loss.loss_functions"]
        assert home.ClippedPGLossFn is adapter.ClippedPGLossFn
        choice, case = yaml.safe_load(config)["loss_fn"]["tether"], LOSS["cases"][0]
        value, gradient, _ = run(home.ClippedPGLossFn(with_choice(case, **choice)), case)
        assert value.isfinite() and gradient.isfinite().all()
    finally:
        adapter.unpatch()


def test_any_objective(adapter):
    """In the place of the surrogate; the weights of the correction and the penalty stay."""
    kind = "truncated_importance_sampling_type"
    case = next(
        each
        for each in LOSS["cases"]
        if each["settings"][kind] == "tis"
        and not each["settings"]["sequence_level_importance_ratios"]
    )
    settings, data = case["settings"], {k: tensor(each) for k, each in case["data"].items()}
    arrays = adapter._Arrays(adapter.ClippedPGLossFn(settings), tensor(case["logps"]), data)
    clips = {"epsilon_low": 0.2, "epsilon_high": 0.2}
    for objective, options in (
        ("dapo", clips),
        ("reinforce", {}),
        ("decoupled_ppo", clips),
        ("topr", {"weights": {"opsm": {"high": 0.1}}}),
    ):
        given = {} if options is clips else options
        loss = adapter.ClippedPGLossFn(with_choice(case, objective=objective, **given))
        found, own = run(loss, case), run(adapter.ClippedPGLossFn(settings), case)
        parts = []
        for name, more in ((objective, options), ("nemo_rl.grpo", clips | {"beta": 0.0})):
            leaf = tensor(case["logps"]).requires_grad_()
            value = tether.policy_loss(
                leaf,
                arrays.advantages,
                arrays.mask,
                objective=name,
                old_logps=arrays.old,
                rollout_logps=arrays.engine,
                token_weights=loss._importance(arrays)[0],
                **loss._mean(
                    {n: torch.tensor(each) for n, each in (("tokens", 40.0), ("samples", 9.0))}
                ),
                **more,
            ).loss
            parts.append((value.detach(), torch.autograd.grad(value, leaf)[0]))
        for place in range(2):
            moved = found[place] - own[place]
            expected = parts[0][place] - parts[1][place]
            torch.testing.assert_close(moved, expected, rtol=1e-11, atol=1e-14)


def test_choices_are_checked_at_once(adapter):
    for choice, message in (
        ({"epsilon_low": 0.1}, "objective must be given in tether, got none"),
        (
            {"objective": "ppo", "constant": 1},
            "constant must not be given, got it. It is NeMo-RL's",
        ),
        ({"objective": "ppo", "epsilon_low": 2}, "epsilon_low must be in [0, 1], got 2"),
    ):
        with pytest.raises(ValueError) as caught:
            adapter.ClippedPGLossFn(with_choice(LOSS["cases"][0], **choice))
        assert str(caught.value) == f"tether.nemo_rl: {message}"


def test_it_is_tethers_loss_that_runs(adapter, monkeypatch):
    seen = []

    def counted(*arguments, **settings):
        seen.append(settings["objective"])
        return tether.policy_loss(*arguments, **settings)

    monkeypatch.setattr(adapter, "policy_loss", counted)
    for case in LOSS["cases"][:6]:
        run(adapter.ClippedPGLossFn(case["settings"]), case)
    assert seen == [f"nemo_rl.{x}" for x in ("grpo", "grpo", "grpo", "gspo", "cispo", "reinforce")]
