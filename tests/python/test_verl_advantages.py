"""tether's advantages against verl's own functions, as recorded by record_verl_advantages.py: what
docs/advantages.md says of verl's names, where verl's number is another one, and the adapter's.
"""

from types import SimpleNamespace as Namespace

import pytest
import tether
import torch
from recordings import recording, tensor
from tether import _verl_advantages

CASES = recording("verl_estimators")["cases"]


def cases(*names):
    found = [case for case in CASES if case["estimator"] in names]
    assert {case["estimator"] for case in found} == set(names)
    return pytest.mark.parametrize(
        "case", found, ids=[f"{case['estimator']}, {case['seed']}" for case in found]
    )


def of(case):
    """Rewards and mask of tokens, and the ids of prompts."""
    arrays = (tensor(case[name]) for name in ("token_level_rewards", "response_mask"))
    return *arrays, torch.tensor(case["ids"])


def assert_near(actual, case, mask, rtol=1e-12, atol=1e-14):
    expected = tensor(case["advantages"])
    torch.testing.assert_close(actual * mask, expected * mask, rtol=rtol, atol=atol)


def others(ids):
    """Answers that are not alone: verl leaves to those their raw reward, tether 0."""
    return torch.bincount(ids)[ids] > 1


def whiten(x, mask):
    """By verl's moments, which have n + 1e-8 for n."""
    count, mean, squares = tether.moments(x, mask)
    shrunk = mean * (shrink := count / (count + 1e-8))
    squares = (squares + count * (mean - shrunk) ** 2) * shrink
    return tether.whiten(x, mask, step=tether.Moments(count, shrunk, squares))


@cases("grpo_passk")
def test_grpo_passk(case):
    rewards, mask, ids = of(case)
    settings = dict(case["settings"])
    scale = "group_std" if settings.pop("norm_adv_by_std_in_grpo") else "none"
    each = tether.advantage("pass_at_k", rewards.sum(1), groups=ids, scale=scale, **settings)
    assert_near(each.advantages[:, None], case, mask)
    assert (each.advantages > 0).sum() == 2


@cases("grpo_vectorized")
def test_grpo_vectorized(case):
    rewards, mask, ids = of(case)
    each = tether.advantage("grpo", rewards.sum(1), groups=ids).advantages
    grouped = others(ids)[:, None]
    assert_near(each[:, None], case, mask * grouped, rtol=1e-6, atol=1e-6)
    alone = tensor(case["advantages"])[~grouped[:, 0], 0]
    torch.testing.assert_close(alone, rewards.sum(1)[~grouped[:, 0]], rtol=2e-6, atol=0)


@cases("gpg")
def test_gpg(case):
    """alpha is answers over rewards that are not 0. The paper's is groups over those whose rewards
    differ, which does not change with a constant that is added to the rewards."""
    rewards, mask, ids = of(case)
    scores = rewards.sum(1)
    centred = tether.advantage("dr_grpo", scores, groups=ids).advantages
    alpha = len(scores) / scores.count_nonzero()
    assert_near((alpha * centred)[:, None], case, mask * others(ids)[:, None])
    differs = [scores[ids == group].std() > 0 for group in ids.unique() if (ids == group).sum() > 1]
    assert alpha == 11 / 9 and len(differs) / sum(differs) == 3 / 2


@cases("reinforce_plus_plus")
def test_reinforce_plus_plus(case):
    rewards, mask, _ = of(case)
    returns = tether.discounted_returns(rewards, mask, gamma=case["settings"]["gamma"])
    torch.testing.assert_close(returns, tensor(case["returns"]), rtol=1e-12, atol=1e-14)
    assert_near(whiten(returns, mask), case, mask)
    assert_near(tether.whiten(returns, mask), case, mask, rtol=1e-8, atol=1e-8)


@cases("reinforce_plus_plus_baseline")
def test_reinforce_plus_plus_baseline(case):
    """With an answer that is alone left as it is, which whitening spreads to all."""
    rewards, mask, ids = of(case)
    scores = rewards.sum(1)
    centred = tether.advantage("dr_grpo", scores, groups=ids).advantages
    centred = torch.where(others(ids), centred, scores)
    assert_near(whiten(centred[:, None].expand_as(mask).contiguous(), mask), case, mask)


@cases("remax")
def test_remax(case):
    rewards, mask, _ = of(case)
    values = tensor(case["reward_baselines"])[:, None].expand_as(rewards)
    advantages, returns = tether.advantage("gae", rewards, mask, values=values)
    assert_near(advantages, case, mask)
    torch.testing.assert_close(returns, tensor(case["returns"]) * mask, rtol=1e-12, atol=1e-14)


@cases("gdpo")
def test_gdpo(case):
    """Of float32 in verl."""
    _, mask, ids = of(case)
    weights = case["settings"]["weights"] or [1.0, 1.0]
    total = 0
    for name, weight in zip(("accuracy", "format"), weights, strict=True):
        rewards = tensor(case[name])
        each = tether.advantage("grpo", rewards, groups=ids).advantages
        total = total + weight * torch.where(others(ids), each, rewards / (1 + 1e-6))
    whitened = tether.whiten(total[:, None].expand_as(mask).contiguous(), mask)
    assert_near(whitened, case, mask, rtol=1e-6, atol=1e-6)


def token_baseline(case, positions):
    """OPO among the tokens of a prompt at the same position, by the energy of their answers."""
    rewards, mask, ids = of(case)
    token = mask > 0
    returns = tether.discounted_returns(rewards, mask)
    weights = tensor(case.get("rollout_is_weights", case["response_mask"]))
    probability, squares = tensor(case["old_log_probs"]).exp(), tensor(case["sum_pi_squared"])
    energy = ((1 - 2 * probability + squares) * weights**2 * mask).cumsum(1)
    cells = (1000 * ids[:, None] + positions)[token]
    found = tether.advantage("opo", returns[token], groups=cells, lengths=energy[token])
    alone = (cells[:, None] == cells).sum(1) == 1  # verl: no baseline
    if not case["settings"].get("handle_zero_tail", True):
        alone &= ~others(ids)[:, None].expand_as(mask)[token]
    out = torch.zeros_like(rewards)
    out[token] = torch.where(alone, returns[token], found.advantages)
    return out, returns


@cases("optimal_token_baseline", "tir_optimal_token_baseline")
def test_token_baselines(case):
    _, mask, _ = of(case)
    of_turns = case["estimator"].startswith("tir")
    columns = torch.arange(mask.shape[1]).expand(mask.shape)
    out, returns = token_baseline(case, (mask > 0).cumsum(1) if of_turns else columns)
    torch.testing.assert_close(returns, tensor(case["returns"]) * mask, rtol=1e-12, atol=1e-14)
    if of_turns or not case["settings"]["holes"]:
        assert_near(out, case, mask)
        return
    # verl takes the tokens of the second longest answer for the column where it ends: there it
    # drops a baseline though others have a token, or keeps that of an answer with itself.
    theirs = tensor(case["advantages"])
    differs = (theirs - out).abs() > 1e-12
    assert differs.sum() == 4
    assert ((theirs == returns) | (theirs.abs() < 1e-12))[differs].all()
    assert (out == returns)[differs & (theirs.abs() < 1e-12)].all()


# ---- the adapter's, called as verl calls its own -------------------------------------------------

ARRAYS = ("token_level_rewards", "response_mask", "old_log_probs", "sum_pi_squared",
          "rollout_is_weights", "reward_baselines")  # fmt: skip
OPTIONS = ("epsilon", "handle_zero_tail")


class Config(dict):
    """verl's, with `get` and attributes."""

    __getattr__ = dict.__getitem__


@cases(*{case["estimator"] for case in CASES})
def test_the_adapter(case, monkeypatch):
    verl = Namespace(masked_whiten=whiten)
    monkeypatch.setattr(_verl_advantages, "module_of", lambda trainer, name: verl)
    name, settings = case["estimator"], case["settings"]
    words = {each: tensor(case[each]) for each in ARRAYS if each in case}
    words |= {each: settings[each] for each in OPTIONS if each in settings}
    words |= {"index": [f"prompt {each}" for each in case["ids"]], "config": Config(settings)}
    if name == "gdpo":
        keys = ["accuracy", "format"]
        words |= {"batch": {}, "non_tensor_batch": {key: tensor(case[key]).numpy() for key in keys}}
        words["config"] = Config(gdpo_reward_keys=keys, gdpo_reward_weights=settings["weights"])
    advantages, _ = getattr(_verl_advantages, name)(**words)
    mask = words["response_mask"]
    assert (advantages[mask == 0] == 0).all()
    narrow = name in ("gdpo", "grpo_vectorized")
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if narrow else {"rtol": 1e-12, "atol": 1e-14}
    if name != "optimal_token_baseline" or not settings["holes"]:  # above
        assert_near(advantages, case, mask, **tolerance)
