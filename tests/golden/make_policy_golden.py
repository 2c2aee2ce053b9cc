"""Reference values of the policy objectives, from 60-digit arithmetic.

    python tests/golden/make_policy_golden.py        writes policy_golden.json beside this file

The formulas are stated here once more, with their derivatives by branch, and every derivative is
compared with a numerical one before it is written. Inputs are multiples of 2^-10, so that they are
the same numbers in float32, float64 and here.
"""

import json
import pathlib
import random

from mpmath import mp, mpf

mp.dps = 60


def ppo_clip(token, epsilon_low, epsilon_high, dual_clip=None):
    """Loss and d loss / d logp of one token: arXiv:1707.06347 eq. 7, arXiv:1912.09729 eq. 5."""
    ratio = mp.exp(token["logp"] - token["old_logp"])
    advantage = token["advantage"]
    if advantage > 0:
        clipped = ratio > 1 + mpf(epsilon_high)
        loss = -advantage * (1 + mpf(epsilon_high) if clipped else ratio)
        return loss, mpf(0) if clipped else -advantage * ratio
    clipped = ratio < 1 - mpf(epsilon_low)
    loss = -advantage * (1 - mpf(epsilon_low) if clipped else ratio)
    gradient = mpf(0) if clipped else -advantage * ratio
    if dual_clip is not None and loss > -mpf(dual_clip) * advantage:
        return -mpf(dual_clip) * advantage, mpf(0)
    return loss, gradient


def reinforce(token):
    """Williams 1992."""
    return -token["advantage"] * token["logp"], -token["advantage"]


def k3(token):
    """exp(d) - 1 - d of d = ref_logp - logp, and its derivative with respect to logp."""
    d = token["ref_logp"] - token["logp"]
    return mp.exp(d) - 1 - d, 1 - mp.exp(d)


def checked(formula, token, **options):
    """Value and derivative, the latter compared with a central difference."""
    value, gradient = formula(token, **options)
    step = mpf(10) ** -25
    up = formula({**token, "logp": token["logp"] + step}, **options)[0]
    down = formula({**token, "logp": token["logp"] - step}, **options)[0]
    assert abs((up - down) / (2 * step) - gradient) < mpf(10) ** -18 * (1 + abs(gradient)), token
    return value, gradient


SURROGATES = {
    "ppo": (ppo_clip, {"epsilon_low": 0.2, "epsilon_high": 0.2}, 0),
    "grpo": (ppo_clip, {"epsilon_low": 0.2, "epsilon_high": 0.2}, 0.04),
    "dapo": (ppo_clip, {"epsilon_low": 0.2, "epsilon_high": 0.28}, 0),
    "reinforce": (reinforce, {}, 0),
}
AGGREGATIONS = {
    "ppo": "token_mean",
    "grpo": "sequence_mean_token_mean",
    "dapo": "token_mean",
    "reinforce": "token_mean",
}


def random_token(rng, spread):
    grid = lambda x: mpf(round(x * 1024)) / 1024
    logp = grid(-rng.expovariate(0.7) - 0.01)
    return {
        "logp": logp,
        "old_logp": logp - grid(rng.gauss(0, spread)),
        "ref_logp": logp + grid(rng.gauss(0, spread)),
        "advantage": grid(rng.choice([-1, 1]) * rng.uniform(0.1, 2)),
    }


def row_factor(mode, constant, tokens, sequences, row_tokens):
    return {
        "token_mean": lambda: 1 / mpf(tokens),
        "sequence_mean_token_mean": lambda: 1 / (mpf(sequences) * row_tokens),
        "sequence_mean_token_sum": lambda: 1 / mpf(sequences),
        "sequence_sum_over_constant": lambda: 1 / (mpf(sequences) * mpf(constant)),
    }[mode]()


def batch(name, rng, lengths, columns, objective, options, beta, mode, constant=1):
    """A ragged batch: row i has lengths[i] tokens, the rest of its columns is masked."""
    formula = SURROGATES[objective][0]
    tokens, sequences = sum(lengths), sum(n > 0 for n in lengths)
    out = {"name": name, "preset": name.endswith("preset"), "objective": objective, "options": options, "beta": beta,
           "aggregation": mode, "constant": constant, "rows": len(lengths), "columns": columns,
           "response_mask": [], "logps": [], "old_logps": [], "ref_logps": [], "advantages": [],
           "dlogps": []}
    loss = mpf(0)
    for n in lengths:
        for t in range(columns):
            token = random_token(rng, 0.4)
            active = t < n
            out["response_mask"].append(int(active))
            for key, column in (("logp", "logps"), ("old_logp", "old_logps"),
                                ("ref_logp", "ref_logps"), ("advantage", "advantages")):
                out[column].append(float(token[key]))
            gradient = mpf(0)
            if active:
                factor = row_factor(mode, constant, tokens, sequences, n)
                value, slope = checked(formula, token, **options)
                penalty, penalty_slope = checked(k3, token)
                loss += factor * (value + mpf(beta) * penalty)
                gradient = factor * (slope + mpf(beta) * penalty_slope)
            out["dlogps"].append(number(gradient))
    out["loss"] = number(loss)
    return out


def number(x):
    return float(mp.nstr(x, 20))


def main():
    rng = random.Random(20)
    surrogates = {}
    for name, (formula, options, _) in SURROGATES.items():
        rows = []
        for spread in (0.01, 0.3, 1, 4):
            for _ in range(12):
                token = random_token(rng, spread)
                rows.append([float(token[k]) for k in ("logp", "old_logp", "ref_logp", "advantage")]
                            + [number(x) for x in checked(formula, token, **options)])
        surrogates[name] = rows
    lengths = [5, 0, 1, 7, 3]
    batches = [batch(f"{name} preset", rng, lengths, 7, name, options, beta, AGGREGATIONS[name])
               for name, (_, options, beta) in SURROGATES.items()]
    clip = {"epsilon_low": 0.125, "epsilon_high": 0.25, "dual_clip": 1.5}
    for mode, constant in (("token_mean", 1), ("sequence_mean_token_mean", 1),
                           ("sequence_mean_token_sum", 1), ("sequence_sum_over_constant", 6)):
        batches.append(batch(f"ppo dual clip, k3, {mode}", rng, lengths, 9, "ppo", clip, 0.5, mode,
                             constant))
    path = pathlib.Path(__file__).with_name("policy_golden.json")
    path.write_text(json.dumps({"columns": ["logp", "old_logp", "ref_logp", "advantage", "loss",
                                            "dlogp"],
                                "surrogates": surrogates, "batches": batches}, indent=1) + "\n")


if __name__ == "__main__":
    main()
