"""Trainers' losses by their names."""

import pytest
import tether
import torch
from batches import assert_same_bits, evaluated, padded_batch


@pytest.mark.parametrize("name", tether.dialects())
def test_are_an_objective_with_settings(name):
    row = tether.dialects()[name]
    batch = padded_batch()
    expected = evaluated(batch, objective=row.objective, weights=row.weights, **row.options)
    assert_same_bits(evaluated(batch, objective=name), expected)


@pytest.mark.parametrize("name", ["verl.vanilla", "prime_rl.ipo", "verl.dppo_kl"])
def test_on_other_devices_too(name, monkeypatch):
    batch = padded_batch()
    expected = tether.policy_loss(**batch, objective=name).loss
    monkeypatch.setattr("tether.policy.has_kernel", lambda tensor, *others: False)
    loss = tether.policy_loss(**batch, objective=name).loss
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_have_the_trainers_defaults():
    dialects = tether.dialects()
    kl = {"kl_estimator": "low_var_kl", "kl_gradient": "low_var_kl"}
    assert dialects["verl.cispo"].options == {"ratio_low": 0.8, "ratio_high": 1.2} | kl
    assert dialects["verl.dppo_kl"].weights == {"kl_mask": {"low": 0.2, "high": 0.2}}
    assert dialects["prime_rl.ipo"].weights == {"tv_band": {"level": "token"}}
    assert dialects["trl.luspo"].options == {"aggregation": "sequence_mean_token_sum"}
    assert {name.split(".")[0] for name in dialects} >= {
        "trl", "verl", "openrlhf", "slime", "prime_rl", "nemo_rl", "torchrl"
    }  # fmt: skip


# What their documentation lets one write, of losses of a policy.
SETTINGS = {
    "trl": "grpo bnpo dr_grpo dapo cispo sapo luspo vespo rloo gmpo a2po",
    "verl": "vanilla dppo_tv dppo_kl gspo sapo gpg clip_cov kl_cov geo_mean dro cispo bypass_mode",
    "openrlhf": "ppo gspo",
    "slime": "grpo gspo cispo ppo reinforce_plus_plus reinforce_plus_plus_baseline",
    "nemo_rl": "grpo gspo cispo reinforce",
    "prime_rl": "default ipo",
    "torchrl": "clip_ppo ppo grpo cispo a2c reinforce",
}


@pytest.mark.parametrize("trainer", SETTINGS)
def test_every_loss_of_a_trainer_can_be_typed_in(trainer):
    batch = padded_batch()
    for name in SETTINGS[trainer].split():
        assert evaluated(batch, objective=f"{trainer}.{name}").loss.isfinite()


@pytest.mark.parametrize(
    "word, meant",
    [("geo_mean", "gmpo"), ("vanilla", "ppo_dual_clip"), ("clip_ppo", "ppo"), ("a2c", "reinforce")],
)
def test_their_words_alone_are_answered(word, meant):
    with pytest.raises(ValueError) as caught:
        tether.policy_loss(**padded_batch(), objective=word)
    assert str(caught.value).endswith(f', got "{word}". Did you mean {meant}?')


def test_the_caller_has_the_last_word():
    batch = padded_batch()
    given = {"ratio_high": 1.05, "aggregation": "token_sum"}
    expected = evaluated(batch, objective="cispo", ratio_low=0.8, **given)
    assert_same_bits(evaluated(batch, objective="verl.cispo", **given), expected)
    weights = {"kl_mask": {"high": 0.01}, "truncated_importance": {}}
    out = evaluated(batch, objective="verl.dppo_kl", weights=weights)
    weights = {"kl_mask": {"low": 0.2, "high": 0.01}, "truncated_importance": {}}
    expected = evaluated(batch, objective="dppo_kl", ratio_high=3, weights=weights)
    assert_same_bits(out, expected)


@pytest.mark.parametrize("function", ["policy_loss", "policy_token_losses", "local_counts"])
def test_an_unknown_one_lists_the_others(function):
    with pytest.raises(ValueError) as caught:
        getattr(tether, function)(**padded_batch(), objective="verl.gspoo")
    known = ", ".join(tether.dialects())
    assert str(caught.value) == (
        f'{function}: objective must be one of {known}, got "verl.gspoo". Did you mean verl.gspo?'
    )


def test_from_hidden_states():
    hidden = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
    targets = torch.tensor([[1, 2, 3], [4, 5, 6]])
    batch = {"advantages": torch.tensor([1.0, -1.0]), "response_mask": torch.ones(2, 3)}
    logps = tether.linear_token_logps(hidden, weight, targets).logps
    old = {"old_logps": logps + 0.3}
    for name in ("verl.cispo", "verl.dppo_kl", "trl.vespo"):
        out = tether.linear_policy_loss(hidden, weight, targets, objective=name, **batch, **old)
        loss = tether.policy_loss(logps, objective=name, **batch, **old).loss
        torch.testing.assert_close(out.loss, loss, rtol=1e-6, atol=1e-6)
