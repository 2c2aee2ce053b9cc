"""Steps of OpenRLHF's own trainers with its losses and with ours. Skipped without OpenRLHF."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("openrlhf") is None:
    pytest.skip("could not import 'openrlhf'", allow_module_level=True)

import openrlhf_trainers as trainers
import tether.openrlhf as adapter
from tether import _peer_batch

STEPS = 5


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    with trainers.on_the_cpu(monkeypatch):
        yield


def both(run, *arguments, **settings):
    """With OpenRLHF's losses and with ours."""
    theirs = run(*arguments, **settings)
    adapter.patch()
    try:
        return theirs, run(*arguments, **settings)
    finally:
        adapter.unpatch()


def assert_same(theirs, ours, start):
    parameters, logs = theirs
    before = torch.nn.utils.parameters_to_vector(start.parameters()).detach()
    assert (parameters - before).abs().max() > 1e-2
    torch.testing.assert_close(ours[0], parameters, rtol=0, atol=2e-6)
    for mine, own in zip(ours[1], logs, strict=True):
        assert mine == pytest.approx(own, rel=2e-6, abs=2e-6)


ACTORS = {
    "ppo": {},
    "dual clip": {"dual_clip": 1.05},
    "rows": {"loss_agg_mode": "seq-mean"},
    "gspo": {"policy_loss_type": "gspo", "eps_clip_low_high": (0.02, 0.03)},
    "gspo of the engine": {
        "policy_loss_type": "gspo",
        "is_correction_level": "token",
    },
    "tokens of the engine": {
        "is_correction_level": "token",
        "is_correction_mode": "clip",
        "is_correction_threshold": (0.8, 1.1),
    },
    "answers of the engine": {
        "is_correction_level": "seq",
        "is_correction_threshold": (0.9, 1.1),
    },
}


@pytest.mark.parametrize("name", ACTORS)
def test_steps_of_the_actor(name, tmp_path, monkeypatch):
    seen = []
    loss = _peer_batch.policy_loss
    counted = lambda *a, **b: seen.append(b["objective"]) or loss(*a, **b)  # noqa: E731
    monkeypatch.setattr(_peer_batch, "policy_loss", counted)
    theirs, ours = both(trainers.ppo_actor, tmp_path, STEPS, **ACTORS[name])
    assert len(seen) == 2 * trainers.MICRO_BATCHES * STEPS
    assert_same(theirs, ours, trainers.actor(0, tmp_path))
    assert any(each["ppo_clip_ratio"] > 0 for each in theirs[1])
    if "is_correction_level" in ACTORS[name] and not name.startswith("gspo"):
        assert theirs[1][0]["is_filter_ratio"] > 0


def test_steps_of_the_critic(tmp_path):
    theirs, ours = both(trainers.ppo_critic, tmp_path, STEPS)
    assert_same(theirs, ours, trainers.critic(tmp_path))


@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.2}, {"ipo_enable": True}])
def test_steps_of_dpo(settings, tmp_path):
    theirs, ours = both(trainers.dpo, tmp_path, STEPS, **settings)
    assert len(theirs[1]) == trainers.MICRO_BATCHES * STEPS
    assert_same(theirs, ours, trainers.actor(0, tmp_path))
