"""tether in the classes of OpenRLHF 0.11.2, beside its own in place. Skipped without OpenRLHF."""

import importlib.util
import itertools
import pickle
import sys

import pytest
import torch

if importlib.util.find_spec("openrlhf") is None:
    pytest.skip("could not import 'openrlhf'", allow_module_level=True)

import openrlhf_trainers  # noqa: F401  (with stand-ins for what OpenRLHF's losses do not call)
import tether
import tether.openrlhf as adapter
from tether import _peer_batch

TOLERANCES = {torch.float64: (1e-12, 1e-14), torch.float32: (2e-6, 1e-6)}
LEVELS = [
    ("off", "mask", "ratio", (0.5, 5.0)),
    ("token", "clip", "ratio", (0.75, 1.25)),
    ("token", "mask", "ratio", (0.75, 1.25)),
    ("token", "mask", "binary_kl", (0.0, 0.01)),
    ("token", "mask", "tv", (0.0, 0.05)),
    ("seq", "mask", "ratio", (0.9, 1.1)),
    ("seq", "mask", "binary_kl", (0.0, 0.01)),
    ("seq", "mask", "tv", (0.0, 0.04)),
]
STEPS = {
    "batch": {},
    "step": {"dp_size": 2, "batch_num_tokens": 61.0, "global_batch_size": 9.0},
    "no counts": {"dp_size": 2},
    "tokens alone": {"batch_num_tokens": 61.0},
    "sequences alone": {"global_batch_size": 9.0},
}


@pytest.fixture(scope="module")
def losses():
    return sys.modules["openrlhf.models.loss"]


def policy_batch(seed, dtype=torch.float64):
    """Six answers of up to nine tokens, one of them empty."""
    generator = torch.Generator().manual_seed(seed)

    def normal():
        return torch.randn(6, 9, generator=generator, dtype=torch.float64).to(dtype)

    old = -normal().abs() - 0.25
    mask = torch.arange(9) < torch.tensor([9, 4, 0, 7, 1, 6])[:, None]
    return {
        "log_probs": old + 0.5 * normal(),
        "old_log_probs": old,
        "advantages": normal(),
        "action_mask": mask,
        "rollout_log_probs": old - 0.3 * normal(),
    }


def outcomes(name, settings, batch, leaves=1, **step):
    """Results and gradient of OpenRLHF's class and of ours, and whether ours is ours."""
    found = []
    for patched in (False, True):
        if patched:
            adapter.patch()
        try:
            loss = sys.modules["openrlhf.models"].__dict__[name](**settings)
        finally:
            adapter.unpatch()
        assert (type(loss) is adapter._OURS.get(name)) == patched
        arrays = list(batch.values())
        inputs = [each.clone().requires_grad_() for each in arrays[:leaves]]
        out = loss(*inputs, *arrays[leaves:], **step)
        out = out if isinstance(out, tuple) else (out,)
        found.append((*out, *torch.autograd.grad(out[0], inputs)))
    return found


def assert_same(own, ours, dtype):
    rtol, atol = TOLERANCES[dtype]
    assert len(own) == len(ours)
    for theirs, mine in zip(own, ours, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            close = {"rtol": rtol, "atol": atol} if mine.dim() else {"rtol": rtol, "atol": 1e-7}
            torch.testing.assert_close(mine, theirs, check_dtype=mine.dim() > 0, **close)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("level", LEVELS, ids=lambda level: "-".join(level[:3]))
@pytest.mark.parametrize("kind", ["ppo", "gspo"])
def test_policy_losses_equal_openrlhf(kind, level, step, dtype):
    for dual_clip, by_token in itertools.product((None, 1.5), (True, False)):
        settings = {
            "clip_eps_low": 0.15,
            "clip_eps_high": 0.28,
            "dual_clip": dual_clip,
            "token_level_loss": by_token,
            "policy_loss_type": kind,
        }
        names = ("level", "mode", "gating", "threshold")
        settings |= {f"is_correction_{k}": each for k, each in zip(names, level, strict=True)}
        assert_same(*outcomes("PolicyLoss", settings, policy_batch(0, dtype), **step), dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_beyond_the_clamp(dtype):
    batch = policy_batch(0, dtype)
    batch["old_log_probs"][0, :4] -= 25
    batch["old_log_probs"][3, :4] += 25
    for sign in (1, -1):
        batch["advantages"] = sign * batch["advantages"].abs()
        assert_same(*outcomes("PolicyLoss", {"dual_clip": None}, batch), dtype)


def test_it_is_tethers_loss_that_runs(monkeypatch):
    seen = []

    def counted(**settings):
        seen.append(settings["objective"])
        return tether.policy_loss(**settings)

    monkeypatch.setattr(_peer_batch, "policy_loss", counted)
    for kind in ("ppo", "gspo"):
        outcomes("PolicyLoss", {"policy_loss_type": kind}, policy_batch(0))
    assert seen == ["ppo", "gspo"]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize("clip_eps", [None, 0.2])
def test_value_losses_equal_openrlhf(clip_eps, by_token, step, dtype):
    batch = policy_batch(3, dtype)
    del batch["rollout_log_probs"]
    settings = {"clip_eps": clip_eps, "token_level_loss": by_token}
    assert_same(*outcomes("ValueLoss", settings, batch, **step), dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.2}, {"ipo": True}])
def test_preference_losses_equal_openrlhf(settings, dtype):
    generator = torch.Generator().manual_seed(0)
    batch = {
        name: (-20 * torch.rand(5, generator=generator, dtype=torch.float64)).to(dtype)
        for name in ("chosen", "rejected", "reference_chosen", "reference_rejected")
    }
    assert_same(*outcomes("DPOLoss", {"beta": 0.1, **settings}, batch, leaves=2), dtype)


def test_patches_are_taken_back_and_checks_stay(losses, monkeypatch):
    own = losses.PolicyLoss
    adapter.patch()
    adapter.patch()
    try:
        assert losses.PolicyLoss is sys.modules["openrlhf.models"].PolicyLoss is not own
        assert issubclass(losses.PolicyLoss, own)
        with pytest.raises(ValueError, match="is_correction_level must be off/token/seq"):
            losses.PolicyLoss(is_correction_level="turn")
        batch = policy_batch(0)
        with pytest.raises(ValueError, match="Invalid policy loss type"):
            losses.PolicyLoss(policy_loss_type="x")(
                *(
                    batch[name]
                    for name in ("log_probs", "old_log_probs", "advantages", "action_mask")
                )
            )
        copied = pickle.loads(pickle.dumps(losses.PolicyLoss(0.1)))
        assert type(copied) is losses.PolicyLoss and copied.clip_eps_low == 0.1
    finally:
        adapter.unpatch()
    assert losses.PolicyLoss is sys.modules["openrlhf.models"].PolicyLoss is own
    monkeypatch.setattr("tether._trainers.version_of", lambda name: "0.12.0")
    with pytest.raises(RuntimeError) as caught:
        adapter.patch()
    assert str(caught.value) == "tether.openrlhf: openrlhf must be 0.11.2, got 0.12.0"
