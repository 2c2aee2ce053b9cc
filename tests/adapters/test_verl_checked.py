"""tether.testing on verl's own losses: what it finds. Skipped without verl."""

import pytest
import torch

pytest.importorskip("verl")

from tether.testing import Traits, check_loss
from verl.trainer.ppo import core_algos
from verl_batches import actor_config

AGGREGATIONS = {
    "token-mean": "token_mean",
    "token-sum": "token_sum",
    "seq-mean-token-sum": "sequence_mean_token_sum",
    "seq-mean-token-sum-norm": "sequence_sum_over_constant",
    "seq-mean-token-mean": "sequence_mean_token_mean",
}


def step_of(normalizer):
    """The counts of a step as verl's engine gives them."""
    if normalizer is None:
        return {}
    return {
        "dp_size": normalizer.world_size,
        "batch_num_tokens": normalizer.policy,
        "global_batch_size": normalizer.sequences,
    }


def vanilla(mode, **settings):
    def loss(logps, advantages, response_mask, old_logps, normalizer=None):
        config = actor_config(step_of(normalizer), **settings)
        return core_algos.compute_policy_loss_vanilla(
            old_logps, logps, advantages, response_mask, mode, config
        )

    return loss


def checked(mode, objective="verl.vanilla", loss=None, **settings):
    options = {"epsilon_low": 0.15, "epsilon_high": 0.28, "aggregation": AGGREGATIONS[mode]}
    loss = loss or vanilla(mode)
    return check_loss(loss, objective, batches=2, skip=["threads"], **options, **settings)


EVERYWHERE = {"poison", "half_precision"}
# The longest row of a micro-batch is its constant; nothing but the empty batch divides by 0.
HORIZON = {"reference_value", "reference_gradient", "padding_right", "padding_left"}
FOUND = {
    "token-mean": EVERYWHERE | {"empty"},
    "token-sum": EVERYWHERE,
    "seq-mean-token-sum": EVERYWHERE | {"empty"},
    "seq-mean-token-sum-norm": EVERYWHERE | {"empty", "fractional_mask"} | HORIZON,
}


@pytest.mark.parametrize("mode", FOUND)
def test_what_is_found(mode):
    report = checked(mode, dual_clip=1.5)
    assert set(report.failed) == FOUND[mode], report
    # Selected from the sum, or multiplied by 0.
    loss_is_sound = mode.startswith("token")
    where = "advantages hold nan: gradient at [0, 0] nan, not -0"
    where = where if loss_is_sound else "logps hold nan: loss nan, not -"
    assert f"[1, 2], masked slots of {where}" in report["poison"].detail


def test_the_mean_of_means_adds_1e_8_to_the_tokens_of_a_row():
    """Of which float32 sees nothing."""
    report = checked("seq-mean-token-mean", dual_clip=1.5)
    assert {"reference_value", "reference_gradient"} < set(report.failed), report
    assert report["reference_value"].detail.startswith("float64")
    narrow = checked("seq-mean-token-mean", dual_clip=1.5, traits=Traits(dtypes=(torch.float32,)))
    assert set(narrow.failed) == EVERYWHERE | {"empty"}, narrow


def test_clamped_log_ratios_lose_their_gradient():
    """Without the dual clip: a bad token beyond e^20 is not brought back."""
    loss = vanilla("token-mean", clip_ratio_c=1e30)
    report = checked("token-mean", "ppo", loss)
    assert set(report.failed) == FOUND["token-mean"] | {"pull_back"}, report
    assert "log-ratio 88, and a gradient of 0" in report["pull_back"].detail


def values_of(mode):
    def loss(values, old_values, returns, response_mask, normalizer=None):
        arrays = (values, returns, old_values, response_mask)
        return core_algos.compute_value_loss(*arrays, 0.3, mode, **step_of(normalizer))

    return loss


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum"])
def test_what_is_found_in_values(mode):
    options = {"clip_range": 0.3, "aggregation": AGGREGATIONS[mode]}
    report = check_loss(values_of(mode), "clipped_squared", batches=2, skip=["threads"], **options)
    assert set(report.failed) == FOUND[mode], report
