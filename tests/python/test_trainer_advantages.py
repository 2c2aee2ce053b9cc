"""tether's advantages against those of SkyRL, TRL and OpenRLHF, as tests/peers/record_*.py recorded
them: what docs/advantages.md says of their names.
"""

import pytest
import tether
import torch
from recordings import FLOAT32, named, recording, tensor


def advantages(rule, rewards, **options):
    return tether.advantage(rule, rewards, **options).advantages


# ---- SkyRL ---------------------------------------------------------------------------------------


@named(recording("skyrl_advantages")["cases"])
def test_maxrl(case):
    """An answer that is alone keeps its reward there. Its means are float32."""
    mask, ids = torch.tensor(case["response_mask"]), torch.tensor(case["ids"])
    rewards, theirs = tensor(case["rewards"]), tensor(case["advantages"])
    found = advantages("max_rl", rewards, groups=ids)
    alone = torch.bincount(ids)[ids] == 1
    assert (found[alone] == 0).all()
    found = torch.where(alone, rewards, found)
    torch.testing.assert_close(found[:, None] * mask, theirs, rtol=1e-6, atol=1e-6)
