"""Advantages by torch's operations, those of other devices: what kernels bound and do not read."""

import math

import pytest
import tether
import torch

GROUP_RULES = [name for name, row in tether.advantages().items() if row.of_groups]
RECURSIONS = [name for name, row in tether.advantages().items() if not row.of_groups]


def by_torch(estimator, rewards, *arguments, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tether._ops, "KERNELS", frozenset())
        return tether.advantage(estimator, rewards, *arguments, **options)


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def assert_those_of_the_kernel(estimator, rewards, mask, **options):
    actual = by_torch(estimator, rewards, mask, **options)
    expected = tether.advantage(estimator, rewards, mask, **options)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13, equal_nan=True)
    return actual


@pytest.mark.parametrize("estimator", RECURSIONS)
def test_a_bootstrap_is_of_rows_where_there_are_as_many_as_tokens(estimator):
    options = {"values": numbers(0.5, 0.3), "log_ratios": numbers(0.1, -0.2), "gamma": 0.9}
    options |= {"offsets": torch.tensor([0, 2, 2]), "bootstrap": numbers(10, 20)}
    assert_those_of_the_kernel(estimator, numbers(1, 2), torch.ones(2), **options)


@pytest.mark.parametrize("broken", ["log_ratios", "values", "rewards"])
def test_a_nan_stays_in_its_row_and_behind_what_is_done(broken):
    tokens = {name: torch.arange(6.0) / 5 for name in ("rewards", "values", "log_ratios")}
    tokens[broken][4] = math.nan
    rewards, mask = tokens.pop("rewards"), torch.ones(6)
    packed = {**tokens, "offsets": torch.tensor([0, 3, 6])}
    out = assert_those_of_the_kernel("vtrace", rewards, mask, **packed)
    assert all(each[:3].isfinite().all() and each[4].isnan() for each in out)
    done = {name: each[None] for name, each in tokens.items()}
    done["done"] = torch.arange(6)[None] == 2
    assert_those_of_the_kernel("vtrace", rewards[None], mask[None], **done)


@pytest.mark.parametrize("estimator", ["gae", "returns"])
def test_what_a_recursion_does_not_read_may_be_nan(estimator):
    rewards, nothing = torch.arange(4.0)[None], torch.full((1, 4), math.nan)
    values = nothing if estimator == "returns" else rewards
    options = {"values": values, "log_ratios": nothing, "gamma": 0.9}
    out = assert_those_of_the_kernel(estimator, rewards, torch.ones(1, 4), **options)
    assert all(each.isfinite().all() for each in out)


@pytest.mark.parametrize("log_ratio", [0.0, 300.0, 700.0])
@pytest.mark.parametrize("estimator", RECURSIONS)
@pytest.mark.parametrize("largest", [1.0, torch.finfo(torch.float64).max])
def test_finite_numbers_give_no_nan(estimator, log_ratio, largest):
    bars = dict.fromkeys(("rho_bar", "c_bar", "pg_rho_bar"), math.inf)
    options = bars if estimator == "vtrace" else {}
    for signs in ((0, 0, 0, 1, 0, 0), (1, -1, 1, 1, -1, -1), (-1, 1, 1, 0, -1, 1)):
        rewards = largest * numbers(*signs)[None]
        tokens = {"values": -rewards, "log_ratios": torch.full_like(rewards, log_ratio)}
        tokens |= {"bootstrap": numbers(largest)}
        out = by_torch(estimator, rewards, torch.ones(1, 6), **tokens, **options)
        assert all(each.isfinite().all() for each in out)


@pytest.mark.parametrize("size", [1e-200, 1e200, torch.finfo(torch.float64).max])
@pytest.mark.parametrize("rule", GROUP_RULES)
def test_finite_rewards_of_any_size_give_no_nan(rule, size):
    rewards = size * numbers(1, -1, 0, 1)
    epsilon = {"epsilon": 0} if "epsilon" in tether.advantages()[rule].options else {}
    for scale in ("none", "group_std", "batch_std", "group_mean") if epsilon else ("",):
        options = {**epsilon, **({"scale": scale} if scale else {"lengths": torch.arange(4)})}
        out = by_torch(rule, rewards, groups=4, **options).advantages
        assert out.isfinite().all() and out[0] == out[3]
        assert rule == "pass_at_k" or out[0] > out[2] > out[1]
        if scale not in ("", "none"):
            expected = tether.advantage(rule, rewards, groups=4, **options).advantages
            torch.testing.assert_close(out, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("length", [-3.0, math.nan, math.inf])
def test_a_length_that_is_none_spoils_its_group(length):
    lengths = numbers(length, 1, 1, 1)
    out = by_torch("opo", numbers(0, 1, 2, 4), groups=2, lengths=lengths).advantages
    assert out[:2].isnan().all() and out[2:].tolist() == [-1, 1]


@pytest.mark.parametrize("rule", GROUP_RULES)
def test_an_infinite_reward_spoils_its_group(rule):
    options = {"lengths": torch.ones(4)}
    out = by_torch(rule, numbers(math.inf, 1, 2, 4), groups=2, **options).advantages
    assert out[:2].isnan().all() and out[2:].isfinite().all()


@pytest.mark.parametrize("rule", GROUP_RULES)
def test_a_group_of_one_is_zero(rule):
    groups, lengths = torch.tensor([3, 1, 3]), torch.ones(3)
    out = by_torch(rule, numbers(2, 5, 1), groups=groups, lengths=lengths).advantages
    assert out[1] == 0 and out[0] > out[2]
