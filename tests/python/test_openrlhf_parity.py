"""tether against OpenRLHF's own losses, as recorded by tests/peers/record_openrlhf.py.

The two differ on purpose beyond a log-ratio of +-20 and a KL estimate of 10, where OpenRLHF clamps
them and its gradient ends.
"""

import math

import pytest
import tether
import torch
from recordings import (
    FLOAT32,
    assert_equal,
    batch_of,
    has_empty_rows,
    named,
    policy_loss,
    recording,
    sides,
    tensor,
    token_counts,
)

POLICY = recording("openrlhf_policy")
CASES = [case for case in POLICY["cases"] if "beyond" not in case["name"]]
(BEYOND,) = [case for case in POLICY["cases"] if "beyond" in case["name"]]
KL = recording("openrlhf_kl")["cases"]
VALUE = recording("openrlhf_value")["cases"]
PREFERENCE = recording("openrlhf_preference")["cases"]


def normalizer(step, mask):
    counts = token_counts(mask)
    policy = step.get("batch_num_tokens", counts["policy"])
    sequences = step.get("global_batch_size", counts["sequences"])
    ranks = step.get("dp_size", 1)
    return tether.Normalizer(policy=policy, sequences=sequences, world_size=ranks)


def aggregation(options):
    of_samples = options.get("policy_loss_type") == "gspo" or not options.get(
        "token_level_loss", True
    )
    return "sequence_mean_token_mean" if of_samples else "token_mean"


def weights(options):
    """OpenRLHF's correction: what is outside the gate has weight 0 and is counted, what is inside
    keeps its own importance weight. Gates of tether leave the mask, so the counts are passed."""
    level, mode, gating = (options.get(f"is_correction_{x}") for x in ("level", "mode", "gating"))
    if level in (None, "off"):
        return {}
    low, high = options["is_correction_threshold"]
    if (mode, level, gating) == ("clip", "token", "ratio"):
        return {"truncated_importance": {"low": low, "high": high}}
    if (level, gating) == ("token", "ratio"):
        return {"masked_importance": {"low": low, "high": high}}
    gate = {"low": low, "high": high} if gating == "ratio" else {"high": high}
    gate |= {"level": {"token": "token", "seq": "sequence_mean"}[level]}
    name = {"ratio": "ratio_gate", "binary_kl": "binary_kl_gate", "tv": "tv_gate"}[gating]
    return {name: gate, "truncated_importance": {"high": math.inf}}


def settings_of(case):
    options, step = case["settings"]["options"], case["settings"]["step"]
    mask = torch.tensor(case["response_mask"])
    changes = {
        "objective": "openrlhf.ppo",
        "epsilon_low": options["clip_eps_low"],
        "epsilon_high": options["clip_eps_high"],
        "dual_clip": options.get("dual_clip") or math.inf,
        "aggregation": aggregation(options),
        "normalizer": normalizer(step, mask),
    }
    if options.get("policy_loss_type") == "gspo":
        changes |= {"objective": "openrlhf.gspo"}
        if options.get("is_correction_level", "off") != "off":
            changes |= {"old_logps": tensor(case["rollout_logps"])}
    elif weights(options):
        changes |= {"weights": weights(options), "row_tokens": mask.sum(1)}
    return changes


@named(CASES)
def test_the_policys_loss_equals_openrlhf(case):
    assert_equal(case, *policy_loss(case, **settings_of(case)))


def test_beyond_a_log_ratio_of_20_only_tether_has_a_gradient():
    _, gradient = policy_loss(BEYOND, **settings_of(BEYOND))
    log_ratio = tensor(BEYOND["logps"]) - tensor(BEYOND["old_logps"])
    beyond, peer = log_ratio.abs() > 20, tensor(BEYOND["dlogps"])
    assert beyond.sum() == 2
    torch.testing.assert_close(gradient[~beyond], peer[~beyond], rtol=1e-12, atol=0)
    assert (peer[beyond] == 0).all()
    expected = -log_ratio.exp() * tensor(BEYOND["advantages"]) / 5
    torch.testing.assert_close(gradient[beyond], expected[beyond], rtol=1e-12, atol=0)


# ---- estimates of a KL divergence, which are float32 there ---------------------------------------


def penalty(case):
    """The penalty alone. The unbiased gradient is k2's, with old_logps weighed by the ratio up to
    10."""
    settings = case["settings"]
    estimator, unbiased = settings["kl_estimator"], settings["unbiased_gradient"]
    return policy_loss(
        case,
        objective="openrlhf.ppo",
        advantages=torch.zeros(len(case["logps"]), dtype=torch.float64),
        beta=1,
        kl_estimator=estimator,
        kl_gradient="k2" if unbiased else estimator,
        kl_correction="detached_ratio" if settings["old"] else "none",
        kl_ratio_high=10,
        allow_biased_gradient=True,
    )


@named(KL)
def test_the_penalty_equals_openrlhf(case):
    loss, gradient = penalty(case)
    if case["settings"]["old"]:
        loss, _ = penalty(case | {"settings": case["settings"] | {"old": False}})
    assert_equal(case, loss, gradient, **FLOAT32)


def test_the_ratio_weighs_openrlhfs_gradient_and_tethers_value_too():
    cases = [case for case in KL if case["settings"]["old"]]
    assert len(cases) == 4
    for case in cases:
        batch = batch_of(case)
        ratio = (batch["logps"] - batch["old_logps"]).exp().clamp(max=10)
        kl = getattr(tether.reference, case["settings"]["kl_estimator"])
        terms = ratio * kl(batch["ref_logps"] - batch["logps"])
        weighed = terms[batch["response_mask"] > 0].mean().item()
        assert penalty(case)[0].item() == pytest.approx(weighed, rel=1e-12)
        assert abs(weighed / case["loss"] - 1) > 1e-2


# ---- the value head, and pairs -------------------------------------------------------------------


@named(VALUE)
def test_the_value_loss_equals_openrlhf(case):
    options, step = case["settings"]["options"], case["settings"]["step"]
    mask = torch.tensor(case["response_mask"])
    values = tensor(case["values"]).requires_grad_()
    clip = options.get("clip_eps")
    loss, _ = tether.value_loss(
        values,
        tensor(case["returns"]),
        mask,
        old_values=tensor(case["old_values"]) if clip else None,
        aggregation=aggregation(options),
        normalizer=normalizer(step, mask),
        **({"clip_range": clip} if clip else {}),
    )
    loss.backward()
    assert_equal(case, loss, values.grad, "values")


def preference(case):
    """OpenRLHF's IPO is of sums. Its losses of rewards are DPO's of log-probabilities of whole
    answers without a reference."""
    loss, options = case["settings"]["loss"], case["settings"]["options"]
    if loss != "DPOLoss":
        baselines = torch.cat([tensor(case["margins"]), torch.zeros(5, dtype=torch.float64)])
        settings = {"objective": "dpo", "reference": False, "beta": 1}
        return settings | {"baselines": baselines if options["margin"] else None}
    if options.get("ipo"):
        return {"objective": "ipo", "beta": options["beta"], "score": "sum"}
    if "label_smoothing" not in options:
        return {"objective": "dpo", "beta": options["beta"]}
    return {"objective": "cdpo"} | options


@named(PREFERENCE)
def test_the_loss_of_pairs_equals_openrlhf(case):
    logps = tensor(case["logps"]).requires_grad_()
    loss, _ = tether.preference_loss(logps, tensor(case["ref_logps"]), **preference(case))
    loss.backward()
    assert_equal(case, loss, logps.grad)


# ---- what is recorded ----------------------------------------------------------------------------


def test_the_recording_covers_what_differs():
    assert POLICY["openrlhf"] == "0.11.2"
    options = [case["settings"]["options"] for case in CASES]
    for name in ("level", "mode", "gating"):
        assert len({each.get(f"is_correction_{name}", "off") for each in options}) >= 3 - (
            name == "mode"
        )
    assert has_empty_rows(CASES)
    dual = [case for case in CASES if case["settings"]["options"].get("dual_clip")]
    assert len(sides(dual, 0.8, 1.5)) == 6
