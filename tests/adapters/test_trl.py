"""tether.trl in TRL's own trainers: the same samples, losses, metrics and parameters.

Needs an environment with TRL, which `./dev test` makes.
"""

import itertools
import math
import re

import pytest
import torch

pytest.importorskip("trl")
import trl_runs
from trl.trainer import grpo_trainer

BOUND = 2e-6  # of parameters, and of logged numbers relative to max(1, number)
NO_CLOCK = re.compile("time|runtime|per_second")


def assert_same(ours, theirs):
    assert theirs.moved > 1e-3
    assert (ours.parameters - theirs.parameters).abs().max() <= BOUND
    assert len(ours.logs) == len(theirs.logs) == trl_runs.STEPS + 1
    for our, their in zip(ours.logs, theirs.logs, strict=True):
        assert our.keys() == their.keys()
        for name in their:
            if not NO_CLOCK.search(name):
                assert our[name] == pytest.approx(their[name], rel=BOUND, abs=BOUND), name


# Samples of weights that are up to seven micro-batches old, so that ratios are not 1.
STALE = {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 2}
GRPO = {
    "grpo": {"loss_type": "grpo", "epsilon": 0.02},
    "dapo": {"loss_type": "dapo", "epsilon": 0.02, "epsilon_high": 0.03},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_high": 0.01},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1},
    "sapo": {"loss_type": "sapo"},
    "vespo": {"loss_type": "vespo"},
    "two-sided": {"loss_type": "bnpo", "epsilon_high": 0.1, "delta": 1.2},
    "penalty": {"loss_type": "grpo", "beta": 0.1},
    "penalty, corrected": {"loss_type": "dapo", "beta": 0.1, "use_bias_correction_kl": True},
    "truncated are masked": {"loss_type": "dapo", "mask_truncated_completions": True},
    "truncated rows are empty": {"loss_type": "grpo", "mask_truncated_completions": True},
    "high entropy": {"loss_type": "grpo", "top_entropy_quantile": 0.3},
    "off-policy mask": {"loss_type": "grpo", "off_policy_mask_threshold": 0.01},
    "entropy bonus": {"loss_type": "dapo", "entropy_coef": 0.05, "top_entropy_quantile": 0.6},
    "experts": {"loss_type": "grpo", "experts": 4, "router_aux_loss_coef": 0.3},
    "adapters": {"loss_type": "grpo", "beta": 0.1, "adapters": True},
    "adaptive entropy": {  # on both sides of the target
        "loss_type": "grpo",
        "use_adaptive_entropy": True,
        "entropy_coef": 0.05,
        "entropy_target": 2.58,
    },
}


@pytest.mark.parametrize("name", GRPO)
def test_grpo_runs_are_the_same(name):
    settings = STALE | GRPO[name]
    ours, theirs = (trl_runs.run("grpo", settings, patched) for patched in (True, False))
    assert ours.calls["policy_loss"] == 2 * trl_runs.STEPS + 1 and not any(theirs.calls.values())
    assert ours.calls["linear_token_logps"] > ours.calls["policy_loss"]
    assert_same(ours, theirs)
    clipped = theirs.logs[1].get("clip_ratio/region_mean", 1)
    assert clipped > 0 or "epsilon" not in settings


class Engine(grpo_trainer.GRPOTrainer):
    """As if vLLM had sampled, with other numbers than the policy's."""

    def _generate_and_score_completions(self, inputs):
        out = super()._generate_and_score_completions(inputs)
        logps = out["old_per_token_logps"]
        noise = torch.randn(logps.shape, generator=torch.Generator().manual_seed(self._step)) * 0.3
        ratio = noise.exp()
        if self.vllm_importance_sampling_mode.startswith("sequence"):
            ratio = (noise * out["completion_mask"]).sum(1, keepdim=True).exp()
        high = 1.2
        truncated = self.vllm_importance_sampling_mode.endswith("truncate")
        ratio = ratio.clamp(max=high) if truncated else ratio.masked_fill(ratio > high, 0)
        return {
            **out,
            "sampling_per_token_logps": logps - noise,
            "importance_sampling_ratio": ratio,
        }

    def _compute_loss(self, model, inputs):
        self.use_vllm = True
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self.use_vllm = False


@pytest.mark.parametrize(
    ("mode", "loss_type"),
    [
        *itertools.product(("token_mask", "sequence_mask"), ("dapo", "grpo")),
        *itertools.product(("token_truncate", "sequence_truncate"), ("grpo", "vespo")),
    ],
)
def test_runs_with_an_engine_are_the_same(mode, loss_type):
    settings = STALE | {
        "loss_type": loss_type,
        "vllm_importance_sampling_mode": mode,
        "off_policy_mask_threshold": 0.02,
    }
    ours, theirs = (trl_runs.run("grpo", settings, patched, Engine) for patched in (True, False))
    assert ours.calls["policy_loss"] == 2 * trl_runs.STEPS + 1
    assert_same(ours, theirs)


@pytest.mark.parametrize("experts", [0, 4])
def test_rloo_runs_are_the_same(experts):
    settings = STALE | {
        "epsilon_high": 0.3,
        "learning_rate": 0.01,  # ratios are of whole answers
        "experts": experts,
        "router_aux_loss_coef": 0.3 if experts else 0.0,
    }
    ours, theirs = (trl_runs.run("rloo", settings, patched) for patched in (True, False))
    assert ours.calls["policy_loss"] == 2 * trl_runs.STEPS + 1
    assert_same(ours, theirs)


DPO = {
    "sigmoid": ({}, 1),
    "hinge": ({"loss_type": "hinge"}, 1),
    "ipo": ({"loss_type": "ipo"}, 1),
    "sigmoid_norm": ({"loss_type": "sigmoid_norm", "beta": 1.0}, 1),
    "apo_zero": ({"loss_type": "apo_zero"}, 1),
    "forward_kl": ({"f_divergence_type": "forward_kl"}, 1),
    "alpha_divergence": (
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
        1,
    ),
    "alpha_divergence of 1": (
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
        1,
    ),
    "js_divergence": ({"f_divergence_type": "js_divergence"}, 1),
    "precomputed reference": ({"precompute_ref_log_probs": True}, 1),
    "experts": ({"experts": 4, "router_aux_loss_coef": 0.3}, 1),
    "sum of three": (
        {"loss_type": ["sigmoid", "ipo", "apo_zero"], "loss_weights": [0.8, 0.1, 0.3]},
        3,
    ),
    "bco_pair": ({"loss_type": "bco_pair"}, 1),
    "MPO": ({"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}, 3),
    "adapters": ({"adapters": True}, 1),
    # The reference, where it draws too, draws after the policy.
    "dropout": ({"adapters": True, "dropout": 0.3, "disable_dropout": False}, 1),
    "robust": ({"loss_type": "robust", "label_smoothing": 0.1}, 1),
    "exo_pair": ({"loss_type": "exo_pair", "label_smoothing": 0.1}, 1),
    "exo_pair under a divergence": (
        {"loss_type": "exo_pair", "label_smoothing": 0.1, "f_divergence_type": "js_divergence"},
        1,
    ),
    "nca_pair": ({"loss_type": "nca_pair"}, 1),
    "sppo_hard": ({"loss_type": "sppo_hard", "learning_rate": 0.005}, 1),
    "apo_down": ({"loss_type": "apo_down"}, 1),
    "discopop": ({"loss_type": "discopop", "discopop_tau": 0.1}, 1),
    "aot": ({"loss_type": "aot", "label_smoothing": 0.1}, 1),
    "aot_unpaired": ({"loss_type": "aot_unpaired"}, 1),
    "weighted by the policy": ({"use_weighting": True}, 1),
    "a weighted sum": (
        {"use_weighting": True, "loss_type": ["ipo", "apo_zero"], "loss_weights": [1.0, 0.5]},
        2,
    ),
    # TRL's own losses, on our log-probabilities:
    "ld_alpha": ({"ld_alpha": 0.5}, 0),
    "means under a divergence": ({"loss_type": "ipo", "f_divergence_type": "js_divergence"}, 0),
}


@pytest.mark.parametrize("name", DPO)
def test_dpo_runs_are_the_same(name):
    settings, calls = DPO[name]
    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4} | settings
    ours, theirs = (trl_runs.run("dpo", settings, patched) for patched in (True, False))
    our_calls = ours.calls["preference_loss"] + ours.calls["policy_loss"]
    assert our_calls == (2 * trl_runs.STEPS + 1) * calls
    assert ours.calls["linear_token_logps"] > 0 == sum(theirs.calls.values())
    assert_same(ours, theirs)


KTO = {
    "kto": ({"desirable_weight": 0.6, "undesirable_weight": 1.3}, 1),
    "apo_zero_unpaired": ({"loss_type": "apo_zero_unpaired"}, 1),
    "precomputed reference": ({"precompute_ref_log_probs": True}, 1),
    "adapters": ({"adapters": True, "precompute_ref_log_probs": True}, 1),
    "adapters, their reference not seen": ({"adapters": True}, 0),
}


@pytest.mark.parametrize("name", KTO)
def test_kto_runs_are_the_same(name):
    settings, calls = KTO[name]
    ours, theirs = (trl_runs.run("kto", settings, patched) for patched in (True, False))
    assert ours.calls["preference_loss"] == (trl_runs.STEPS + 1) * calls
    assert_same(ours, theirs)


def test_sft_runs_are_the_same():
    ours, theirs = (trl_runs.run("sft", {}, patched) for patched in (True, False))
    assert ours.calls["linear_token_logps"] == trl_runs.STEPS + 1
    assert_same(ours, theirs)


def test_a_value_that_an_option_does_not_take_is_refused():
    with pytest.raises(
        ValueError, match=r"^policy_loss: epsilon_high must be at least 0, got -0.5$"
    ):
        trl_runs.run("grpo", {"epsilon": -0.5}, patched=True)


@pytest.mark.parametrize("kind", ["grpo", "rloo", "dpo", "kto"])
def test_other_devices_are_left_to_trl(kind, monkeypatch):
    monkeypatch.setattr("tether._ops.KERNELS", frozenset())
    ours, theirs = (trl_runs.run(kind, {}, patched) for patched in (True, False))
    assert not any(ours.calls.values())
    assert torch.equal(ours.parameters, theirs.parameters)


# ---- GRPO's loss alone, over its settings --------------------------------------------------------


LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")


@pytest.fixture(scope="module")
def grpo_trainer_without_model(tmp_path_factory):
    settings = {"gradient_accumulation_steps": 2, "steps_per_generation": 4}
    return trl_runs.trainer("grpo", settings, str(tmp_path_factory.mktemp("trainer")))


def settings_of(random):
    """Every setting that the loss reads, by chance."""

    def one_of(*values):
        return values[int(torch.randint(len(values), (), generator=random))]

    loss_type = one_of(*LOSS_TYPES)
    return {
        "loss_type": loss_type,
        "importance_sampling_level": one_of("token", "sequence"),
        "epsilon_low": one_of(0.1, 0.3),
        # Of cispo it is a bound of the ratio itself.
        "epsilon_high": one_of(0.2, 0.4) + (0.7 if loss_type == "cispo" else 0),
        "delta": one_of(None, 1.5),
        "beta": one_of(0.0, 0.1),
        "use_bias_correction_kl": one_of(True, False),
        "top_entropy_quantile": one_of(1.0, 0.4),
        "off_policy_mask_threshold": one_of(None, 0.05),
        "use_vllm": one_of(True, False),
        "vllm_importance_sampling_correction": one_of(True, False),
        "_entropy_bonus_enabled": one_of(True, False),
        "entropy_coef": 0.03,
        "sapo_temperature_neg": one_of(1.05, 2.0),
        "vespo_k_pos": one_of(2.0, 1.0),
        "num_processes": one_of(1, 3),
        "training": one_of(True, False),
        "old": one_of(True, False),
        "engine_of": one_of("token", "sequence"),
    }


def batch_of(settings, random):
    rows, tokens = 6, 9

    def normal(*sizes):
        return torch.randn(sizes, generator=random)

    logps = -normal(rows, tokens).abs()
    ratio = (0.2 * normal(rows, 1 if settings["engine_of"] == "sequence" else tokens)).exp()
    mask = (torch.arange(tokens) < torch.tensor([9, 4, 0, 1, 7, 6])[:, None]).int()
    sampled = logps + 0.2 * normal(rows, tokens)
    sampled[4, 2] = math.nan  # of a token that the engine could not score
    inputs = {
        "prompt_ids": torch.ones(rows, 3, dtype=torch.int64),
        "prompt_mask": torch.ones(rows, 3, dtype=torch.int64),
        "completion_ids": torch.ones(rows, tokens, dtype=torch.int64),
        "completion_mask": mask,
        "tool_mask": (torch.rand(rows, tokens, generator=random) < 0.9).int(),
        "advantages": torch.tensor([1.0, -0.7, 0.4, -1.2, 0.0, 0.5]),
        "ref_per_token_logps": logps + 0.3 * normal(rows, tokens),
        "importance_sampling_ratio": ratio.masked_fill(ratio > 1.3, 0),
        "sampling_per_token_logps": sampled,
        "num_items_in_batch": torch.tensor(90),
    }
    if settings["old"]:
        inputs["old_per_token_logps"] = logps + 0.3 * normal(rows, tokens)
    return logps, normal(rows, tokens).abs(), inputs


def loss_and_gradients(trainer, logps, entropies, inputs):
    leaves = logps.clone().requires_grad_(), entropies.clone().requires_grad_()
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (*leaves, None)
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    logged = trainer._metrics["train" if trainer.model.training else "eval"]
    metrics = {name: values[0] for name, values in logged.items()}
    logged.clear()
    gradients = [torch.zeros(6, 9) if leaf.grad is None else leaf.grad for leaf in leaves]
    return [loss.detach(), *gradients], metrics


@pytest.mark.parametrize("seed", range(200))
def test_every_setting_of_grpo(seed, grpo_trainer_without_model, monkeypatch):
    trainer = grpo_trainer_without_model
    random = torch.Generator().manual_seed(seed)
    settings = settings_of(random)
    for name, value in settings.items():
        for owner in (trainer, trainer.args):
            if hasattr(owner, name):
                setattr(owner, name, value)
    ranks = settings["num_processes"]
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", ranks)
    trainer.current_gradient_accumulation_steps = 2
    trainer.model.train(settings["training"])
    batch = batch_of(settings, random)
    theirs, their_metrics = loss_and_gradients(trainer, *batch)
    with trl_runs.counted(patched=True) as calls:
        ours, our_metrics = loss_and_gradients(trainer, *batch)
    left = (
        settings["loss_type"] in ("cispo", "vespo")
        and settings["importance_sampling_level"] == "sequence"
        and settings["beta"]
        and settings["use_bias_correction_kl"]
    )
    assert calls["policy_loss"] == (0 if left else 1)
    assert our_metrics == pytest.approx(their_metrics, nan_ok=True)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=BOUND, atol=BOUND)


@pytest.mark.parametrize(
    "settings", [{"delta": 1.1, "epsilon_high": 0.2, "loss_type": "bnpo"}], ids=["low delta"]
)
def test_what_is_left_to_grpo_itself(settings):
    ours, theirs = (trl_runs.run("grpo", STALE | settings, patched) for patched in (True, False))
    assert ours.calls["policy_loss"] == 0 < ours.calls["linear_token_logps"]
    assert_same(ours, theirs)
