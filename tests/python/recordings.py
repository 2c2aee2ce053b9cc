"""Recordings of peers' own functions, and how a loss is compared with one."""

import json
import pathlib
import re

import pytest
import tether
import torch

PEERS = pathlib.Path(__file__).resolve().parent.parent / "golden" / "peers"


def recording(name):
    return json.loads((PEERS / f"{name}.json").read_text())


def blocks_of_page(name):
    """What docs/NAME.md tells a user to write."""
    page = (PEERS.parent.parent.parent / f"docs/{name}.md").read_text()
    return re.findall(r"^```text\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


def named(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case["name"])


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float64)


def batch_of(case):
    """The arguments of policy_loss that a case has."""
    names = ("logps", "old_logps", "rollout_logps", "ref_logps", "advantages")
    batch = {name: tensor(case[name]) for name in names}
    return batch | {"response_mask": torch.tensor(case["response_mask"])}


def policy_loss(case, **settings):
    """Value and gradient of tether.policy_loss; settings may replace a tensor."""
    batch = batch_of(case) | settings
    logps = batch["logps"].requires_grad_()
    loss, _ = tether.policy_loss(**batch)
    loss.backward()
    return loss.detach(), logps.grad


def assert_equal(case, loss, gradient, name="logps", rtol=1e-12, atol=1e-15):
    """To rounding, which is float64's unless said; a loss is a sum, of terms that may cancel."""
    assert loss.item() == pytest.approx(case["loss"], rel=rtol, abs=10 * atol)
    torch.testing.assert_close(gradient, tensor(case[f"d{name}"]), rtol=rtol, atol=atol)


FLOAT32 = {"rtol": 1e-6, "atol": 1e-8}  # where the peer computes in it


def token_counts(mask):
    """The denominators of a batch by its mask, whatever a weight takes out."""
    rows = mask.sum(1)
    return {"policy": int(rows.sum()), "sequences": int((rows > 0).sum())}


def sides(cases, low, high):
    """Where good and bad tokens of the cases are to the bounds of the ratio: 6 if everywhere."""
    found = set()
    for case in cases:
        batch = batch_of(case)
        mask, advantages = batch["response_mask"] > 0, batch["advantages"]
        ratios = (batch["logps"] - batch["old_logps"]).exp()
        good = advantages if advantages.dim() == 2 else advantages[:, None].expand(mask.shape)
        where = (ratios > low).int() + (ratios > high).int()
        found |= set(zip((good > 0)[mask].tolist(), where[mask].tolist(), strict=True))
    return found


def has_empty_rows(cases):
    return all(any(not any(row) for row in case["response_mask"]) for case in cases)
