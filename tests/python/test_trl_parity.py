"""tether.policy_loss against TRL's own GRPO loss, as recorded by tests/peers/record_trl.py."""

import json
import pathlib

import pytest
import tether
import torch

RECORDING = json.loads(
    (pathlib.Path(__file__).parent.parent / "golden/peers/trl_grpo.json").read_text()
)
AGGREGATIONS = {
    "grpo": "sequence_mean_token_mean",
    "bnpo": "token_mean",
    "dr_grpo": "sequence_sum_over_constant",
    "dapo": "token_mean",
    "luspo": "sequence_mean_token_sum",
    "cispo": "token_mean",
    "sapo": "sequence_mean_token_mean",
    "vespo": "token_mean",
}


def normalizer(settings, mask):
    """TRL's denominators. It counts rows without tokens, and divides by the accumulation steps."""
    tokens, steps = int(mask.sum()), settings["accumulation_steps"]
    if settings["loss_type"] in ("dapo", "cispo", "vespo"):
        items = tokens if settings["num_items_in_batch"] is None else settings["num_items_in_batch"]
        policy = items * steps / settings["steps_per_generation"]
        return tether.Normalizer(policy=policy, world_size=settings["processes"])
    return tether.Normalizer(policy=tokens * steps, sequences=len(mask) * steps)


def surrogate(settings):
    """TRL's cispo weighs each token's own logp, at the level of sequences too; the temperatures of
    its sapo are float32, whatever the losses are."""
    sequence = settings["importance_sampling_level"] == "sequence"
    if settings["loss_type"] == "sapo":
        temperatures = [settings[f"sapo_temperature_{sign}"] for sign in ("pos", "neg")]
        tau_pos, tau_neg = torch.tensor(temperatures, dtype=torch.float32).tolist()
        return {"objective": "sapo", "tau_pos": tau_pos, "tau_neg": tau_neg}
    if settings["loss_type"] == "cispo":
        level = "sequence_token" if sequence else "token"
        return {"objective": "cispo", "level": level, "ratio_high": settings["epsilon_high"]}
    if settings["loss_type"] == "vespo":
        names = ("k_pos", "lambda_pos", "k_neg", "lambda_neg")
        weight = {name: settings[f"vespo_{name}"] for name in names}
        return {"objective": "vespo", "weights": {"vespo": weight}}
    options = {} if settings["delta"] is None else {"dual_clip": settings["delta"]}
    return options | {
        "level": "sequence_mean" if sequence else "token",
        "epsilon_low": settings["epsilon_low"],
        "epsilon_high": settings["epsilon_high"],
    }


@pytest.mark.parametrize("case", RECORDING["cases"], ids=lambda case: case["name"])
def test_value_and_gradient_equal_trl(case):
    def tensor(name):
        return None if case[name] is None else torch.tensor(case[name], dtype=torch.float64)

    settings = case["settings"]
    mask = torch.tensor(case["response_mask"])
    logps = tensor("logps").requires_grad_()
    loss, _ = tether.policy_loss(
        logps,
        tensor("advantages"),
        mask,
        old_logps=tensor("old_logps"),
        ref_logps=tensor("ref_logps"),
        aggregation=AGGREGATIONS[settings["loss_type"]],
        constant=settings["max_completion_length"],
        normalizer=normalizer(settings, mask),
        beta=settings["beta"],
        kl_correction="ratio" if settings["use_bias_correction_kl"] else "none",
        **surrogate(settings),
    )
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-12, abs=1e-14)
    torch.testing.assert_close(logps.grad, tensor("dlogps"), rtol=1e-12, atol=1e-15)


def test_the_recording_covers_what_differs():
    cases = RECORDING["cases"]
    assert RECORDING["trl"].startswith("1.16.")
    assert {case["settings"]["loss_type"] for case in cases} == set(AGGREGATIONS)
    assert {
        case["settings"]["loss_type"]
        for case in cases
        if case["settings"]["importance_sampling_level"] == "sequence"
    } == {"grpo", "bnpo", "dapo", "luspo", "cispo"}
    assert any(case["settings"]["use_bias_correction_kl"] for case in cases)
    assert any(case["settings"]["beta"] > 0 and case["ref_logps"] for case in cases)
    assert any(case["settings"]["delta"] for case in cases)
    assert any(
        case["settings"]["epsilon_low"] != case["settings"]["epsilon_high"] for case in cases
    )
    assert any(not any(row) for case in cases for row in case["response_mask"])
