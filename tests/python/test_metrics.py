"""Metrics: merging blocks, dictionaries, memory."""

import gc
import math
import pathlib

import pytest
import tether
import torch
from batches import padded_batch

LOGPS, FULL = -torch.arange(1.0, 13.0).view(4, 3) / 7, torch.ones(4, 3)


def losses(rows):
    """Of some rows: every loss with metrics."""
    logps, mask, old = LOGPS[rows], FULL[rows], LOGPS[rows] + 0.3
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])[rows]
    return {
        "policy": tether.policy_loss(
            logps, advantages, mask, objective="ppo", old_logps=old, entropies=-logps
        ),
        "preference": tether.preference_loss(logps, old * 1.1, mask),
        "value": tether.value_loss(logps, old, mask, old_values=old),
    }


@pytest.mark.parametrize("name", ["policy", "preference", "value"])
def test_merged_metrics_are_those_of_the_whole(name):
    order = [0, 2, 1, 3]  # pairs: chosen before rejected, in both halves
    whole = losses(order)[name].metrics
    parts = [losses(rows)[name].metrics for rows in ([0, 1], [2, 3])]
    merged = sum(parts)
    assert all(map(torch.equal, merged, parts[0] + parts[1]))
    assert all(map(torch.equal, merged, parts[0].merge(parts[1])))
    assert type(merged) is type(whole)
    for a, b in zip(merged, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-18)
    assert merged.to_dict() == pytest.approx(whole.to_dict(), rel=1e-12)


@pytest.mark.parametrize("name", ["policy", "preference", "value"])
def test_metrics_of_another_kind_are_refused(name):
    metrics, other = losses([0, 2, 1, 3])[name].metrics, tether.Moments(1.0, 0.0, 0.0)
    with pytest.raises(TypeError) as caught:
        metrics.merge(other)
    assert str(caught.value) == f"merge: other must be {type(metrics).__name__}, got Moments"
    with pytest.raises(TypeError, match="unsupported operand"):
        metrics + other
    with pytest.raises(TypeError) as caught:
        other.merge(metrics)
    assert str(caught.value) == f"merge: other must be Moments, got {type(metrics).__name__}"


@pytest.mark.parametrize("on_cpu", [True, False])
def test_explained_variance_beside_a_mean_that_is_a_billion_times_larger(on_cpu, monkeypatch):
    if not on_cpu:
        monkeypatch.setattr(tether._ops, "KERNELS", frozenset())
    torch.manual_seed(1)
    noise, mask = torch.randn(4, 50, dtype=torch.float64), torch.rand(4, 50) < 0.7
    mask[3] = False
    values, returns = 1e9 + 3 + noise / 2, 1e9 + noise
    values[~mask] = math.nan

    def metrics(*rows):
        rows = list(rows)
        return tether.value_loss(values[rows], returns[rows], mask[rows]).metrics

    whole = metrics(0, 1, 2, 3)
    assert whole.to_dict()["explained_variance"] == pytest.approx(0.75, abs=1e-6)
    split = sum([metrics(3), metrics(0), metrics(2, 1)])
    assert split.to_dict()["explained_variance"] == pytest.approx(0.75, abs=1e-6)
    added = tether.ValueMetrics(metrics(0, 3).sums + metrics(1, 2).sums)
    assert added.to_dict()["explained_variance"] == pytest.approx(0.75, abs=0.02)
    assert metrics(3).to_dict()["explained_variance"] == 0


def resident_bytes():
    gc.collect()
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("name", ["policy", "preference", "value"])
def test_dictionaries_leave_no_memory_behind(name):
    metrics = losses([0, 1, 2, 3])[name].metrics
    for _ in range(1000):
        metrics.to_dict()
    before = resident_bytes()
    for _ in range(10000):
        metrics.to_dict()
    assert resident_bytes() - before < 10000 * 64


@pytest.mark.parametrize("settings", [{}, {"entropy_coef": 0.1}, {"level": "sequence_mean"}])
@pytest.mark.parametrize("objective", ["ppo", "grpo"])
def test_entropies_of_linear_policy_loss_are_in_the_metrics(objective, settings):
    batch = padded_batch(poison=0.0)
    del batch["logps"]
    torch.manual_seed(1)
    hidden, weight = (
        torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((5, 9, 4), (7, 4))
    )
    targets = torch.randint(7, (5, 9))
    for chunk_bytes in (1, 1 << 20):
        out = tether.linear_policy_loss(
            *(hidden, weight, targets),
            **batch,
            objective=objective,
            entropies=True,
            chunk_bytes=chunk_bytes,
            **settings,
        )
        mean = out.entropies[batch["response_mask"]].mean().item()
        assert out.metrics.to_dict()["entropy"] == pytest.approx(mean, rel=1e-12) and mean > 0
        plain = tether.linear_policy_loss(
            *(hidden, weight, targets), **batch, objective=objective, **settings
        )
        gradients = [torch.autograd.grad(each.loss, (hidden, weight)) for each in (out, plain)]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
        assert math.isclose(out.loss.item(), plain.loss.item(), rel_tol=1e-12)
