"""Records how TRL's trainers of groups make advantages of rewards.

    build/peers/trl/bin/python tests/peers/record_trl_advantages.py

writes tests/golden/peers/trl_advantages.json. The statements stand in the middle of
`_generate_and_score_completions`, which generates before: they are taken from its source as they
are, and run on rewards that are given.
"""

import ast
import inspect
import textwrap
import types

import recording
import torch
from recording import normal
from trl import GRPOTrainer, RLOOTrainer

Namespace = types.SimpleNamespace


def statements_of(trainer, first, last):
    """From the first statement that says `first` to the next that says `last`."""
    function = trainer._generate_and_score_completions
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    said = [ast.unparse(statement) for statement in tree.body]
    begin = next(i for i, each in enumerate(said) if first in each)
    end = next(i for i, each in enumerate(said) if i >= begin and last in each)
    body = ast.Module(tree.body[begin : end + 1], [])
    return compile(body, inspect.getsourcefile(function), "exec"), function.__globals__


GRPO = statements_of(GRPOTrainer, "unscorable_mask = ", "nan_to_num")
RLOO = statements_of(RLOOTrainer, "grouped_rewards = ", "nan_to_num")
SIZE = 4


def rewards_of(seed, functions, missing):
    """Four groups; one of equal rewards, and with `missing` some that are none."""
    rewards = normal(torch.Generator().manual_seed(seed), 4 * SIZE, functions)
    rewards[:SIZE] = 0.75
    if missing:
        rewards[5] = rewards[8:11] = torch.nan  # no function has one
        rewards[13, 0] = torch.nan
    return rewards


def case_of(seed, trainer, settings, functions=1, missing=False):
    rewards = rewards_of(seed, functions, missing)
    weights = torch.tensor([1.0, 0.25][:functions], dtype=torch.float64)
    names = {
        "self": Namespace(**settings, reward_weights=weights, reward_funcs=[None] * functions),
        "rewards_per_func": rewards,
        "rewards": rewards[:, 0],
        "num_generations": SIZE,
        "device": "cpu",
    }
    code, module = {"grpo": GRPO, "rloo": RLOO}[trainer]
    exec(code, dict(module), names)
    words = [trainer, *settings.values(), *(["missing"] if missing else [])]
    case = {"name": ", ".join(map(str, words)), "trainer": trainer, "settings": settings}
    numbers = [[None if x != x else x for x in row] for row in rewards.tolist()]
    return case | {"rewards": numbers, "weights": weights, "advantages": names["advantages"]}


def cases():
    scales = [
        {"multi_objective_aggregation": "sum_then_normalize", "scale_rewards": scale}
        for scale in ("group", "batch", "none")
    ]
    several = {"multi_objective_aggregation": "normalize_then_sum"}
    plans = [("grpo", each, 1, missing) for each in scales for missing in (False, True)]
    plans += [("grpo", several, 2, missing) for missing in (False, True)]
    plans += [
        ("rloo", {"normalize_advantages": each}, 1, missing)
        for each in (False, True)
        for missing in (False, True)
    ]
    return [case_of(seed, *plan) for seed, plan in enumerate(plans)]


if __name__ == "__main__":
    functions = [each._generate_and_score_completions for each in (GRPOTrainer, RLOOTrainer)]
    recording.write("trl_advantages.json", "trl", functions, cases())
