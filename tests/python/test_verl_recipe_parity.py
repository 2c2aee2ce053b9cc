"""tether against verl's normalised weights and SPPO of its recipes, as recorded by
tests/peers/record_verl_recipe.py."""

import tether
import torch
from recordings import assert_equal, batch_of, named, policy_loss, recording, tensor

NORMALIZED = recording("verl_normalized")
SPPO = recording("verl_sppo")


@named(NORMALIZED["cases"])
def test_normalized_importance_equals_verl(case):
    batch, settings = batch_of(case), dict(case["settings"])
    settings["level"] = {"token": "token", "sequence": "sequence_sum"}[settings["level"]]
    low, high = settings.get("low"), settings["high"]
    if low is not None:
        settings["beyond"] = "masked"
    names = ("logps", "response_mask", "old_logps", "rollout_logps")
    arrays = {name: batch[name] for name in names}
    weights = tether.batch_weights("normalized_importance", **arrays, **settings)
    active = batch["response_mask"] > 0
    expected = tensor(case["weights"])
    torch.testing.assert_close(weights[active], expected[active], rtol=1e-12, atol=0)
    gaps = batch["old_logps"] - batch["rollout_logps"]
    if settings["level"] == "sequence_sum":
        gaps = (gaps * active).sum(1, keepdim=True).expand_as(gaps)
    ratios = gaps.exp()[active]
    assert (ratios < high).any() and ((ratios > high).any() or high == 2)
    if low is not None:
        kept = (ratios >= low) & (ratios <= high)
        assert torch.equal(weights[active] != 0, kept) and (ratios < low).any() and kept.any()
    assert abs(ratios.clamp(max=high).mean() - 1) > 1e-3  # the mean that they are divided by


@named(SPPO["cases"])
def test_sppo_equals_verls_recipe(case):
    eta = case["settings"]["eta"]
    assert_equal(case, *policy_loss(case, objective="sppo", eta=eta))


def test_the_recordings_are_of_known_versions():
    assert NORMALIZED["verl"] == "0.9.1" and len(SPPO["verl-recipe"]) == 40
