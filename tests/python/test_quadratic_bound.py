"""cfpo and drpo on the path of other devices: gradients far from the old policy."""

import math

import pytest
import tether
import tether._ops
import torch


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch):
    monkeypatch.setattr(tether._ops, "KERNELS", frozenset())


def _gradient(log_ratio, **settings):
    logps = torch.full((1, 1), -1.0, requires_grad=True)
    settings |= {"old_logps": torch.full((1, 1), -1.0 - log_ratio)}
    tether.policy_loss(logps, torch.ones(1), torch.ones(1, 1), **settings).loss.backward()
    return logps.grad.item()


@pytest.mark.parametrize("log_ratio", [-5.0, -10.0, -14.0, -18.0, -30.0])
def test_small_ratios_have_the_whole_gradient(log_ratio):
    ratio, epsilon = math.exp(log_ratio), 0.2
    wanted = ratio * ((ratio - 1) / epsilon - 1)
    assert _gradient(log_ratio, objective="cfpo") == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("objective", ["cfpo", "drpo"])
def test_a_runaway_of_weight_0_has_no_gradient(objective):
    settings = {"objective": objective, "weights": {"masked_ratio": {}}}
    assert _gradient(100.0, **settings) == 0
