"""tether against ms-swift's own GRPO loss, as recorded by tests/peers/record_swift.py.

The two differ on purpose in FIPO where the mask has holes: there ms-swift's future ages by slots,
tether's by tokens.
"""

import math

import pytest
import tether
import torch
from recordings import (
    assert_equal,
    batch_of,
    has_empty_rows,
    named,
    policy_loss,
    recording,
    sides,
    tensor,
)

GRPO = recording("swift_grpo")
CASES = [case for case in GRPO["cases"] if "holes" not in case["name"]]
(HOLES,) = [case for case in GRPO["cases"] if "holes" in case["name"]]
TEACHER = recording("swift_teacher")["cases"]
AGGREGATIONS = {
    "grpo": "sequence_mean_token_mean",
    "sapo": "sequence_mean_token_mean",
    "bnpo": "token_mean",
    "dr_grpo": "sequence_sum_over_constant",
    "dapo": "token_mean",
    "cispo": "token_mean",
    "fipo": "token_mean",
}
LEVELS = {"token": "token", "sequence": "sequence_mean", "sequence_token": "sequence_token"}


def surrogate(settings):
    if settings["loss_type"] == "sapo":
        return {"objective": "sapo", "tau_pos": settings["tau_pos"], "tau_neg": settings["tau_neg"]}
    if settings["loss_type"] == "cispo":
        return {"objective": "cispo", "ratio_high": settings["epsilon_high"]}
    epsilons = {name: settings[name] for name in ("epsilon_low", "epsilon_high")}
    dual_clip = settings["delta"] or math.inf
    level = LEVELS[settings["importance_sampling_level"]]
    return {"objective": "ppo", "level": level, "dual_clip": dual_clip} | epsilons


def fipo(case):
    """Its weights; what ms-swift calls delta is a bound of the future's ratios too."""
    settings, batch = case["settings"], batch_of(case)
    clip, alone = settings["fipo_clip_range"], settings["fipo_clip_high_only"]
    return tether.batch_weights(
        "fipo",
        batch["logps"],
        batch["response_mask"],
        old_logps=batch["old_logps"],
        advantages=batch["advantages"],
        gamma=settings["fipo_gamma"],
        low=1 if alone else 1 - clip,
        high=1 + clip,
        ratio_high=settings["delta"] or math.inf,
        safe_ratio=settings["fipo_safety_threshold"],
    )


def engine_weights(settings):
    """The weights of the rollout; a sequence has the geometric mean, and those that a mask keeps
    have their tokens' ratios."""
    mode, high = (settings[f"rollout_importance_sampling_{x}"] for x in ("mode", "threshold"))
    return {
        None: {},
        "token_truncate": {"truncated_importance": {"high": high}},
        "token_mask": {"masked_importance": {"low": 0, "high": high}},
        "sequence_truncate": {"truncated_importance": {"high": high, "level": "sequence_mean"}},
        "sequence_mask": {
            "truncated_importance": {"high": math.inf},
            "ratio_gate": {"low": 0, "high": high, "level": "sequence_mean"},
        },
    }[mode]


def off_policy(case):
    """The weight of sequences that ms-swift's mask loses, and the tokens that it keeps."""
    bound, batch = case["settings"]["off_policy_sequence_mask_delta"], batch_of(case)
    mask = batch["response_mask"]
    if bound is None:
        return {}, int(mask.sum())
    moved = ((batch["old_logps"] - batch["logps"]) * mask).sum(1) / mask.sum(1).clamp(min=1)
    left = (moved > bound) & (batch["advantages"] < 0)
    return {"opsm": {"high": bound}}, int(mask[~left].sum())


def settings_of(case):
    """The step's tokens divide what ms-swift takes over the window, its ranks multiply it."""
    settings = case["settings"]
    mask = torch.tensor(case["response_mask"])
    of_answers, tokens = off_policy(case)
    weights, changes = engine_weights(settings) | of_answers, {}
    if "token_mask" in weights or settings["beta"]:  # ms-swift's weights are of the penalty too
        changes["kl_weights"] = kl_weights(case)
    if settings["loss_type"] == "fipo":
        changes["token_weights"] = fipo(case)
    windowed = settings["loss_type"] in ("dapo", "cispo", "fipo")
    step = settings["step"]
    normalizer = tether.Normalizer(
        policy=step["items"] if windowed else tokens,
        sequences=len(mask),
        world_size=step["processes"] if windowed else 1,
    )
    return (
        surrogate(settings)
        | changes
        | {
            "beta": settings["beta"],
            "aggregation": AGGREGATIONS[settings["loss_type"]],
            "constant": settings["max_completion_length"],
            "normalizer": normalizer,
            "weights": weights or None,
        }
    )


def kl_weights(case):
    settings, batch = case["settings"], batch_of(case)
    ratio = (batch["old_logps"] - batch["rollout_logps"]).exp()
    if settings["rollout_importance_sampling_mode"] is None:
        return torch.ones_like(ratio)
    assert settings["rollout_importance_sampling_mode"] == "token_mask"
    return ratio * (ratio <= settings["rollout_importance_sampling_threshold"])


@named(CASES)
def test_the_loss_equals_swift(case):
    assert_equal(case, *policy_loss(case, **settings_of(case)))


def test_a_hole_of_the_mask_ages_swifts_future_and_not_tethers():
    """ms-swift's weights are tether's of a mask without holes whose tokens there have not moved."""
    loss, gradient = policy_loss(HOLES, **settings_of(HOLES))
    mask = batch_of(HOLES)["response_mask"]
    filled = mask.flip(1).cummax(1).values.flip(1)
    assert (filled != mask).any()
    old_logps = torch.where(mask > 0, tensor(HOLES["old_logps"]), tensor(HOLES["logps"]))
    weights = fipo(HOLES | {"response_mask": filled.tolist(), "old_logps": old_logps.tolist()})
    settings, step = surrogate(HOLES["settings"]), HOLES["settings"]["step"]
    normalizer = tether.Normalizer(policy=step["items"], world_size=step["processes"])
    settings |= {"aggregation": "token_mean", "normalizer": normalizer, "token_weights": weights}
    assert_equal(HOLES, *policy_loss(HOLES, **settings))
    assert abs(loss.item() / HOLES["loss"] - 1) > 1e-3
    settings["token_weights"] = fipo(HOLES)
    assert torch.equal(gradient, policy_loss(HOLES, **settings)[1])


def test_some_of_fipos_weights_are_clipped_and_some_safe():
    cases = [case for case in CASES if case["settings"]["loss_type"] == "fipo"]
    weights = {case["name"]: fipo(case)[torch.tensor(case["response_mask"]) > 0] for case in cases}
    wide = weights["fipo, clipped on both sides"]
    assert {wide.min().item(), wide.max().item()} == {0.7, 1.3}
    assert ((wide > 0.7) & (wide < 1.3)).sum() > 3
    for case in cases:
        other = case["settings"] | {"fipo_gamma": 0.25}
        assert not torch.equal(fipo(case), fipo(case | {"settings": other}))
        risky = case["settings"] | {"fipo_safety_threshold": 1.0}
        assert not torch.equal(fipo(case), fipo(case | {"settings": risky}))


# ---- a teacher -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", [c for c in TEACHER if c["settings"]["loss"] == "rlsd"], ids=lambda c: c["name"]
)
def test_rlsd_equals_swift(case):
    """ms-swift shares out the advantage; tether weighs the surrogate. Where only bad answers are
    shared out, the others' teacher is the policy itself."""
    settings, batch = case["settings"], batch_of(case)
    teacher = batch["ref_logps"]
    if settings["negative_only"]:
        teacher = torch.where(batch["advantages"][:, None] < 0, teacher, batch["logps"])
    weight = {"mix": settings["mix"], "epsilon": settings["epsilon"]}
    reweighted = tensor(case["reweighted"])
    expected = policy_loss(case, objective="ppo", advantages=reweighted)
    loss, gradient = policy_loss(
        case, objective="ppo", ref_logps=teacher, weights={"self_distillation": weight}
    )
    torch.testing.assert_close(loss, expected[0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-12, atol=1e-15)
    assert (reweighted != batch["advantages"][:, None] * batch["response_mask"]).any()


@pytest.mark.parametrize(
    "case", [c for c in TEACHER if c["settings"]["loss"] == "sdar"], ids=lambda c: c["name"]
)
def test_sdar_equals_swift(case):
    """A penalty of k1 to the teacher with weights below 0; rows without tokens count."""
    settings, batch = case["settings"], batch_of(case)
    gate = torch.sigmoid(settings["gate_beta"] * (batch["ref_logps"] - batch["logps"]))
    mode = settings["loss_agg_mode"].replace("seq", "sequence").replace("-", "_")
    mask = batch["response_mask"]
    loss, gradient = policy_loss(
        case,
        objective="ppo",
        advantages=torch.zeros(len(mask), dtype=torch.float64),
        aggregation=mode,
        beta=1,
        kl_estimator="k1",
        kl_gradient="k1",
        kl_weights=-gate,
        allow_biased_gradient=True,
        normalizer=tether.Normalizer(policy=int(mask.sum()), sequences=len(mask)),
    )
    assert_equal(case, loss, gradient)


# ---- what is recorded ----------------------------------------------------------------------------


def test_the_recording_covers_what_differs():
    assert GRPO["ms-swift"] == "4.6.0"
    settings = [case["settings"] for case in CASES]
    assert {each["loss_type"] for each in settings} == set(AGGREGATIONS)
    assert {each["importance_sampling_level"] for each in settings} == set(LEVELS)
    assert len({each["rollout_importance_sampling_mode"] for each in settings}) == 5
    assert len(sides(CASES, 0.8, 1.28)) == 6 and has_empty_rows(CASES)
    cut = [case for case in CASES if case["settings"]["off_policy_sequence_mask_delta"]]
    assert len(cut) == 3
    assert all(0 < off_policy(case)[1] < sum(map(sum, case["response_mask"])) for case in cut)
