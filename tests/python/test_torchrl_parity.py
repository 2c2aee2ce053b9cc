"""tether.policy_loss against torchrl's GRPO and CISPO, as recorded by
tests/peers/record_torchrl_policy.py."""

import tether
from recordings import assert_equal, batch_of, has_empty_rows, named, policy_loss, recording, sides

RECORDING = recording("torchrl_policy")


def settings_of(case):
    """prompt_mean is over rows, those without tokens too."""
    settings = case["settings"]
    low, high = settings["clip_epsilon"]
    mask = batch_of(case)["response_mask"]
    by_row = settings["aggregation"] == "prompt_mean"
    return {
        "objective": f"torchrl.{settings['loss']}",
        "epsilon_low": low,
        "epsilon_high": high,
        "aggregation": "sequence_mean_token_mean" if by_row else "token_mean",
        "normalizer": tether.Normalizer(policy=int(mask.sum()), sequences=len(mask)),
    }


@named(RECORDING["cases"])
def test_value_and_gradient_equal_torchrl(case):
    assert_equal(case, *policy_loss(case, **settings_of(case)))


def test_the_recording_covers_what_differs():
    assert RECORDING["torchrl"] == "0.14.1"
    assert len(sides(RECORDING["cases"], 0.8, 1.28)) == 6 and has_empty_rows(RECORDING["cases"])
