"""Records the losses of UniRL's DRPO: DRPO itself, and SPO without the weight of the old policy.

    build/peers/parts/bin/python tests/peers/record_unirl.py FOLDER

where FOLDER has a checkout UniRL. It writes tests/golden/peers/unirl_policy.json. The module of the
losses is loaded alone (parts.py); the mean over tokens is its `token-mean`.
"""

import pathlib
import sys

import parts
import recording
from recording import by_token, policy_batch, with_gradient

UNIRL = pathlib.Path(sys.argv[1]) / "UniRL"
ABSENT = ("unirl.types", "unirl.algorithms.base", "unirl.algorithms.grpo")
DRPO = parts.load("unirl.algorithms.drpo", root=UNIRL, absent=ABSENT)
PLANS = [("drpo", 12.5), ("drpo", 0.125), ("spo", 0.25), ("spo", 12.5)]


def case_of(seed, loss, epsilon):
    batch = policy_batch(seed, per_token=seed % 2 == 0)

    def evaluate(live):
        active = live["response_mask"] > 0
        names = {"new_logp": "logps", "old_logp": "old_logps"}
        tokens = {word: live[name][active] for word, name in names.items()}
        tokens["advantages"] = by_token(live["advantages"], active)[active]
        settings = {"epsilon": epsilon, "mu_weighted": loss == "drpo"}
        return DRPO._drpo_loss(**tokens, **settings)[0].mean()

    settings = {"loss": loss, "epsilon": epsilon}
    out = with_gradient(batch, "logps", evaluate)
    return {"name": f"{loss}, epsilon {epsilon:g}", "settings": settings} | batch | out


def main():
    cases = [case_of(seed, *plan) for seed, plan in enumerate(PLANS)]
    recording.write("unirl_policy.json", "unirl", [DRPO._drpo_loss], cases, parts.commit_of(UNIRL))


if __name__ == "__main__":
    main()
