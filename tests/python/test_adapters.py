"""tether.openrlhf, torchrl, trl and verl against the recordings of their trainers' losses.

The trainers are stand-ins here, which have the settings and no loss: what they are asked for is
what tests/peers/record_*.py gave them. tests/adapters/ runs the trainers themselves.
"""

import contextlib
import importlib
import sys
import types
from types import SimpleNamespace as Namespace
from typing import NamedTuple

import pytest
import tether
import torch
from recordings import (
    FLOAT32,
    assert_equal,
    batch_of,
    blocks_of_page,
    named,
    recording,
    tensor,
)
from tether import _trainers


def refused(*_, **__):
    raise AssertionError("left to the trainer")


@contextlib.contextmanager
def adapter_of(name, modules):
    """tether.NAME where these modules stand for the trainer's; its version is known."""
    with pytest.MonkeyPatch.context() as patch:
        for path, members in modules.items():
            parents = path.split(".")
            for i in range(1, len(parents)):
                parent = ".".join(parents[:i])
                if parent not in modules:
                    patch.setitem(sys.modules, parent, types.ModuleType(parent))
            module = types.ModuleType(path)
            vars(module).update(members)
            patch.setitem(sys.modules, path, module)
            if len(parents) > 1:
                setattr(sys.modules[".".join(parents[:-1])], parents[-1], module)
        patch.setattr(_trainers, "version_of", lambda trainer: _trainers.KNOWN[trainer][0])
        yield importlib.import_module(f"tether.{name}")
    sys.modules.pop(f"tether.{name}", None)
    vars(tether).pop(name, None)


def by_token(advantages, mask):
    return advantages if advantages.dim() == 2 else advantages[:, None].expand(mask.shape)


@pytest.mark.parametrize("found", [None, "9.9.9"])
@pytest.mark.parametrize("name", ["nemo_rl", "prime_rl", "torchrl", "verl"])
def test_a_version_without_the_modules_is_refused_at_import(name, found, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"tether.{name}", raising=False)
    monkeypatch.setattr(_trainers, "version_of", lambda _: found)
    with pytest.raises(RuntimeError) as caught:
        importlib.import_module(f"tether.{name}")
    known = _trainers.KNOWN[name][0]
    assert str(caught.value) == f"tether.{name}: {name} must be {known}, got {found or 'none'}"


# ---- OpenRLHF ------------------------------------------------------------------------------------

OPENRLHF = {name: recording(f"openrlhf_{name}")["cases"] for name in ("policy", "value")}
OPENRLHF["preference"] = [
    each
    for each in recording("openrlhf_preference")["cases"]
    if each["settings"]["loss"] == "DPOLoss"
]


def class_of(name, **defaults):
    def init(self, **options):
        torch.nn.Module.__init__(self)
        vars(self).update(defaults | options)
        if options.get("policy_loss_type") == "gspo":  # as OpenRLHF says
            self.token_level_loss = False

    return type(name, (torch.nn.Module,), {"__init__": init, "forward": refused})


@pytest.fixture(scope="module")
def openrlhf():
    off = {"dual_clip": None, "token_level_loss": True, "policy_loss_type": "ppo"}
    off |= {"is_correction_level": "off"}
    members = {
        "PolicyLoss": class_of("PolicyLoss", **off),
        "ValueLoss": class_of("ValueLoss", clip_eps=None, token_level_loss=True),
        "DPOLoss": class_of("DPOLoss", label_smoothing=0.0, ipo=False),
    }
    with adapter_of("openrlhf", {"openrlhf.models.loss": members}) as adapter:
        (code,) = blocks_of_page("openrlhf")
        exec(code, {})
        yield sys.modules["openrlhf.models.loss"]
        adapter.unpatch()
        assert vars(sys.modules["openrlhf.models.loss"])["DPOLoss"] is members["DPOLoss"]


@named(OPENRLHF["policy"])
def test_policy_losses_of_openrlhf(openrlhf, case):
    batch, settings = batch_of(case), case["settings"]
    mask, logps = batch["response_mask"], batch["logps"].requires_grad_()
    arrays = (batch["old_logps"], by_token(batch["advantages"], mask), mask)
    loss = openrlhf.PolicyLoss(**settings["options"])
    out = loss(logps, *arrays, batch["rollout_logps"], **settings["step"])
    out[0].backward()
    assert_equal(case, out[0].detach(), logps.grad, **FLOAT32)
    corrected = settings["options"].get("is_correction_level", "off") != "off"
    kind = settings["options"].get("policy_loss_type", "ppo")
    assert [each is None for each in out[1:]] == [False, False] + 2 * [
        not corrected or kind == "gspo"
    ]


@named(OPENRLHF["value"])
def test_value_losses_of_openrlhf(openrlhf, case):
    values = tensor(case["values"]).requires_grad_()
    arrays = (tensor(case["old_values"]), tensor(case["returns"]))
    loss = openrlhf.ValueLoss(**case["settings"]["options"])
    out = loss(values, *arrays, torch.tensor(case["response_mask"]), **case["settings"]["step"])
    out.backward()
    assert_equal(case, out.detach(), values.grad, "values", **FLOAT32)


@named(OPENRLHF["preference"])
def test_preference_losses_of_openrlhf(openrlhf, case):
    logps = tensor(case["logps"]).requires_grad_()
    loss = openrlhf.DPOLoss(**case["settings"]["options"])
    out, *rewards = loss(*logps.split(5), *tensor(case["ref_logps"]).split(5))
    out.backward()
    assert_equal(case, out.detach(), logps.grad)
    beta = case["settings"]["options"]["beta"]
    want = beta * (logps - tensor(case["ref_logps"])).detach()
    assert torch.equal(torch.cat(rewards), want)


# ---- torchrl -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torchrl():
    class Loss:
        def __init__(self, aggregation, low, high):
            self.aggregation, self.reduction = aggregation, "mean"
            bounds = torch.tensor([-low, high], dtype=torch.float64)
            self._clip_bounds = bounds.log1p().unbind()

        _compute_policy_objective = _aggregate_loss_value = refused

        def _loss_mask_keys(self):
            return ()

    members = {name: type(name, (Loss,), {}) for name in ("GRPOLoss", "DAPO", "CISPOLoss")}
    with adapter_of("torchrl", {"torchrl.objectives.llm": members}) as adapter:
        yield adapter


@named(recording("torchrl_policy")["cases"])
def test_losses_of_torchrl(torchrl, case):
    settings, batch = case["settings"], batch_of(case)
    name = {"grpo": "GRPOLoss", "cispo": "CISPOLoss"}[settings["loss"]]
    loss = getattr(torchrl, name)(settings["aggregation"], *settings["clip_epsilon"])
    logps, mask = batch["logps"].requires_grad_(), batch["response_mask"] > 0
    log_ratio = logps - batch["old_logps"]
    advantages = by_token(batch["advantages"], mask)[..., None]
    columns, clipped = loss._compute_policy_objective(log_ratio[..., None], advantages)
    out = loss._aggregate_loss_value(columns, mask).sum()
    out.backward()
    assert_equal(case, out.detach(), logps.grad)
    low, high = settings["clip_epsilon"]
    ratio = log_ratio.detach().exp()
    assert clipped == ((ratio < 1 - low) | (ratio > 1 + high)).double().mean()


# ---- verl ----------------------------------------------------------------------------------------


class Config(dict):
    """verl's, with `get` and attributes."""

    def __getattr__(self, name):
        return self[name]


@pytest.fixture(scope="module")
def verl():
    registries = {"POLICY_LOSS_REGISTRY": {}, "ADV_ESTIMATOR_REGISTRY": {}}

    def into(registry):
        return lambda name: lambda function: registries[registry].setdefault(name, function)

    members = {
        **registries,
        "register_policy_loss": into("POLICY_LOSS_REGISTRY"),
        "register_adv_est": into("ADV_ESTIMATOR_REGISTRY"),
    }
    modules = {
        "verl.trainer.ppo.core_algos": members,
        "verl.utils.torch_functional": {},
        "verl.trainer.ppo": {},
    }
    with adapter_of("verl", dict(sorted(modules.items()))):
        yield Namespace(**registries)


def of_losses(cases):
    """Of those without weights of another rule of verl's."""
    return [each for each in cases if not {"rollout_is", "rollout_rs"} & set(each["settings"])]


@named(of_losses(recording("verl_policy")["cases"] + recording("verl_weights")["cases"]))
def test_losses_of_verl(verl, case):
    settings, step = case["settings"], case["settings"]["step"]
    clips = Config(settings["clips"])
    config = Config({"clip_ratio": 0.2, **clips, "policy_loss": clips, "global_batch_info": step})
    mask, logps = torch.tensor(case["response_mask"]), tensor(case["log_prob"]).requires_grad_()
    loss, metrics = verl.POLICY_LOSS_REGISTRY[f"tether_{settings['loss']}"](
        tensor(case["old_log_prob"]),
        logps,
        by_token(tensor(case["advantages"]), mask),
        mask,
        settings["loss_agg_mode"],
        config,
    )
    loss.backward()
    assert_equal(case, loss.detach(), logps.grad, "log_prob", **FLOAT32)
    assert all(isinstance(each, float) for each in metrics.values())


OF_GROUPS = [
    each
    for each in recording("verl_advantages")["cases"]
    if each["estimator"] in ("grpo", "rloo", "opo") and "epsilon" not in each["options"]
]


@pytest.mark.parametrize("case", OF_GROUPS, ids=lambda case: case["estimator"])
def test_advantages_of_verl(verl, case):
    mask, rewards = torch.tensor(case["response_mask"]), torch.tensor(case["rewards"])
    if rewards.dim() == 1:
        rewards = torch.nn.functional.pad(rewards[:, None], (0, mask.shape[1] - 1))
    arrays = {"token_level_rewards": rewards, "response_mask": mask}
    ids = [f"prompt {each}" for each in case["ids"]]
    estimator = verl.ADV_ESTIMATOR_REGISTRY[f"tether_{case['estimator']}"]
    found, returns = estimator(**arrays, index=ids, config=Config(case["options"]))
    torch.testing.assert_close(found.double(), tensor(case["advantages"]), rtol=1e-5, atol=1e-6)
    assert found is returns


# ---- TRL -----------------------------------------------------------------------------------------


def own_grpo(self, model, inputs):
    """Called for the metrics: on log-probabilities without a gradient."""
    logps, entropies, _ = self._get_per_token_logps_and_entropies(model)
    assert not logps.requires_grad and not entropies.requires_grad
    return logps.sum()


class Outputs(NamedTuple):
    log_probs: torch.Tensor


def own_dpo(self, model, inputs, return_outputs):
    assert not model().log_probs.requires_grad and self.precompute_ref_logps
    assert inputs["ref_chosen_logps"].shape == inputs["ref_rejected_logps"].shape
    return torch.zeros(()), None


@pytest.fixture(scope="module")
def trl():
    names = ("selective_log_softmax", "entropy_from_logits", "selective_log_softmax_and_entropy")
    utils = {name: lambda *_: None for name in names}
    utils |= {"_ChunkedLogProbFunction": object, "_use_triton": lambda device: False}
    owns = {"grpo": own_grpo, "rloo": own_grpo, "dpo": own_dpo, "kto": own_dpo}
    classes = {name: type(name, (), {"_compute_loss": own}) for name, own in owns.items()}
    modules = {"trl.trainer.utils": utils} | {
        f"trl.trainer.{name}_trainer": {f"{name.upper()}Trainer": each}
        for name, each in classes.items()
    }
    with adapter_of("trl", modules) as adapter:
        adapter.patch()
        yield Namespace(**classes)
        adapter.unpatch()
        assert classes["grpo"]._compute_loss is own_grpo


# The weights of its vespo are TRL's own.
GRPO = [
    each
    for each in recording("trl_grpo")["cases"]
    if each["settings"]["loss_type"] != "vespo"
]  # fmt: skip


NOT_ASKED = ("get_off_policy_mask", "get_high_entropy_mask", "get_gamma_weights")


def grpo_trainer(settings, logps):
    entropies = torch.ones_like(logps)
    return Namespace(
        **{name: settings[name] for name in ("loss_type", "beta", "epsilon_low", "epsilon_high",
                                             "max_completion_length", "importance_sampling_level")},
        args=Namespace(**settings),
        current_gradient_accumulation_steps=settings["accumulation_steps"],
        use_vllm=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        model=Namespace(training=True),
        accelerator=Namespace(num_processes=settings["processes"]),
        _get_per_token_logps_and_entropies=lambda _: (logps, entropies, None),
        **dict.fromkeys(NOT_ASKED, refused),
    )  # fmt: skip


@named(GRPO)
def test_grpo_losses_of_trl(trl, case):
    settings, mask = case["settings"], torch.tensor(case["response_mask"])
    arrays = {n: None if case[n] is None else tensor(case[n])
              for n in ("logps", "old_logps", "ref_logps")}  # fmt: skip
    logps, items = arrays["logps"].requires_grad_(), settings["num_items_in_batch"]
    inputs = {
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": tensor(case["advantages"]),
        "old_per_token_logps": arrays["old_logps"],
        "ref_per_token_logps": arrays["ref_logps"],
        "num_items_in_batch": mask.sum() if items is None else torch.tensor(items),
    }
    loss = trl.grpo._compute_loss(grpo_trainer(settings, logps), None, inputs)
    loss.backward()
    assert_equal(case, loss.detach(), logps.grad, **FLOAT32)


@named(recording("trl_dpo")["cases"])
def test_dpo_losses_of_trl(trl, case):
    settings, answers = case["settings"], torch.tensor(case["response_mask"])
    logps = tensor(case["logps"]).requires_grad_()
    policy = Outputs(torch.where(answers != 0, logps, 0))
    sums = torch.where(answers != 0, tensor(case["ref_logps"]), 0).sum(1)
    this = Namespace(
        **settings,
        loss_types=[settings["loss_type"]],
        loss_weights=[1.0],
        ld_alpha=None,
        use_weighting=False,
        precompute_ref_logps=False,
        aux_loss_enabled=False,
        model=None,
        ref_model=None,
        args=Namespace(discopop_tau=0.05),
        compute_ref_log_probs=lambda *_: sums.chunk(2),
    )
    tokens = torch.cat([torch.zeros_like(answers[:, :1]), answers], 1)
    inputs = {"input_ids": torch.zeros_like(tokens), "completion_mask": tokens}
    loss = trl.dpo._compute_loss(this, lambda: policy, inputs, False)
    loss.backward()
    assert_equal(case, loss.detach(), logps.grad, **FLOAT32)


def test_the_head_and_logits_of_trl(trl):
    utils = sys.modules["trl.trainer.utils"]
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 3, 4), torch.randn(9, 4)
    ids = torch.tensor([[0, 8, -100], [3, 4, 5]])
    want = torch.log_softmax(hidden @ weight.T / 0.7, -1)
    entropies = -(want.exp() * want).sum(-1).masked_fill(ids < 0, 0)
    want = want.gather(-1, ids.clamp_min(0)[..., None])[..., 0].masked_fill(ids < 0, 0)
    outputs = ("entropy", "is_top1")
    head = utils._ChunkedLogProbFunction.apply(
        hidden.flatten(0, 1), weight, None, ids.flatten(), 0.7, 2, None, 1.0, outputs
    )
    torch.testing.assert_close(head[0], want.flatten())
    torch.testing.assert_close(head[1], entropies.flatten())
    assert head[2] is head[3] is None and head[4].dtype == torch.bool
    found = utils.selective_log_softmax_and_entropy(
        hidden @ weight.T, ids.clamp_min(0), temperature=0.7, row_mask=ids >= 0
    )
    torch.testing.assert_close(found[0], want)
    assert utils._use_triton("cpu")
