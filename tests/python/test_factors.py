"""What multiplies a loss, its counts, masks and what arrives at it, of any size: the CPU's kernels
and the path of other devices give the same finite numbers, and the right ones where they are of the
type."""

import math

import pytest
import tether
import torch
from paths import on_both_paths

INFINITY, NAN = math.inf, math.nan


def assert_alike(one, other, rtol=1e-5):
    for a, b in zip(one, other, strict=True):
        a, b = a.double(), b.double()
        assert a.isfinite().all() and b.isfinite().all()
        assert torch.allclose(a, b, rtol=rtol, atol=1e-36), (a, b)


def batch_of(dtype, advantages, mask=(1.0, 1.0, 1.0, 1.0)):
    # The last two tokens are clipped: too likely and good, too rare and bad.
    logps = torch.tensor([[-0.5, -0.8, -0.1, -3.0]], dtype=dtype)
    gaps = torch.tensor([[0.1, -0.2, 1.0, -1.0]], dtype=dtype)
    return {
        "logps": logps,
        "old_logps": logps - gaps,
        "ref_logps": logps + torch.tensor([[-0.1, 0.3, 0.2, -0.4]], dtype=dtype),
        "rollout_logps": logps + 0.1,
        "entropies": torch.tensor([[0.5, 0.2, 0.1, 0.4]], dtype=dtype),
        "advantages": torch.tensor([advantages], dtype=dtype),
        "response_mask": torch.tensor([mask]),
    }


def loss_of(batch, objective="ppo", **options):
    leaves = [batch[name].clone().requires_grad_() for name in ("logps", "entropies")]
    out = tether.policy_loss(
        objective=objective,
        **batch | {"logps": leaves[0], "entropies": leaves[1]},
        **{"entropy_coef": 0.01} | options,
    )
    return out.loss.detach(), *torch.autograd.grad(out.loss, leaves)


# ---- factors -------------------------------------------------------------------------------------

FACTORS = {
    "a count of 1e-30": {"policy": 1e-30, "kl": 1e-30, "sequences": 1e-30},
    "the smallest count": {"policy": 2.0**-126, "kl": 2.0**-126, "sequences": 2.0**-126},
    "a large count": {"policy": 1e300, "kl": 1e300, "sequences": 1e300, "world_size": 1e290},
    "a large world": {"world_size": 1e240, "scale": 1e10},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("objective", tuple(tether.objectives()))
def test_factors_of_any_size(objective, factors, dtype, monkeypatch):
    normalizer = tether.Normalizer(**FACTORS[factors])
    for sizes in ([1e18, -5e17, 1e18, -2e17], [1e-3, -2.0, 1.0, -1.0]):
        batch = batch_of(dtype, sizes)
        one, other = on_both_paths(
            lambda batch=batch: loss_of(batch, objective, normalizer=normalizer, beta=0.1),
            monkeypatch,
        )
        assert_alike(one, other, 1e-3)
        assert torch.equal(one[1] == 0, other[1] == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", ["token", "sequence_mean"])
def test_factors_that_bring_a_product_back(dtype, level, monkeypatch):
    # -A ratio, times 1e30 / 1e10 / 4: larger than 1e38 on its way alone.
    batch = batch_of(dtype, [1e18] * 4) | {"ref_logps": None}
    batch["old_logps"] = batch["logps"]
    normalizer = tether.Normalizer(1e10, 1e10, 1e10, world_size=1e30)

    def run():
        return loss_of(batch, "linear", level=level, normalizer=normalizer)[:2]

    for loss, dlogps in on_both_paths(run, monkeypatch):
        size = 4e38 if dtype == torch.float64 else torch.finfo(torch.float32).max
        assert loss.item() == pytest.approx(-size, rel=1e-6)
        torch.testing.assert_close(dlogps, torch.full_like(dlogps, -1e38), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["policy_loss", "value_loss", "preference_loss"])
def test_a_loss_that_overflows_float64_is_its_largest_result(name, monkeypatch):
    x = torch.full((2, 1), -1e135, dtype=torch.float64)
    ones, scale = torch.ones(2, 1), 1e30
    step = tether.Normalizer(world_size=scale)

    def run():
        leaf = x.clone().requires_grad_()
        if name == "policy_loss":
            out = tether.policy_loss(leaf, -x[:, 0], ones, objective="reinforce", normalizer=step)
        elif name == "value_loss":
            out = tether.value_loss(leaf, -x, ones, normalizer=step)
        else:
            options = {"objective": "ipo", "reference": False, "world_size": 1e300}
            out = tether.preference_loss(leaf * torch.tensor([[1.0], [2.0]]), None, ones, **options)
        return out.loss.detach(), torch.autograd.grad(out.loss, leaf)[0]

    one, other = on_both_paths(run, monkeypatch)
    assert_alike(one, other)
    assert one[0].abs() >= 9e299


# ---- masks and counts ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_smallest_mask_has_the_whole_gradient(dtype, monkeypatch):
    tiny = 2.0**-126
    batch = batch_of(dtype, [1e18] * 4, mask=(tiny, 0.0, 0.0, 0.0)) | {"ref_logps": None}
    batch["old_logps"] = batch["logps"]

    def run():
        return loss_of(batch, "linear", entropy_coef=0)

    for loss, dlogps, _ in on_both_paths(run, monkeypatch):
        assert loss == -1e18
        assert dlogps[0, 0].item() == pytest.approx(-1e18, rel=1e-6)
        assert (dlogps[0, 1:] == 0).all()


COUNTS = {
    "policy_loss": ("normalizer.policy", lambda x, y: tether.policy_loss(
        x, x[:, 0], y, objective="ppo", normalizer=tether.Normalizer(5e-324)
    )),
    "value_loss": ("normalizer.sequences", lambda x, y: tether.value_loss(
        x, x, y, normalizer=tether.Normalizer(1, sequences=5e-324)
    )),
    "preference_loss": ("pairs", lambda x, y: tether.preference_loss(x, x, y, pairs=5e-324)),
    "dpo_loss": ("tokens", lambda x, y: tether.dpo_loss(x, x, y, pairs=1, tokens=5e-324)),
}  # fmt: skip


@pytest.mark.parametrize("function", COUNTS)
def test_a_count_below_the_smallest_weight_is_refused(function, monkeypatch):
    name, call = COUNTS[function]

    def run():
        with pytest.raises(ValueError) as caught:
            call(-torch.ones(2, 3), torch.ones(2, 3))
        return str(caught.value)

    sentence = f"{function}: {name} must be at least 1.17549e-38 and finite, got 4.94066e-324"
    assert on_both_paths(run, monkeypatch) == [sentence] * 2


# ---- what is not finite --------------------------------------------------------------------------


@pytest.mark.parametrize("odd", [INFINITY, -INFINITY, NAN])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_log_probability_that_is_not_finite_is_not_within_a_clip(odd, advantage, monkeypatch):
    batch = batch_of(torch.float32, [advantage] * 4) | {"ref_logps": None}
    batch["logps"] = batch["logps"].clone()
    batch["logps"][0, 1] = odd

    def run():
        return loss_of(batch, "gmpo", entropy_coef=0)[:2]

    for loss, dlogps in on_both_paths(run, monkeypatch):
        assert loss.isnan()
        assert dlogps.isnan()[0, 1]


@pytest.mark.parametrize("level", ["token", "sequence_token"])
@pytest.mark.parametrize("name", ["policy_token_losses", "kl_terms"])
def test_infinite_upstream_gradients_of_either_sign(name, level):
    batch = batch_of(torch.float32, [0.0, 2.0, 1.0, -1.0], mask=(1.0, 0.0, 1.0, 1.0))
    leaf = batch["logps"].clone().requires_grad_()
    arriving = torch.tensor([[INFINITY, -INFINITY, -INFINITY, INFINITY]])
    if name == "kl_terms":
        out = tether.kl_terms(leaf, batch["ref_logps"], batch["response_mask"])
    else:
        given = batch | {"logps": leaf, "entropies": None, "ref_logps": None}
        out = tether.policy_token_losses(**given, objective="ppo", level=level)
    finite = torch.autograd.grad(out.sum(), leaf, retain_graph=True)[0]
    found = torch.autograd.grad(out, leaf, arriving)[0]
    assert finite[0, 1] == 0
    assert torch.equal(found, torch.where(finite == 0, 0.0, finite.sign() * arriving))


# ---- gradients and their types -------------------------------------------------------------------


def test_a_float16_gradient_beyond_its_type_is_infinite(monkeypatch):
    # As a loss scaler wants it.
    def run():
        leaf = torch.full((1, 2), -1.0, dtype=torch.float16, requires_grad=True)
        advantages = torch.tensor([[60000.0, 1.0]])
        loss = tether.policy_loss(leaf, advantages, torch.ones(1, 2), objective="reinforce").loss
        return torch.autograd.grad(loss * 4.0, leaf)[0]

    for dlogps in on_both_paths(run, monkeypatch):
        assert dlogps.tolist() == [[-INFINITY, -2.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_are_at_most_the_largest_result(dtype, monkeypatch):
    batch = batch_of(dtype, [8.0, 8.0, -8.0, -8.0])
    batch["entropy_weights"] = torch.full((1, 4), 1e12)
    normalizer = tether.Normalizer(world_size=1e300, scale=1e300)
    largest = torch.finfo(torch.bfloat16).max

    def run():
        return loss_of(batch, "reinforce", normalizer=normalizer, entropy_coef=1e12)

    for _, *gradients in on_both_paths(run, monkeypatch):
        for each in gradients:
            assert torch.equal(each.abs(), torch.full_like(each, largest))


@pytest.mark.parametrize("function", ["policy_loss", "policy_token_losses"])
def test_parameters_of_a_formula_see_the_weights_of_tokens(function, monkeypatch):
    advantages, weights = torch.tensor([1.0, -2.0]), torch.tensor([[0.5, 3.0], [0.0, 2.0]])
    logps, ones = -torch.ones(2, 2), torch.ones(2, 2)

    def run():
        slope = torch.tensor(0.5, requires_grad=True)
        own = tether.Surrogate(lambda token: -slope * token.ratio * token.advantage)
        call = getattr(tether, function)
        out = call(logps, advantages, ones, objective=own, token_weights=weights)
        total = out.loss if function == "policy_loss" else out.mean()
        return torch.autograd.grad(total, slope)[0]

    for found in on_both_paths(run, monkeypatch):
        torch.testing.assert_close(found, -(weights * advantages[:, None]).mean())


# ---- bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["ppo", "grpo", "cispo", "gspo"])
def test_a_row_that_is_not_sound_changes_no_bit_of_another(objective):
    torch.manual_seed(0)
    logps, old_logps, ref_logps = (-torch.rand(3, 50) for _ in range(3))
    broken = logps.clone()
    broken[2, 7] = NAN

    def gradient(logps):
        leaf = logps.clone().requires_grad_()
        tether.policy_loss(
            leaf,
            torch.tensor([0.7, -1.3, 0.4]),
            torch.rand(3, 50, generator=torch.Generator().manual_seed(1)),
            objective=objective,
            old_logps=old_logps,
            ref_logps=ref_logps,
            beta=0.3,
        ).loss.backward()
        return leaf.grad

    assert gradient(broken)[2].isnan().any()
    assert torch.equal(gradient(broken)[:2], gradient(logps)[:2])
