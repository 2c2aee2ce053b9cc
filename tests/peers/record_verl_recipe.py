"""Records verl's normalised importance weights, and the loss of SPPO of its recipes.

    build/peers/parts/bin/python tests/peers/record_verl_recipe.py FOLDER

where FOLDER has a checkout verl-recipe. It writes tests/golden/peers/verl_normalized.json and
verl_sppo.json. Their modules are loaded alone (parts.py).
"""

import pathlib
import sys

import parts
import recording
from recording import policy_batch, with_gradient

RECIPES = pathlib.Path(sys.argv[1]) / "verl-recipe"
ABSENT = ("tensordict", "transformers", "verl.protocol", "verl.trainer.ppo.core_algos",
          "verl.utils.device", "verl.utils.profiler", "verl.utils.py_functional",
          "verl.utils.seqlen_balancing", "verl.workers")  # fmt: skip
parts.load("verl.utils.torch_functional", absent=ABSENT)
CORRECTION = parts.load("verl.trainer.ppo.rollout_corr_helper")
SPPO = parts.load("sppo.dp_actor", root=RECIPES)


def normalized_case(seed, high, level="token", low=None):
    """Weights of active tokens, over their mean; old / engine truncated at high, or 0 outside of
    low .. high."""
    batch = policy_batch(seed)
    gap = batch["old_logps"] - batch["rollout_logps"]
    weights, _ = CORRECTION.compute_rollout_correction_weights(
        gap,
        batch["response_mask"],
        rollout_is=level,
        rollout_is_threshold=high if low is None else f"{low}_{high}",
        rollout_is_batch_normalize=True,
    )
    case = {"name": f"{level}, high {high:g}", "settings": {"high": high, "level": level}}
    if low is not None:
        case["name"] += f", low {low:g}"
        case["settings"]["low"] = low
    return case | batch | {"weights": weights}


def sppo_case(seed, eta):
    batch = policy_batch(seed)

    def evaluate(live):
        arrays = (live["old_logps"], live["logps"], live["advantages"], live["response_mask"])
        return SPPO.compute_sppo_loss(*arrays, eta=eta)[0]

    out = with_gradient(batch, "logps", evaluate)
    return {"name": f"eta {eta:g}", "settings": {"eta": eta}} | batch | out


def main():
    cases = [normalized_case(seed, high) for seed, high in enumerate((2.0, 1.1, 0.9))]
    cases += [normalized_case(3 + i, high, "sequence") for i, high in enumerate((2.0, 1.1))]
    cases += [normalized_case(5, 1.25, low=0.875), normalized_case(6, 2.0, "sequence", low=0.5)]
    functions = [CORRECTION.compute_rollout_correction_weights]
    recording.write("verl_normalized.json", "verl", functions, cases)
    cases = [sppo_case(seed, eta) for seed, eta in enumerate((1.0, 2.5))]
    commit = parts.commit_of(RECIPES)
    recording.write("verl_sppo.json", "verl-recipe", [SPPO.compute_sppo_loss], cases, commit)


if __name__ == "__main__":
    main()
