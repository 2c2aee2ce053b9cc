"""tether.Surrogate: the formulas of the catalogue as a user writes them, against their rows."""

import copy
import math
import pickle

import pytest
import tether
import torch
from batches import (
    LEVELS,
    OBJECTIVES,
    assert_close,
    assert_same_bits,
    evaluated,
    packed,
    padded_batch,
    referenced,
)
from tether.reference import OBJECTIVES as ROWS
from torch.utils.checkpoint import checkpoint

# ---- the catalogue's formulas --------------------------------------------------------------------


def ppo_clip(token, epsilon_low=0.2, epsilon_high=0.2, dual_clip=math.inf):
    bounded = token.ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    loss = -torch.minimum(token.ratio * token.advantage, bounded * token.advantage)
    return torch.where(token.advantage < 0, loss.minimum(-dual_clip * token.advantage), loss)


def reinforce(token):
    return -token.advantage * token.logp


def is_reinforce(token, ratio_low=0, ratio_high=5):
    return -token.ratio.clamp(ratio_low, ratio_high).detach() * token.advantage * token.logp


def soft_gate(token, tau_pos=1, tau_neg=1.05):
    tau = torch.full_like(token.advantage, tau_neg).masked_fill(token.advantage > 0, tau_pos)
    return -4 / tau * torch.sigmoid(tau * (token.ratio - 1)) * token.advantage


def linear_ratio(token):
    return -token.ratio * token.advantage


def band_clip(token, epsilon_low=0.2, epsilon_high=0.2):
    return -token.ratio.clamp(1 - epsilon_low, 1 + epsilon_high) * token.advantage


def quadratic_pull(token, tau=0.1):
    return tau / 2 * token.log_ratio**2 - token.advantage * token.logp


def squared_regression(token, scale=1, eta=1):
    return (scale * token.log_ratio - eta * token.advantage) ** 2


def tapered_reinforce(token, weight_pos=1, weight_neg=1, ratio_high=1):
    tapered = weight_neg * token.ratio.detach().clamp(max=ratio_high)
    return -torch.where(token.advantage < 0, tapered, weight_pos) * token.advantage * token.logp


def quadratic_bound(token, epsilon=0.2, power=0):
    old_logp = (token.logp - token.log_ratio).detach().clamp_max(0)
    weight = (power * old_logp).exp()
    square = token.advantage.abs() * weight * (token.ratio - 1) ** 2 / (2 * epsilon)
    return square - token.ratio * token.advantage


FORMULAS = {
    "ppo_clip": ppo_clip,
    "reinforce": reinforce,
    "is_reinforce": is_reinforce,
    "soft_gate": soft_gate,
    "linear_ratio": linear_ratio,
    "band_clip": band_clip,
    "quadratic_pull": quadratic_pull,
    "squared_regression": squared_regression,
    "tapered_reinforce": tapered_reinforce,
    "quadratic_bound": quadratic_bound,
}
TRUNCATED = {"is_reinforce": {"truncation": ("ratio_low", "ratio_high")}}


def rewritten(objective):
    """The row as a user writes it, and its options."""
    name = ROWS[objective].surrogate.__name__
    own = tether.Surrogate(FORMULAS[name], like=objective, **TRUNCATED.get(name, {}))
    return {"objective": own, **ROWS[objective].surrogate_options}


def batch_of(seed=0, **settings):
    batch = padded_batch(seed, **settings)
    batch["entropies"] = torch.where(batch["response_mask"], -batch["logps"], math.nan)
    return batch


# ---- equal to the catalogue ----------------------------------------------------------------------


@pytest.fixture(params=["cpu", "another device"])
def device(request, monkeypatch):
    if request.param != "cpu":
        monkeypatch.setattr("tether.policy.has_kernel", lambda tensor, *others: False)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("layout", [dict, packed])
def test_a_row_rewritten_is_the_row(objective, layout):
    batch = layout(batch_of(spread=0.8))
    bounds = {name: value for name, value in {"ratio_low": 0.8, "ratio_high": 1.3}.items()
              if name in ROWS[objective].surrogate_options}  # fmt: skip
    expected = evaluated(batch, objective=objective, **bounds)
    assert_close(evaluated(batch, **rewritten(objective) | bounds), expected, 1e-12)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("objective", ["ppo", "cispo", "dro", "topr"])
def test_at_every_level_with_everything_around_it(objective, level):
    batch = batch_of(seed=3, spread=0.7)
    batch["response_mask"] = 0.75 * batch["response_mask"]
    settings = {
        "level": level,
        "aggregation": "sequence_mean_token_mean",
        "beta": 0.3,
        "kl_correction": "level_ratio",
        "entropy_coef": 0.2,
        "weights": {"truncated_importance": {"high": 1.3, "level": "sequence_mean"},
                    "ratio_gate": {"high": 1.6}},
        "normalizer": tether.Normalizer(20.0, 18.0, 5.0, 2),
        "token_weights": torch.rand_like(batch["logps"]),
        "kl_weights": torch.rand_like(batch["logps"]),
        "row_tokens": torch.arange(3.0, 8.0),
    }  # fmt: skip
    expected = evaluated(batch, objective=objective, **settings)
    assert_close(evaluated(batch, **rewritten(objective), **settings), expected, 1e-12)


@pytest.mark.parametrize("objective", ["grpo", "vespo", "gspo_token"])
def test_float32_and_half(objective):
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 1e-2)):
        batch = batch_of(dtype=dtype)
        actual = evaluated(batch, **rewritten(objective))
        expected = evaluated(batch, objective=objective)
        assert actual.dlogps.dtype == dtype and actual.loss.dtype == torch.float32
        assert_close(actual, expected, tolerance)


def clipped(token: tether.Token, epsilon: float = 0.2) -> torch.Tensor:
    bounded = token.ratio.clamp(1 - epsilon, 1 + epsilon)
    return -torch.minimum(token.ratio * token.advantage, bounded * token.advantage)


CLIPPED = tether.Surrogate(clipped)


def counted(out):
    return [out] if isinstance(out, torch.Tensor) else [out.policy, out.kl, out.sequences]


def test_token_losses_and_counts(device):
    batch = batch_of()
    options = {"epsilon": 0.1, "beta": 0.2}
    named = {"epsilon_low": 0.1, "epsilon_high": 0.1, "beta": 0.2, "objective": "ppo"}
    gate = {"weights": {"ratio_gate": {"high": 1.2}}}
    for function in (tether.policy_token_losses, tether.local_counts):
        actual = function(**batch, objective=CLIPPED, **options, **gate)
        expected = function(**batch, **named, **gate)
        for a, b in zip(counted(actual), counted(expected), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-15)


def test_other_devices_and_the_reference_do_the_same(monkeypatch):
    batch = batch_of()
    expected = evaluated(batch, objective="ppo", epsilon_low=0.1, epsilon_high=0.1)
    assert_close(referenced(batch, objective=CLIPPED, epsilon=0.1), expected, 1e-12)
    monkeypatch.setattr("tether.policy.has_kernel", lambda tensor, *others: False)
    assert_close(evaluated(batch, objective=CLIPPED, epsilon=0.1), expected, 1e-12)


def test_from_hidden_states():
    batch = {name: each.nan_to_num(-1) if each.is_floating_point() else each
             for name, each in padded_batch().items()}  # fmt: skip
    del batch["logps"]
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(5, 9, 4, generator=generator).double()
    weight = torch.randn(12, 4, generator=generator).double()
    targets = torch.randint(0, 12, (5, 9), generator=generator)

    def results(**settings):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        out = tether.linear_policy_loss(
            *leaves, targets, **batch, chunk_bytes=3 * 12 * 8, beta=0.1, **settings
        )
        out.loss.backward()
        return out.loss, *(each.grad for each in leaves), out.metrics.sums

    actual = results(objective=CLIPPED, epsilon=0.1)
    expected = results(objective="ppo", epsilon_low=0.1, epsilon_high=0.1)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_like_gives_what_is_not_said():
    batch = batch_of()
    own = tether.Surrogate(ppo_clip, like="prime_rl.ipo")
    off = {"epsilon_low": 1.0, "epsilon_high": 1e6}
    expected = evaluated(batch, objective="prime_rl.ipo")
    assert_close(evaluated(batch, objective=own, **off), expected, 1e-12)
    settings = {"beta": 0.0, "weights": {"tv_band": {"level": "sequence_mean"}}}
    expected = evaluated(batch, objective="prime_rl.ipo", **settings)
    assert_close(evaluated(batch, objective=own, **off, **settings), expected, 1e-12)
    # Options of the row's own surrogate are not those of another formula.
    own = tether.Surrogate(linear_ratio, like="verl.cispo")
    assert own.settings == {"kl_estimator": "low_var_kl", "kl_gradient": "low_var_kl"}
    assert_close(
        evaluated(batch, objective=own, beta=0.1),
        evaluated(batch, objective="linear", beta=0.1, **own.settings),
        1e-12,
    )


# ---- formulas that no row has --------------------------------------------------------------------


def test_clip_fractions_are_those_of_tokens_without_a_slope():
    logps, advantages = torch.tensor([[0.5, -0.5, 0.5, -0.5, 0.5]]).double(), torch.ones(1, 5)
    advantages = advantages * torch.tensor([1.0, 1, -1, -1, 0])

    def flat(token):
        return torch.where(token.log_ratio < 0, token.logp, 1.0)

    logps, old = (logps - 1).requires_grad_(), torch.full((1, 5), -1.0)
    out = tether.policy_loss(
        logps, advantages, torch.ones(1, 5), old_logps=old, objective=tether.Surrogate(flat)
    )
    found = out.metrics.to_dict()
    names = ("clip_fraction_low", "clip_fraction_high", "clip_fraction_dual")
    assert [found[name] for name in names] == [0, 1 / 5, 1 / 5]
    truncated = tether.Surrogate(flat, truncation=(0.7, math.inf))
    out = tether.policy_loss(
        logps, advantages, torch.ones(1, 5), old_logps=old, objective=truncated
    )
    found = out.metrics.to_dict()
    assert [found[name] for name in names] == [2 / 5, 1 / 5, 1 / 5]


@pytest.mark.parametrize("level", LEVELS)
def test_what_a_formula_makes_of_masked_slots_goes_nowhere(level):
    """NaN in value and slope, at the ordinary token that it sees there."""
    seen = []

    def unsafe(token):
        seen.append(token)
        return torch.log(token.log_ratio.abs()) * token.advantage + torch.sqrt(-1 - token.logp)

    batch = batch_of()
    batch["logps"], batch["old_logps"] = batch["logps"] - 1, batch["old_logps"] - 2
    for layout in (dict, packed):
        out = evaluated(layout(batch), objective=tether.Surrogate(unsafe), level=level)
        assert all(each.isfinite().all() for each in out)
        assert out.sums[10, 0] == 0  # nonfinite
    masked = ~batch["response_mask"]
    for each in seen[:2]:  # an ordinary token
        fields = [each.logp, each.old_logp, each.ref_logp, each.log_ratio, each.ratio]
        for field, number in zip([*fields, each.advantage], (-1, -1, -1, 0, 1, 1), strict=True):
            assert (field[masked] == number).all()


def test_nan_of_a_formula_is_counted(device):
    logps = torch.tensor([[-1.0, -2.0, -3.0]], requires_grad=True)
    arguments = (logps, torch.ones(1), torch.ones(1, 3))

    def of_value(token):
        return torch.where(token.logp < -2.5, math.nan, token.logp)

    def of_slope(token):
        return torch.sqrt(token.logp + 3)

    for formula, count in ((of_value, 1), (of_slope, 0)):
        out = tether.policy_loss(*arguments, objective=tether.Surrogate(formula))
        assert out.loss.isfinite() == (count == 0)
        assert out.metrics.to_dict()["nonfinite"] == count
    out = tether.policy_loss(
        *arguments, objective=tether.Surrogate(lambda t: torch.sqrt(0 * t.logp) * t.logp)
    )
    assert out.loss.isnan() and out.metrics.to_dict()["nonfinite"] == 3


def test_a_parameter_in_the_formula_is_learned():
    strength = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    own = tether.Surrogate(lambda token: strength * token.log_ratio**2)
    batch = batch_of()
    tether.policy_loss(**batch, objective=own, aggregation="token_sum").loss.backward()
    d = (batch["logps"] - batch["old_logps"])[batch["response_mask"]]
    torch.testing.assert_close(strength.grad, d.square().sum())
    alone = tether.Surrogate(lambda token: strength * token.advantage)
    assert evaluated(batch, objective=alone).loss.isfinite()


def test_a_formula_without_logps_has_no_gradient():
    own = tether.Surrogate(lambda token: -token.advantage)
    out = evaluated(batch_of(), objective=own)
    assert not out.dlogps.any() and out.loss.isfinite()


def test_options_may_have_any_name_that_is_free():
    def scaled(t, token=1.0, self=1.0, batch=1.0, logp=1.0, tokens=1.0, is_aggregated=1.0):
        return -t.ratio * t.advantage * token * self * batch * logp * tokens * is_aggregated

    batch, own = batch_of(), tether.Surrogate(scaled)
    options = {"token": 2, "self": 3, "batch": 5, "logp": 7, "tokens": 11, "is_aggregated": 13}
    actual = tether.policy_loss(**batch, objective=own, **options).loss
    torch.testing.assert_close(actual, 30030 * tether.policy_loss(**batch, objective="linear").loss)


def test_a_formula_sees_the_policies_of_its_token():
    def of_others(token, lambda_=2.0):
        return token.old_logp + lambda_ * token.ref_logp

    batch = batch_of()
    terms = tether.policy_token_losses(**batch, objective=tether.Surrogate(of_others), lambda_=3)
    expected = batch["old_logps"] + 3 * batch["ref_logps"]
    torch.testing.assert_close(terms, torch.where(batch["response_mask"], expected, 0.0))


# ---- torch's modes -------------------------------------------------------------------------------


def test_second_derivatives_and_tangents_are_as_elsewhere(device):
    batch = batch_of()
    x = batch["logps"].requires_grad_()
    for function in ("policy_loss", "policy_token_losses"):
        out = getattr(tether, function)(**batch, objective=CLIPPED)
        loss = out.loss if function == "policy_loss" else out.sum()
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(NotImplementedError) as caught:
            gradient.sum().backward()
        assert str(caught.value) == (
            f"{function}: backward must run once, got a second derivative. The loss has none"
        )
    batch["logps"] = x.detach().nan_to_num(-1)
    ones = torch.ones_like(x)

    def loss_of(logps):
        return tether.policy_loss(**batch | {"logps": logps}, objective=CLIPPED).loss

    with pytest.raises(NotImplementedError, match="policy_loss: logps must have no tangent"):
        torch.func.jvp(loss_of, (batch["logps"],), (ones,))

    def sum_of(logps):
        return tether.policy_token_losses(**batch | {"logps": logps}, objective=CLIPPED).sum()

    _, tangent = torch.func.jvp(sum_of, (batch["logps"],), (ones,))
    x = batch["logps"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(sum_of(x), x)
    torch.testing.assert_close(tangent, gradient.sum())


def test_checkpoint_inference_mode_and_no_grad():
    batch = batch_of()
    expected = evaluated(batch, objective=CLIPPED)
    x = batch["logps"].clone().requires_grad_()

    calls = []
    own = tether.Surrogate(lambda token: calls.append(token) or clipped(token))

    def loss_of(logps):
        return tether.policy_loss(**batch | {"logps": logps}, objective=own).loss

    loss = checkpoint(loss_of, x, use_reentrant=False)
    assert len(calls) == 2  # nothing was made again for the slope
    loss.backward()
    assert torch.equal(x.grad, expected.dlogps)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            made = {name: each.clone() for name, each in batch.items()}
            loss, metrics = tether.policy_loss(**made, objective=CLIPPED)
            assert torch.equal(loss, expected.loss) and not loss.requires_grad
            assert torch.equal(metrics.sums, expected.sums)
    made["logps"] = x.detach().requires_grad_()
    assert tether.policy_loss(**made, objective=CLIPPED).loss == expected.loss


def test_it_is_its_formula():
    """ratio 1.5, A 2: clipped at 1.2; at 1.6 it is not."""
    ratio = torch.tensor(1.5)
    token = tether.Token(ratio.log(), ratio.log(), ratio, torch.tensor(2.0), torch.tensor(0.0))
    assert CLIPPED(token).item() == pytest.approx(-2.4)
    assert CLIPPED(token, epsilon=0.6).item() == -3
    assert (CLIPPED.__name__, CLIPPED.__doc__) == ("clipped", clipped.__doc__)


def test_it_travels():
    batch = batch_of()
    expected = evaluated(batch, objective=CLIPPED)
    for other in (pickle.loads(pickle.dumps(CLIPPED)), copy.deepcopy(CLIPPED)):
        assert_same_bits(evaluated(batch, objective=other), expected)


@tether.Surrogate
def decorated(token, strength=1.0):
    return -token.ratio * token.advantage * strength


def test_a_decorated_surrogate_is_pickled_by_its_name():
    assert pickle.loads(pickle.dumps(decorated)) is decorated


def test_a_formula_may_write_to_its_token():
    batch = padded_batch()
    written = tether.Surrogate(lambda token: -token.ratio * token.advantage.mul_(2))
    made = tether.Surrogate(lambda token: -token.ratio * (token.advantage * 2))
    assert_same_bits(evaluated(batch, objective=written), evaluated(batch, objective=made))


def test_a_formula_may_be_a_module():
    class Scaled(torch.nn.Module):
        def forward(self, token, strength=2.0):
            return -token.ratio * token.advantage * strength

    batch = padded_batch()
    of_module = evaluated(batch, objective=tether.Surrogate(Scaled()), strength=3.0)
    assert_same_bits(of_module, evaluated(batch, objective=decorated, strength=3.0))
