"""tether's advantages inside verl 0.9.1, beside verl's own in place. Skipped without verl."""

import pytest
import torch

pytest.importorskip("verl")

import tether.verl as adapter
from tether import _verl_advantages as estimators
from verl import DataProto
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl_batches import assert_near, grouped_batch, policy_batch

torch.set_num_threads(1)  # the tensors are tiny


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95), (0.9, 0.0)])
def test_gae_equals_verl(gamma, lam, dtype):
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 6, 9, generator=generator, dtype=torch.float64).to(dtype)
    mask = policy_batch(0)["response_mask"].long()
    arguments = {
        "token_level_rewards": rewards,
        "values": values,
        "response_mask": mask,
        "gamma": gamma,
        "lam": lam,
    }
    own = core_algos.compute_gae_advantage_return(**arguments)
    adapter.patch("gae")
    try:
        assert core_algos.compute_gae_advantage_return is estimators.gae
        ours = core_algos.compute_gae_advantage_return(**arguments)
    finally:
        adapter.unpatch()
    assert_near(ours, own, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("name", ["grpo", "rloo", "opo", *estimators.BY_NAME])
def test_names_equal_verl(name, norm, dtype):
    batch = grouped_batch(dtype, alone=name != "grpo_passk")  # verl refuses it there
    config = AlgoConfig(norm_adv_by_std_in_grpo=norm, gamma=0.9)
    settings = {"norm_adv_by_std_in_grpo": norm} if name == "grpo" else {"config": config}
    own = core_algos.get_adv_estimator_fn(name)(**batch, **settings)
    ours = core_algos.get_adv_estimator_fn(f"tether_{name}")(**batch, config=config)
    assert_near(ours, own, dtype)


def test_groups_in_verls_trainer_and_without_ids():
    batch = grouped_batch(torch.float32)
    tensors = {name: batch[name] for name in ("token_level_rewards", "response_mask")}
    found = {}
    for name in ("tether_rloo", "rloo"):
        data = DataProto.from_dict(dict(tensors), non_tensors={"uid": batch["index"]})
        found[name] = compute_advantage(data, name, config=AlgoConfig()).batch["advantages"]
    torch.testing.assert_close(*found.values(), rtol=2e-6, atol=1e-6)
    with pytest.raises(ValueError) as caught:
        core_algos.get_adv_estimator_fn("tether_opo")(**tensors)
    assert str(caught.value) == "tether.verl: index (uid) must be given, got none"


def in_trainer(name, dtype):
    """What verl's trainer makes of a batch that has all that its estimators read."""
    batch = grouped_batch(dtype, alone=name != "grpo_passk")
    ids, rewards = batch.pop("index"), batch["token_level_rewards"]
    generator = torch.Generator().manual_seed(3)
    logps = -torch.rand(*rewards.shape, generator=generator, dtype=torch.float64).to(dtype)
    batch |= {
        "old_log_probs": logps,
        "sum_pi_squared": (2 * logps).exp() + (1 - logps.exp()).square() / 4,
        "rollout_is_weights": 0.5 + torch.rand(*rewards.shape, generator=generator).to(dtype),
        "values": logps,
        "prompts": torch.ones(len(ids), 1, dtype=torch.long),
        "attention_mask": torch.ones(len(ids), 7, dtype=torch.long),
    }
    if name == "remax":
        batch["reward_baselines"] = torch.rand(len(ids), generator=generator).to(dtype)
    scores = torch.rand(2, len(ids), generator=generator).numpy()
    several = dict(zip(("accuracy", "format"), scores, strict=True))
    data = DataProto.from_dict(batch, non_tensors={"uid": ids, **several})
    config = AlgoConfig(gamma=0.9, gdpo_reward_keys=list(several), gdpo_reward_weights=[1.0, 0.5])
    out = compute_advantage(data, name, gamma=0.9, lam=0.95, config=config).batch
    return out["advantages"], out["returns"] * out["response_mask"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", [each.value for each in core_algos.AdvantageEstimator])
def test_every_estimator_of_verl_in_its_trainer(name, dtype):
    """Patched, beside verl's own. gdpo and grpo_vectorized are float32 there; the denominators of
    token baselines have 1e-8 more."""
    own = in_trainer(name, dtype)
    before = core_algos.get_adv_estimator_fn(name)
    adapter.patch()
    try:
        assert core_algos.get_adv_estimator_fn(name) is not before
        ours = in_trainer(name, dtype)
    finally:
        adapter.unpatch()
    assert core_algos.get_adv_estimator_fn(name) is before
    narrow = name in ("gdpo", "grpo_vectorized") or "token_baseline" in name
    assert_near(
        [each.double() for each in ours],
        [each.double() for each in own],
        torch.float32 if narrow else dtype,
    )


def test_gdpo_says_what_it_misses():
    batch, config = grouped_batch(torch.float32), AlgoConfig(gdpo_reward_keys=["speed"])
    columns = {"accuracy": batch["index"]}
    with pytest.raises(ValueError) as caught:
        estimators.gdpo(**batch, config=config, non_tensor_batch=columns, batch={})
    assert str(caught.value) == (
        "tether.verl: gdpo_reward_keys must be of the batch's accuracy, got ['speed']"
    )
