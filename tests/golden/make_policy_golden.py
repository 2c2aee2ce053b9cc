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
    """Loss and d loss / d log_ratio: arXiv:1707.06347 eq. 7, arXiv:1912.09729 eq. 5."""
    ratio = mp.exp(token["log_ratio"])
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


def is_reinforce(token, ratio_low, ratio_high, frozen=None):
    """-sg(clip(ratio)) A logp, arXiv:2506.13585 eq. 4; the weight is `frozen`'s."""
    ratio = mp.exp((frozen or token)["log_ratio"])
    weight = min(max(ratio, mpf(ratio_low)), mpf(ratio_high))
    return -weight * token["advantage"] * token["logp"], -weight * token["advantage"]


def k1(d):
    return -d, mpf(1)


def k2(d):
    return d * d / 2, -d


def k3(d):
    return mp.exp(d) - 1 - d, 1 - mp.exp(d)


KL = {"k1": k1, "k2": k2, "k3": k3}


def kl_term(token, estimator="k3", gradient="k3", correction="none"):
    """rho K(d) and the derivative of rho G(d) by logp, d = ref_logp - logp."""
    d = token["ref_logp"] - token["own_logp"]
    rho = mpf(1) if correction == "none" else mp.exp(token["own_logp"] - token["old_logp"])
    source, slope = KL[gradient](d)
    through_rho = source if correction == "ratio" else 0
    return rho * KL[estimator](d)[0], rho * (slope + through_rho)


STEP = mpf(10) ** -25


def moved(token, step, keys):
    return {**token, **{key: token[key] + step for key in keys}}


def checked(formula, token, keys=("logp", "log_ratio"), **options):
    """Value and derivative, the latter compared with a central difference in `keys`."""
    value, gradient = formula(token, **options)
    frozen = {"frozen": token} if formula is is_reinforce else {}
    up = formula(moved(token, STEP, keys), **options, **frozen)[0]
    down = formula(moved(token, -STEP, keys), **options, **frozen)[0]
    assert abs((up - down) / (2 * STEP) - gradient) < mpf(10) ** -18 * (1 + abs(gradient)), token
    return value, gradient


CLIP = {"epsilon_low": 0.2, "epsilon_high": 0.2}
TIGHT = {"epsilon_low": 3e-4, "epsilon_high": 4e-4}
SURROGATES = {
    "ppo": (ppo_clip, CLIP, 0),
    "ppo_dual_clip": (ppo_clip, CLIP | {"dual_clip": 3}, 0),
    "grpo": (ppo_clip, CLIP, 0),
    "dapo": (ppo_clip, {"epsilon_low": 0.2, "epsilon_high": 0.28}, 0),
    "bnpo": (ppo_clip, CLIP, 0),
    "dr_grpo": (ppo_clip, CLIP, 0),
    "gspo": (ppo_clip, TIGHT, 0),
    "gspo_token": (ppo_clip, TIGHT, 0),
    "cispo": (is_reinforce, {"ratio_low": 0, "ratio_high": 5}, 0),
    "rloo": (ppo_clip, CLIP, 0),
    "reinforce": (reinforce, {}, 0),
}
AGGREGATIONS = {
    "grpo": "sequence_mean_token_mean",
    "dr_grpo": "sequence_sum_over_constant",
    "gspo": "sequence_mean_token_mean",
    "gspo_token": "sequence_mean_token_mean",
    "rloo": "sequence_mean_token_mean",
}
LEVELS = {"gspo": "sequence_mean", "gspo_token": "sequence_token", "rloo": "sequence_sum"}


def random_token(rng, spread):
    def grid(x):
        return mpf(round(x * 1024)) / 1024

    logp = grid(-rng.expovariate(0.7) - 0.01)
    log_ratio = grid(rng.gauss(0, spread))
    return {
        "logp": logp,
        "own_logp": logp,
        "old_logp": logp - log_ratio,
        "log_ratio": log_ratio,
        "ref_logp": logp + grid(rng.gauss(0, spread)),
        "advantage": grid(rng.choice([-1, 1]) * rng.uniform(0.1, 2)),
    }


def row_factor(mode, constant, tokens, sequences, row_tokens):
    return {
        "token_mean": lambda: 1 / mpf(tokens),
        "sequence_mean_token_mean": lambda: 1 / (mpf(sequences) * row_tokens),
        "sequence_mean_token_sum": lambda: 1 / mpf(sequences),
        "sequence_sum_over_constant": lambda: 1 / (mpf(sequences) * mpf(constant)),
        "token_sum": lambda: mpf(1),
    }[mode]()


def levelled(row, level):
    """The tokens of a row as the surrogate sees them (rl/level.h)."""
    if level == "token":
        return row
    over = 1 if level == "sequence_sum" else len(row)
    log_ratio = mp.fsum(token["log_ratio"] for token in row) / over
    logp = mp.fsum(token["logp"] for token in row) / over
    shared = {"log_ratio": log_ratio}
    if level != "sequence_token":
        shared["logp"] = logp
    return [{**token, **shared} for token in row]


def row_penalties(row, level, estimator="k3", gradient="k3", correction="none"):
    """rho K of each token, and the derivative of the row's sum of rho G by its logp."""
    if "level" not in correction:
        return [kl_term(token, estimator, gradient, correction) for token in row]
    own = [token["own_logp"] - token["old_logp"] for token in row]
    d = [token["ref_logp"] - token["own_logp"] for token in row]
    over = len(row) if level in ("sequence_mean", "sequence_token") else 1
    rho = [mp.exp(each if level == "token" else mp.fsum(own) / over) for each in own]
    source = [KL[gradient](each) for each in d]
    slopes = [r * slope for r, (_, slope) in zip(rho, source, strict=True)]
    if correction == "level_ratio":
        shared = level in ("sequence_mean", "sequence_sum")
        total = mp.fsum(r * value for r, (value, _) in zip(rho, source, strict=True)) / over
        slopes = [
            slope + (total if shared else r * value)
            for slope, r, (value, _) in zip(slopes, rho, source, strict=True)
        ]
    return [
        (r * KL[estimator](each)[0], slope) for r, each, slope in zip(rho, d, slopes, strict=True)
    ]


def row_loss(row, formula, options, level, factor, beta, kl, slopes=None):
    """The loss of a row, and its derivatives by every logp into `slopes`."""
    loss, each_slope = mpf(0), []
    for token in levelled(row, level):
        value, slope = checked(formula, token, **options)
        loss += factor * value
        each_slope.append(factor * slope)
    if level in ("sequence_mean", "sequence_sum"):
        over = 1 if level == "sequence_sum" else len(row)
        each_slope = [mp.fsum(each_slope) / over] * len(row)
    penalties = row_penalties(row, level, **kl)
    for i, (penalty, slope) in enumerate(penalties):
        loss += factor * mpf(beta) * penalty
        each_slope[i] += factor * mpf(beta) * slope
    if slopes is not None:
        slopes.extend(each_slope)
    return loss


def batch(
    name, rng, lengths, columns, objective, options, beta, mode, constant=1, level="token", kl=None
):
    """A ragged batch: row i has lengths[i] tokens, the rest of its columns is masked."""
    formula, kl = SURROGATES[objective][0], kl or {}
    tokens, sequences = sum(lengths), sum(n > 0 for n in lengths)
    choices = {"aggregation": mode, "level": level}
    choices |= {f"kl_{key}": value for key, value in kl.items()}
    if kl:
        choices["allow_biased_gradient"] = "true"
    out = {
        "name": name,
        "preset": name.endswith("preset"),
        "objective": objective,
        "options": options,
        "beta": beta,
        "choices": choices,
        "constant": constant,
        "rows": len(lengths),
        "columns": columns,
        "response_mask": [],
        "logps": [],
        "old_logps": [],
        "ref_logps": [],
        "advantages": [],
        "dlogps": [],
    }
    loss = mpf(0)
    for n in lengths:
        row = [random_token(rng, 0.4) for _ in range(columns)]
        for t, token in enumerate(row):
            out["response_mask"].append(int(t < n))
            for key, column in (
                ("logp", "logps"),
                ("old_logp", "old_logps"),
                ("ref_logp", "ref_logps"),
                ("advantage", "advantages"),
            ):
                out[column].append(float(token[key]))
        slopes = []
        if n > 0:
            factor = row_factor(mode, constant, tokens, sequences, n)
            arguments = (formula, options, level, factor, beta, kl)
            loss += row_loss(row[:n], *arguments, slopes)
            is_derivative = formula is not is_reinforce and level != "sequence_token"
            if is_derivative and kl.get("estimator", "k3") == kl.get("gradient", "k3"):
                check_row(row[:n], arguments, slopes)
        out["dlogps"] += [number(slope) for slope in slopes] + [0.0] * (columns - n)
    out["loss"] = number(loss)
    return out


def check_row(row, arguments, slopes):
    """The derivatives against central differences of the whole row."""
    if "detached" in arguments[-1].get("correction", "none"):
        return
    for t, slope in enumerate(slopes):
        around = []
        for step in (STEP, -STEP):
            other = list(row)
            other[t] = moved(row[t], step, ("logp", "own_logp", "log_ratio"))
            around.append(row_loss(other, *arguments))
        assert abs((around[0] - around[1]) / (2 * STEP) - slope) < mpf(10) ** -18, (t, slope)


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
                rows.append(
                    [float(token[k]) for k in ("logp", "old_logp", "ref_logp", "advantage")]
                    + [number(x) for x in checked(formula, token, **options)]
                )
        surrogates[name] = rows
    lengths = [5, 0, 1, 7, 3]
    batches = [
        batch(
            f"{name} preset",
            rng,
            lengths,
            7,
            name,
            options,
            beta,
            AGGREGATIONS.get(name, "token_mean"),
            level=LEVELS.get(name, "token"),
        )
        for name, (_, options, beta) in SURROGATES.items()
    ]
    clip = {"epsilon_low": 0.125, "epsilon_high": 0.25, "dual_clip": 1.5}
    for mode, constant in (
        ("token_mean", 1),
        ("sequence_mean_token_mean", 1),
        ("sequence_mean_token_sum", 1),
        ("sequence_sum_over_constant", 6),
    ):
        for level in ("token", "sequence_mean", "sequence_token", "sequence_sum"):
            batches.append(
                batch(
                    f"ppo dual clip, k3, {level}, {mode}",
                    rng,
                    lengths,
                    9,
                    "ppo",
                    clip,
                    0.5,
                    mode,
                    constant,
                    level,
                )
            )
    for level in ("sequence_mean", "sequence_sum"):
        batches.append(
            batch(
                f"reinforce, {level}",
                rng,
                lengths,
                7,
                "reinforce",
                {},
                0,
                "token_mean",
                level=level,
            )
        )
        batches.append(
            batch(
                f"cispo, {level}",
                rng,
                lengths,
                7,
                "cispo",
                {"ratio_low": 0.75, "ratio_high": 1.25},
                0,
                "token_mean",
                level=level,
            )
        )
    for correction in ("none", "ratio", "detached_ratio"):
        for estimator in KL:
            for gradient in KL:
                kl = {"estimator": estimator, "gradient": gradient, "correction": correction}
                batches.append(
                    batch(
                        f"ppo, {estimator}, gradient of {gradient}, {correction}",
                        rng,
                        [4, 2],
                        4,
                        "ppo",
                        clip,
                        0.5,
                        "token_mean",
                        kl=kl,
                    )
                )
    for correction in ("level_ratio", "detached_level_ratio"):
        for level in ("token", "sequence_mean", "sequence_token", "sequence_sum"):
            for estimator, gradient in (("k3", "k3"), ("k1", "k2"), ("k2", "k1")):
                kl = {"estimator": estimator, "gradient": gradient, "correction": correction}
                batches.append(
                    batch(
                        f"ppo, {estimator}, gradient of {gradient}, {correction}, {level}",
                        rng,
                        [4, 0, 1, 3],
                        4,
                        "ppo",
                        clip,
                        0.5,
                        "token_mean",
                        level=level,
                        kl=kl,
                    )
                )
    batches.append(batch("ppo, token_sum", rng, lengths, 7, "ppo", clip, 0.5, "token_sum"))
    path = pathlib.Path(__file__).with_name("policy_golden.json")
    path.write_text(
        json.dumps(
            {
                "columns": ["logp", "old_logp", "ref_logp", "advantage", "loss", "dlogp"],
                "surrogates": surrogates,
                "batches": batches,
            },
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
