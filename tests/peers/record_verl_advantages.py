"""Records those of verl's advantages that record_verl.py does not, on random ragged batches.

    build/peers/verl/bin/python tests/peers/record_verl_advantages.py

writes tests/golden/peers/verl_estimators.json. grpo_vectorized is in float32, and what gdpo reads.
The masks are float64: with integers verl rounds n / (n - 1) to float32 where it whitens. Token
baselines have 1e-300 in place of the 1e-8 that verl adds to their denominators.
"""

import numpy as np
import recording
import torch
from recording import normal, ragged_mask
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos

ALGOS = {
    "gpg": core_algos.compute_gpg_outcome_advantage,
    "grpo_passk": core_algos.compute_grpo_passk_outcome_advantage,
    "grpo_vectorized": core_algos.compute_grpo_vectorized_outcome_advantage,
    "reinforce_plus_plus_baseline": (
        core_algos.compute_reinforce_plus_plus_baseline_outcome_advantage
    ),
    "gdpo": core_algos.compute_gdpo_outcome_advantage,
    "reinforce_plus_plus": core_algos.compute_reinforce_plus_plus_outcome_advantage,
    "remax": core_algos.compute_remax_outcome_advantage,
    "optimal_token_baseline": core_algos.compute_optimal_token_baseline_advantage,
    "tir_optimal_token_baseline": core_algos.compute_multi_turn_optimal_token_baseline_advantage,
}
# Interleaved groups of different sizes; of id 5 there is one answer, which grpo_passk refuses.
IDS = (0, 1, 0, 2, 5, 1, 0, 2, 1, 0, 2)
COLUMNS = 6


def case_of(name, seed, arrays, settings, options=None, **words):
    """What is recorded, and what verl is called with beside it."""
    options = options or {}
    arguments = {key: each for key, each in arrays.items() if key != "ids"}
    arguments |= {"index": np.array(arrays["ids"]), **words, **options}
    advantages, returns = ALGOS[name](**arguments)
    head = {"estimator": name, "seed": seed, "settings": settings | options}
    out = {"advantages": advantages}
    if returns is not advantages:
        out["returns"] = returns
    return head | arrays | out


def answers(seed, ids=IDS):
    """One reward an answer, at its last slot; those of id 2 are equal, of id 1 two are 0."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.zeros(len(ids), COLUMNS, dtype=torch.float64)
    rewards[:, -1] = normal(generator, len(ids))
    of = torch.tensor(ids)
    rewards[of == 2, -1] = 0.75
    rewards[(of == 1).nonzero()[:2], -1] = 0
    mask = ragged_mask(generator, len(ids), COLUMNS, empty_row=False).double()
    return {"token_level_rewards": rewards, "response_mask": mask, "ids": list(ids)}


def grouped_case(name, seed, config=None, ids=IDS, **options):
    words = {} if config is None else {"config": AlgoConfig(**config)}
    return case_of(name, seed, answers(seed, ids), config or {}, options, **words)


def gdpo_case(seed, weights):
    """Two rewards an answer, of which the second is the same for a group."""
    generator = torch.Generator().manual_seed(seed)
    rewards = {name: normal(generator, len(IDS)) for name in ("accuracy", "format")}
    rewards["format"][torch.tensor(IDS) == 1] = 0.5
    config = AlgoConfig(gdpo_reward_keys=list(rewards), gdpo_reward_weights=weights)
    attention = torch.ones(len(IDS), 1 + COLUMNS, dtype=torch.long)
    words = {
        "config": config,
        "non_tensor_batch": {name: each.numpy() for name, each in rewards.items()},
        "batch": {"prompts": attention[:, :1], "attention_mask": attention},
    }
    case = case_of("gdpo", seed, answers(seed), {"weights": weights}, **words)
    return case | {name: each.tolist() for name, each in rewards.items()}


def tokens(seed, holes):
    """Rewards along the way; with `holes` there are masked slots between tokens."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(IDS), COLUMNS)
    mask = ragged_mask(generator, *shape, empty_row=False)
    if not holes:
        mask = torch.arange(COLUMNS) < mask.sum(1, keepdim=True)
    rewards = normal(generator, *shape)
    return {"token_level_rewards": rewards, "response_mask": mask.double(), "ids": list(IDS)}


def token_case(name, seed, holes=True, weighted=False, gamma=None, **options):
    arrays, words = tokens(seed, holes), {}
    generator = torch.Generator().manual_seed(100 + seed)
    shape = arrays["response_mask"].shape
    if gamma is not None:
        words["config"] = AlgoConfig(gamma=gamma)
    if name == "remax":
        arrays["reward_baselines"] = normal(generator, len(IDS))
    if "token_baseline" in name:
        logps = -normal(generator, *shape).abs() - 0.25
        rest = 1 - logps.exp()  # of four more ids
        arrays["old_log_probs"] = logps
        arrays["sum_pi_squared"] = (2 * logps).exp() + rest.square() / 4
        words["epsilon"] = 1e-300
    if weighted:
        arrays["rollout_is_weights"] = normal(generator, *shape).abs() + 0.25
    settings = {"holes": holes} | ({} if gamma is None else {"gamma": gamma})
    return case_of(name, seed, arrays, settings, options, **words)


def cases():
    plain, scaled = ({"norm_adv_by_std_in_grpo": each} for each in (False, True))
    pairs = tuple(each for each in IDS if each != 5)
    of_turns = "tir_optimal_token_baseline"
    return [
        grouped_case("gpg", 0),
        grouped_case("grpo_passk", 1, plain, pairs),
        grouped_case("grpo_passk", 2, scaled, pairs),
        grouped_case("grpo_passk", 3, scaled, pairs, epsilon=0.5),
        grouped_case("grpo_vectorized", 4),
        grouped_case("reinforce_plus_plus_baseline", 5),
        gdpo_case(6, None),
        gdpo_case(7, [1.0, 0.25]),
        token_case("reinforce_plus_plus", 8, gamma=1.0),
        token_case("reinforce_plus_plus", 9, gamma=0.9),
        token_case("remax", 10),
        token_case("optimal_token_baseline", 11, holes=False),
        token_case("optimal_token_baseline", 12, holes=False, weighted=True),
        token_case("optimal_token_baseline", 13, holes=False, handle_zero_tail=False),
        token_case("optimal_token_baseline", 46, holes=True),
        token_case(of_turns, 15),
        token_case(of_turns, 16, weighted=True),
        token_case(of_turns, 17, handle_zero_tail=False),
    ]


if __name__ == "__main__":
    recording.write("verl_estimators.json", "verl", list(ALGOS.values()), cases())
