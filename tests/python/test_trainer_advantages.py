"""tether's advantages against those of SkyRL, TRL and OpenRLHF, as tests/peers/record_*.py recorded
them: what docs/advantages.md says of their names.
"""

import math

import tether
import torch
from recordings import named, recording, tensor


def advantages(rule, rewards, **options):
    return tether.advantage(rule, rewards, **options).advantages


# ---- SkyRL ---------------------------------------------------------------------------------------


@named(recording("skyrl_advantages")["cases"])
def test_maxrl(case):
    """An answer that is alone keeps its reward there, and where the mean is below 0 the signs are
    the other way round. Its means are float32."""
    mask, ids = torch.tensor(case["response_mask"]), torch.tensor(case["ids"])
    rewards, theirs = tensor(case["rewards"]), tensor(case["advantages"])
    found = advantages("max_rl", rewards, groups=ids)
    alone = torch.bincount(ids)[ids] == 1
    assert (found[alone] == 0).all()
    if (rewards < 0).all():
        centred = advantages("dr_grpo", rewards, groups=ids)
        assert (found == 0).all() and ((theirs[:, 0] * centred)[~alone] < 0).all()
        return
    found = torch.where(alone, rewards, found)
    torch.testing.assert_close(found[:, None] * mask, theirs, rtol=1e-6, atol=1e-6)


# ---- TRL -----------------------------------------------------------------------------------------

SIZE = 4


def rewards_of(case):
    return tensor([[math.nan if x is None else x for x in row] for row in case["rewards"]])


def of_batch(x):
    """TRL's normalization over the batch is that of one group."""
    return advantages("grpo", x, groups=len(x), epsilon=1e-4, nan_reward="missing")


def trl_grpo(case):
    rewards, settings = rewards_of(case), case["settings"]
    options = {"groups": SIZE, "nan_reward": "missing"}
    if settings["multi_objective_aggregation"] == "sum_then_normalize":
        if settings["scale_rewards"] == "none":
            return advantages("dr_grpo", rewards[:, 0], **options)
        scale = f"{settings['scale_rewards']}_std"
        return advantages("grpo", rewards[:, 0], scale=scale, epsilon=1e-4, **options)
    each = [advantages("grpo", x.contiguous(), epsilon=1e-4, **options) for x in rewards.T]
    total = torch.stack(each, 1) @ tensor(case["weights"])
    return of_batch(torch.where(rewards.isnan().all(1), math.nan, total))


def trl_rloo(case):
    """An answer whose others have no reward has no advantage there."""
    rewards = rewards_of(case)[:, 0]
    found = advantages("rloo", rewards, groups=SIZE, nan_reward="missing")
    if not case["settings"]["normalize_advantages"]:
        return found
    few = (~rewards.isnan()).view(-1, SIZE).sum(1).repeat_interleave(SIZE) < 2
    return of_batch(torch.where(rewards.isnan() | few, math.nan, found))


@named(recording("trl_advantages")["cases"])
def test_trl(case):
    """TRL rounds the n / (n - 1) of its spreads to float32."""
    found = {"grpo": trl_grpo, "rloo": trl_rloo}[case["trainer"]](case)
    settings = case["settings"]
    plain = settings.get("scale_rewards") == "none" or not settings.get("normalize_advantages", 1)
    rtol = 1e-12 if plain else 2**-24
    torch.testing.assert_close(found, tensor(case["advantages"]), rtol=rtol, atol=1e-14)


# ---- OpenRLHF ------------------------------------------------------------------------------------

OF_ANSWERS = {
    "rloo": ("rloo", {"groups": 3}),
    "group_norm": ("grpo", {"groups": 3, "epsilon": 1e-9}),
    "dr_grpo": ("dr_grpo", {"groups": 3}),
    "reinforce_baseline": ("dr_grpo", {"groups": 3}),
    "flash_reinforce": ("dr_grpo", {"groups": 12}),
}


def whitened(x, mask):
    """With N for N - 1."""
    count, mean, squares = tether.moments(x, mask)
    step = tether.Moments(count, mean, squares * (count - 1) / count)
    return tether.whiten(x, mask, step=step, epsilon=0)


@named(recording("openrlhf_advantages")["cases"])
def test_openrlhf(case):
    """The advantage of an answer is a reward of its last token, beside the penalties of all."""
    name, settings = case["name"], case["settings"]
    mask, rewards = torch.tensor(case["response_mask"]), tensor(case["rewards"])
    if name in OF_ANSWERS:
        rule, options = OF_ANSWERS[name]
        rewards = advantages(rule, rewards, **options)
    penalty = settings["kl_coef"] * tensor(case["kl"]) * mask
    last = mask.flip(1).cumsum(1).flip(1) == 1
    tokens = rewards[:, None] * (last & (mask > 0)) - penalty
    if name == "gae":
        options = {"gamma": settings["gamma"], "lambda_": settings["lambd"]}
        found = advantages(
            name, tokens, response_mask=mask, values=tensor(case["values"]), **options
        )
    else:
        found = tether.discounted_returns(tokens, mask, gamma=settings["gamma"], gap="decay")
    whitens = name in ("gae", "reinforce", "reinforce_baseline")  # in float32
    found = whitened(found, mask) if whitens else found
    theirs = tensor(case["advantages"]) * mask
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if whitens else {"rtol": 1e-12, "atol": 1e-14}
    torch.testing.assert_close(found, theirs, **tolerance)
