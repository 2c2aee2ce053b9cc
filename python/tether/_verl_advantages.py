"""verl's advantages in tether's words, called as verl calls its own. Imports nothing of verl until
one of them whitens, which verl's own function does.

A group of one keeps its raw reward where verl's does.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor

from tether._trainers import module_of
from tether.advantages import advantage, discounted_returns, ids_of_labels

Index = Iterable[Hashable]  # labels of groups
Result = tuple[Tensor, Tensor]  # advantages and returns


def _whitened(x: Tensor, response_mask: Tensor) -> Tensor:
    whiten = module_of("verl", "verl.utils.torch_functional").masked_whiten
    with torch.no_grad():
        return whiten(x, response_mask) * response_mask


# ---- one reward an answer ------------------------------------------------------------------------


def _of_rewards(
    rule: str,
    rewards: Tensor,
    response_mask: Tensor,
    index: Index | None,
    *,
    alone: bool = True,
    **options: Any,
) -> Tensor:
    """[B, T], by a rule of groups; an answer without others keeps its reward where `alone`."""
    if index is None:
        raise ValueError("tether.verl: index (uid) must be given, got none")
    ids = ids_of_labels(index).to(response_mask.device)
    lengths = response_mask.sum(-1) if rule == "opo" else None
    out = advantage(rule, rewards, groups=ids, lengths=lengths, **options).advantages
    if alone:
        one = torch.ones((), device=rewards.device)  # their deviation, a float32 in verl
        raw = rewards / (one + options["epsilon"]) if "epsilon" in options else rewards
        out = torch.where(torch.bincount(ids)[ids] == 1, raw, out)
    return out[:, None] * response_mask


def of_groups(
    rule: str,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Index | None,
    **options: Any,
) -> Result:
    """A rule of groups on the sums of rewards."""
    rewards = token_level_rewards.detach().sum(-1)
    out = _of_rewards(rule, rewards, response_mask, index, **options)
    return out, out


def _grpo_rule(scaled: bool, epsilon: float) -> tuple[str, dict[str, float]]:
    return ("grpo", {"epsilon": epsilon}) if scaled else ("dr_grpo", {})


def grpo(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Index | None = None,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    config: Any = None,
) -> Result:
    rule, options = _grpo_rule(norm_adv_by_std_in_grpo, epsilon)
    return of_groups(rule, token_level_rewards, response_mask, index, **options)


def grpo_vectorized(*batch: Any, **options: Any) -> Result:
    return grpo(*batch, **options)


def _by_rule(rule: str, **options: Any) -> Callable[..., Result]:
    def estimator(
        token_level_rewards: Tensor, response_mask: Tensor, index: Index | None = None, **_: Any
    ) -> Result:
        return of_groups(rule, token_level_rewards, response_mask, index, **options)

    return estimator


rloo, rloo_vectorized = _by_rule("rloo"), _by_rule("rloo", alone=False)
opo = _by_rule("opo")


def grpo_passk(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Index | None = None,
    epsilon: float = 1e-6,
    config: Any = None,
    **_: Any,
) -> Result:
    scaled = config is None or config.get("norm_adv_by_std_in_grpo", True)
    options = {"scale": "group_std" if scaled else "none", "epsilon": epsilon}
    batch = (token_level_rewards, response_mask, index)
    return of_groups("pass_at_k", *batch, alone=False, **options)


def gpg(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Index | None = None,
    f_norm: float = 1.0,
    **_: Any,
) -> Result:
    """Centred, times answers over rewards that are not 0."""
    centred, _ = of_groups("dr_grpo", token_level_rewards, response_mask, index)
    rewards = token_level_rewards.sum(-1)
    out = centred * (len(rewards) / torch.count_nonzero(rewards).clamp_min(1) / f_norm)
    return out, out


def gdpo(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Index | None = None,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    config: Any = None,
    non_tensor_batch: Any = None,
    batch: Any = None,
    **_: Any,
) -> Result:
    """GRPO of each reward, weighed, added up and whitened over tokens."""
    rewards, weights = [token_level_rewards.detach().sum(-1)], None
    if config is not None and non_tensor_batch is not None and batch is not None:
        keys, weights = config.get("gdpo_reward_keys"), config.get("gdpo_reward_weights")
        if not keys or not all(key in non_tensor_batch for key in keys):
            known = ", ".join(non_tensor_batch)
            raise ValueError(
                f"tether.verl: gdpo_reward_keys must be of the batch's {known}, got {keys}"
            )
        like = {"dtype": torch.float32, "device": response_mask.device}
        rewards = [torch.as_tensor(non_tensor_batch[key].astype(float), **like) for key in keys]
    rule, options = _grpo_rule(norm_adv_by_std_in_grpo, epsilon)
    each = [_of_rewards(rule, r, response_mask, index, **options) for r in rewards]
    weights = [1.0] * len(each) if weights is None else weights
    total = sum(w * x for w, x in zip(weights, each, strict=True))
    out = _whitened(total, response_mask)
    return out, out


def reinforce_plus_plus_baseline(
    token_level_rewards: Tensor, response_mask: Tensor, index: Index | None = None, **_: Any
) -> Result:
    centred, _ = of_groups("dr_grpo", token_level_rewards, response_mask, index)
    out = _whitened(centred, response_mask)
    return out, out


# ---- rewards of tokens ---------------------------------------------------------------------------


def gae(
    token_level_rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    gamma: float,
    lam: float,
) -> Result:
    """Whitened by verl's own function. A masked slot has the advantage of the token after it."""
    whiten = module_of("verl", "verl.utils.torch_functional").masked_whiten
    with torch.no_grad():
        options = {"gamma": float(gamma), "lambda_": float(lam)}
        each = advantage("gae", token_level_rewards, response_mask, values=values, **options)[0]
        slots = torch.arange(each.shape[1], device=each.device)
        after = torch.where(response_mask.bool(), slots, each.shape[1])
        after = after.flip(1).cummin(1).values.flip(1)
        each = torch.nn.functional.pad(each, (0, 1)).gather(1, after)
        return whiten(each, response_mask), each + values


def reinforce_plus_plus(
    token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, **_: Any
) -> Result:
    gamma = 1.0 if config is None else float(config.gamma)
    returns = discounted_returns(token_level_rewards, response_mask, gamma=gamma)
    return _whitened(returns, response_mask), returns


def remax(
    token_level_rewards: Tensor, reward_baselines: Tensor, response_mask: Tensor, **_: Any
) -> Result:
    """Returns less the reward of the greedy answer: GAE with that as the value of each token."""
    values = reward_baselines[:, None].expand_as(token_level_rewards).to(token_level_rewards)
    return tuple(advantage("gae", token_level_rewards, response_mask, values=values))


def _token_baseline(
    places: Tensor,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Index,
    old_log_probs: Tensor,
    sum_pi_squared: Tensor,
    rollout_is_weights: Tensor | None = None,
    handle_zero_tail: bool = True,
    **_: Any,
) -> Result:
    """OPO among the tokens of a prompt at the same place, which count by the squares of their
    answer's scores up to there; the only one there has no baseline."""
    token = response_mask != 0
    returns = discounted_returns(token_level_rewards, response_mask)
    squares = (1 - 2 * old_log_probs.exp() + sum_pi_squared).clamp_min(0)
    if rollout_is_weights is not None:
        squares = squares * rollout_is_weights.square()
    energies = torch.where(token, squares, 0).cumsum(-1)
    prompts = ids_of_labels(index).to(token.device)[:, None].expand_as(token)
    cells = torch.stack([prompts[token], places[token]])
    _, groups, sizes = cells.unique(dim=1, return_inverse=True, return_counts=True)
    found = advantage("opo", returns[token], groups=groups, lengths=energies[token]).advantages
    answers = torch.bincount(prompts[:, 0], token.any(1).double())[prompts[token]]
    alone = (sizes[groups] == 1) & (handle_zero_tail | (answers == 1))
    out = torch.zeros_like(returns)
    out[token] = torch.where(alone, returns[token], found)
    return out, returns


def optimal_token_baseline(
    token_level_rewards: Tensor, response_mask: Tensor, **arrays: Any
) -> Result:
    """Places are slots."""
    places = torch.ones_like(response_mask).cumsum(-1)
    return _token_baseline(places, token_level_rewards, response_mask, **arrays)


def tir_optimal_token_baseline(
    token_level_rewards: Tensor, response_mask: Tensor, **arrays: Any
) -> Result:
    """Places are tokens of the mask."""
    places = (response_mask != 0).cumsum(-1)
    return _token_baseline(places, token_level_rewards, response_mask, **arrays)


# By the names of verl's estimators, for those that its trainer calls as any.
BY_NAME: dict[str, Callable[..., Result]] = {
    "gpg": gpg,
    "grpo_passk": grpo_passk,
    "reinforce_plus_plus": reinforce_plus_plus,
    "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
    "rloo_vectorized": rloo_vectorized,
}
# By the names of verl's functions: GAE and GRPO are parts of their own.
BY_FUNCTION: dict[str, Callable[..., Result]] = {
    "compute_gdpo_outcome_advantage": gdpo,
    "compute_gpg_outcome_advantage": gpg,
    "compute_grpo_passk_outcome_advantage": grpo_passk,
    "compute_grpo_vectorized_outcome_advantage": grpo_vectorized,
    "compute_multi_turn_optimal_token_baseline_advantage": tir_optimal_token_baseline,
    "compute_opo_outcome_advantage": opo,
    "compute_optimal_token_baseline_advantage": optimal_token_baseline,
    "compute_reinforce_plus_plus_baseline_outcome_advantage": reinforce_plus_plus_baseline,
    "compute_reinforce_plus_plus_outcome_advantage": reinforce_plus_plus,
    "compute_remax_outcome_advantage": remax,
    "compute_rloo_outcome_advantage": rloo,
    "compute_rloo_vectorized_outcome_advantage": rloo_vectorized,
}
