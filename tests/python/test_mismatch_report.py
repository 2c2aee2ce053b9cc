"""How far trainer and engine are apart, beside verl's metrics."""

import json
import math
import pathlib

import pytest
import tether
import torch
from batches import packed, padded_batch

PEERS = pathlib.Path(__file__).resolve().parent.parent / "golden" / "peers"
CASES = json.loads((PEERS / "verl_mismatch.json").read_text())["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_equals_verl(case):
    arrays = (case["old_log_prob"], case["rollout_log_prob"])
    arrays = [torch.tensor(each, dtype=torch.float64) for each in arrays]
    out = tether.mismatch_report(*arrays, torch.tensor(case["response_mask"]))
    metrics = case["metrics"]
    ours = {
        "kl": out.k1,
        "k3_kl": out.k3,
        "training_ppl": out.perplexity,
        "rollout_ppl": out.rollout_perplexity,
        "chi2_token": out.token.chi2,
        "chi2_seq": out.sequence_sum.chi2,
    }
    for name, value in ours.items():  # verl adds 1e-8 to counts
        assert value == pytest.approx(metrics[name], rel=1e-7), name


def test_levels_and_packing():
    batch = padded_batch()
    names = ("old_logps", "rollout_logps", "response_mask")
    out = tether.mismatch_report(*(batch[name] for name in names))
    mask = batch["response_mask"]
    x = torch.where(mask, batch["old_logps"] - batch["rollout_logps"], 0.0)
    n = mask.sum(1)
    for level, log_ratios in {
        "token": x[mask],
        "sequence_mean": (x.sum(1) / n)[n > 0],
        "sequence_sum": x.sum(1)[n > 0],
    }.items():
        r = log_ratios.exp()
        expected = (r.mean(), r.min(), r.max(), (r**2).mean() - 1, r.mean() ** 2 / (r**2).mean())
        found = getattr(out, level)
        assert found == pytest.approx([each.item() for each in expected], rel=1e-12), level
    assert out.tokens == mask.sum() and out.sequences == (n > 0).sum()
    rows = packed(batch)
    again = tether.mismatch_report(*(rows[name] for name in names), offsets=rows["offsets"])
    assert again == out


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("far", [-2000.0, -400.0, 0.0, 400.0, 2000.0])
def test_the_effective_share_knows_no_scale(far, on_cpu, monkeypatch):
    if not on_cpu:
        monkeypatch.setattr(tether._ops, "KERNELS", frozenset())
    old_logps = torch.full((3, 2), -1.0, dtype=torch.float64)
    ratios = torch.tensor([[1.0, 9.0], [0.5, 9.0], [0.25, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[0.5, 0.0]] * 3)
    out = tether.mismatch_report(old_logps, old_logps - far - ratios.log(), mask)
    share = 1.75**2 / (3 * 1.3125)
    assert out.token.ess == pytest.approx(share, rel=1e-9)
    assert out.sequence_mean.ess == pytest.approx(share, rel=1e-9)
    rollout_logps = old_logps.clone()
    rollout_logps[1, 0] = -torch.inf
    assert math.isnan(tether.mismatch_report(old_logps, rollout_logps, mask).token.ess)


def test_wrong_calls_get_one_clear_message():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError) as caught:
        tether.mismatch_report(x, x[:1], x)
    assert str(caught.value) == (
        "mismatch_report: rollout_logps must be [2, 3] like old_logps, got [1, 3]"
    )
