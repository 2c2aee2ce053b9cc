"""Reference values of the policy objectives, from 60-digit arithmetic.

    python tests/golden/make_policy_golden.py        writes policy_golden.json beside this file

The formulas are stated here once more, with their derivatives by branch, and every derivative is
compared with a numerical one before it is written. A formula sees the token and `frozen`, the token
at which whatever has no gradient is held.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from golden import assert_derivative, grid, number, stream, write
from mpmath import mp, mpf

# ---- surrogates ----------------------------------------------------------------------------------


def ppo_clip(token, frozen, epsilon_low, epsilon_high, dual_clip=None):
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


def reinforce(token, frozen):
    """Williams 1992."""
    return -token["advantage"] * token["logp"], -token["advantage"]


def is_reinforce(token, frozen, ratio_low, ratio_high):
    """-sg(clip(ratio)) A logp, arXiv:2506.13585 eq. 4."""
    weight = min(max(mp.exp(frozen["log_ratio"]), mpf(ratio_low)), mpf(ratio_high))
    return -weight * token["advantage"] * token["logp"], -weight * token["advantage"]


def soft_gate(token, frozen, tau_pos, tau_neg):
    """-(4 / tau) sigmoid(tau (ratio - 1)) A, arXiv:2511.20347 eq. 5."""
    ratio, advantage = mp.exp(token["log_ratio"]), token["advantage"]
    tau = mpf(tau_pos if advantage > 0 else tau_neg)
    up, down = (1 / (1 + mp.exp(sign * tau * (ratio - 1))) for sign in (-1, 1))
    return -4 / tau * up * advantage, -4 * up * down * ratio * advantage


def quadratic_bound(token, frozen, epsilon, power):
    """-ratio A + |A| w (ratio - 1)^2 / (2 epsilon), w = sg(e^old_logp)^power, arXiv:2601.22801
    eq. 7, arXiv:2606.09821 eq. 8."""
    ratio, advantage = mp.exp(token["log_ratio"]), token["advantage"]
    w = mp.exp(mpf(power) * min(frozen["logp"] - frozen["log_ratio"], 0))
    loss = abs(advantage) * w * (ratio - 1) ** 2 / (2 * mpf(epsilon)) - ratio * advantage
    return loss, ratio * (abs(advantage) * w * (ratio - 1) / mpf(epsilon) - advantage)


def linear_ratio(token, frozen):
    """-ratio A, arXiv:1707.06347 eq. 6."""
    loss = -mp.exp(token["log_ratio"]) * token["advantage"]
    return loss, loss


def band_clip(token, frozen, epsilon_low, epsilon_high):
    """-clip(ratio) A."""
    ratio, low, high = mp.exp(token["log_ratio"]), 1 - mpf(epsilon_low), 1 + mpf(epsilon_high)
    inside = low <= ratio <= high
    loss = -min(max(ratio, low), high) * token["advantage"]
    return loss, loss if inside else mpf(0)


def quadratic_pull(token, frozen, tau):
    """-(A logp - tau/2 u^2), arXiv:2405.19107."""
    u, advantage = token["log_ratio"], token["advantage"]
    return mpf(tau) / 2 * u * u - advantage * token["logp"], mpf(tau) * u - advantage


def squared_regression(token, frozen, scale, eta):
    """(scale u - eta A)^2, arXiv:2405.00675 and arXiv:2505.20686."""
    error = mpf(scale) * token["log_ratio"] - mpf(eta) * token["advantage"]
    return error**2, 2 * mpf(scale) * error


def tapered_reinforce(token, frozen, weight_pos, weight_neg, ratio_high):
    """-W A logp, W by the sign of A, arXiv:2503.14286."""
    tapered = mpf(weight_neg) * min(mp.exp(frozen["log_ratio"]), mpf(ratio_high))
    weight = tapered if token["advantage"] < 0 else mpf(weight_pos)
    return -weight * token["advantage"] * token["logp"], -weight * token["advantage"]


class Row(NamedTuple):
    """A row of rl/catalogue.h, as its preset has it."""

    formula: Callable
    options: dict
    level: str = "token"
    aggregation: str = "token_mean"
    log_ratio_clip: float | None = None
    weights: dict | None = None
    beta: float = 0
    kl: dict | None = None


CLIP = {"epsilon_low": 0.2, "epsilon_high": 0.2}
TIGHT = {"epsilon_low": 3e-4, "epsilon_high": 4e-4}
OFF = {"epsilon_low": 1, "epsilon_high": 1e300}
CUT = {"ratio_low": 0, "ratio_high": 20}
BY_SEQUENCE = "sequence_mean_token_mean"
ROWS = {
    "ppo": Row(ppo_clip, CLIP),
    "ppo_dual_clip": Row(ppo_clip, CLIP | {"dual_clip": 3}),
    "grpo": Row(ppo_clip, CLIP, aggregation=BY_SEQUENCE),
    "dapo": Row(ppo_clip, {"epsilon_low": 0.2, "epsilon_high": 0.28}),
    "bnpo": Row(ppo_clip, CLIP),
    "dr_grpo": Row(ppo_clip, CLIP, aggregation="sequence_sum_over_constant"),
    "gspo": Row(ppo_clip, TIGHT, "sequence_mean", BY_SEQUENCE),
    "gspo_token": Row(ppo_clip, TIGHT, "sequence_token", BY_SEQUENCE),
    "gmpo": Row(ppo_clip, OFF, "sequence_mean", BY_SEQUENCE, 0.4),
    "cispo": Row(is_reinforce, {"ratio_low": 0, "ratio_high": 5}),
    "rloo": Row(ppo_clip, CLIP, "sequence_sum", BY_SEQUENCE),
    "reinforce": Row(reinforce, {}),
    "sapo": Row(soft_gate, {"tau_pos": 1, "tau_neg": 1.05}, aggregation=BY_SEQUENCE),
    "cfpo": Row(quadratic_bound, {"epsilon": 0.2, "power": 0}, aggregation=BY_SEQUENCE),
    "drpo": Row(quadratic_bound, {"epsilon": 12.5, "power": 1}),
    "luspo": Row(ppo_clip, TIGHT, "sequence_mean", "sequence_mean_token_sum"),
    "gpg": Row(reinforce, {}),
    "linear": Row(linear_ratio, {}),
    "band": Row(band_clip, CLIP),
    "dro": Row(quadratic_pull, {"tau": 0.1}),
    "kimi": Row(quadratic_pull, {"tau": 0.1}, "sequence_sum", BY_SEQUENCE),
    "sppo": Row(squared_regression, {"scale": 1, "eta": 1}, "sequence_sum", BY_SEQUENCE),
    "a2po": Row(squared_regression, {"scale": 1e-3, "eta": 1}, "sequence_sum", BY_SEQUENCE),
    "topr": Row(
        tapered_reinforce,
        {"weight_pos": 1, "weight_neg": 1, "ratio_high": 1},
        "sequence_sum",
        BY_SEQUENCE,
    ),
    "dppo_tv": Row(is_reinforce, CUT, weights={"tv_mask": {}}),
    "dppo_kl": Row(is_reinforce, CUT, weights={"kl_mask": {}}),
    "vespo": Row(reinforce, {}, weights={"vespo": {"level": "sequence_sum"}}),
    "decoupled_ppo": Row(ppo_clip, CLIP, weights={"truncated_importance": {"high": 1e300}}),
    "rollout_is": Row(reinforce, {}, weights={"masked_ratio": {}}),
    "kl_cov": Row(
        linear_ratio,
        {},
        beta=1,
        kl={"estimator": "abs", "gradient": "abs", "reference": "old"},
    ),
    "rec_one_side": Row(reinforce, {}, weights={"clip_mask": {}}),
    "rec_two_side": Row(reinforce, {}, weights={"ring_mask": {"far_low": 1, "far_high": 1e300}}),
    "rec_ring": Row(reinforce, {}, weights={"ring_mask": {}}),
}


def moved(token, step, keys):
    return {**token, **{key: token[key] + step for key in keys}}


def checked(formula, token, **options):
    """Value and derivative by logp, the latter compared with a central difference."""
    value, gradient = formula(token, token, **options)
    keys = ("logp", "log_ratio")
    assert_derivative(
        lambda step: formula(moved(token, step, keys), token, **options)[0], gradient, token
    )
    return value, gradient


# ---- the penalty ---------------------------------------------------------------------------------


def k1(d):
    return -d, mpf(1)


def k2(d):
    return d * d / 2, -d


def k3(d):
    return mp.exp(d) - 1 - d, 1 - mp.exp(d)


def k_abs(d):
    return abs(d), -mp.sign(d)


def low_var_kl(d):
    value, slope = k3(d)
    return (mpf(10), mpf(0)) if value > 10 else (value, slope)


KL = {"k1": k1, "k2": k2, "k3": k3, "low_var_kl": low_var_kl, "abs": k_abs}


def counted(token, clip):
    """The log-ratio of a token, and whether it moves: min(u, clip) where A > 0, max(u, -clip) where
    A < 0. arXiv:2507.20673, eq. 4."""
    u = token["own_logp"] - token["old_logp"]
    if clip is None:
        return u, True
    beyond = u > mpf(clip) if token["advantage"] > 0 else u < -mpf(clip)
    return (mp.sign(token["advantage"]) * mpf(clip), False) if beyond else (u, True)


def log_ratios(row, frozen, level, clip=None):
    """Of each token at the level (rl/level.h)."""
    own, held = ([counted(token, clip)[0] for token in each] for each in (row, frozen))
    if level == "token":
        return own
    if level == "sequence_token":
        mean = mp.fsum(held) / len(held)
        return [each - start + mean for each, start in zip(own, held, strict=True)]
    return [mp.fsum(own) / (1 if level == "sequence_sum" else len(row))] * len(row)


def penalty_weights(row, frozen, level, correction, ratio_high):
    """rho of each token: 1, its own ratio, or that of the level."""
    if correction == "none":
        return [mpf(1)] * len(row)
    if correction == "on_policy":
        pairs = zip(row, frozen, strict=True)
        return [mp.exp(token["own_logp"] - held["own_logp"]) for token, held in pairs]
    if "rollout" in correction:
        frozen = [held | {"old_logp": held["rollout_logp"]} for held in frozen]
        row = [token | {"old_logp": token["rollout_logp"]} for token in row]
    ratios = log_ratios(row, frozen, level if "level" in correction else "token")
    return [min(mp.exp(each), mpf(ratio_high)) for each in ratios]


def row_penalties(
    row,
    frozen,
    level,
    estimator="k3",
    gradient="k3",
    correction="none",
    ratio_high=1e300,
    reference="reference",
):
    """rho K of each token, and the derivative of the row's sum of rho G by its logp; rho times the
    caller's weight."""
    moves = frozen if "detached" in correction else row
    rho = penalty_weights(moves, frozen, level, correction, ratio_high)
    rho = [r * token.get("kl_weight", 1) for r, token in zip(rho, row, strict=True)]
    anchor = {"reference": "ref_logp", "old": "old_logp", "rollout": "rollout_logp"}[reference]
    d = [token[anchor] - token["own_logp"] for token in row]
    values = [r * KL[estimator](each)[0] for r, each in zip(rho, d, strict=True)]
    sources = [r * KL[gradient](each)[0] for r, each in zip(rho, d, strict=True)]
    slopes = [r * KL[gradient](each)[1] for r, each in zip(rho, d, strict=True)]
    if correction in ("ratio", "level_ratio", "on_policy", "rollout_ratio"):
        through = sources
        if correction == "level_ratio" and level in ("sequence_mean", "sequence_sum"):
            over = 1 if level == "sequence_sum" else len(row)
            through = [mp.fsum(sources) / over] * len(row)
        slopes = [slope + each for slope, each in zip(slopes, through, strict=True)]
    return list(zip(values, slopes, strict=True))


# ---- weights -------------------------------------------------------------------------------------


def truncated_importance(token, x, low=0, high=2):
    return min(max(mp.exp(x), mpf(low)), mpf(high))


def masked_importance(token, x, low=0.5, high=5):
    """arXiv:2510.18855."""
    return mp.exp(x) if mpf(low) <= mp.exp(x) <= mpf(high) else mpf(0)


def ratio_gate(token, x, low=0.5, high=2):
    return mpf(mpf(low) <= mp.exp(x) <= mpf(high))


def mismatch(token):
    return token["old_logp"] - token["rollout_logp"]


def tv_mask(token, x, low=0.2, high=0.2):
    """arXiv:2602.04879."""
    return mpf(x <= mpf(high) if token["advantage"] > 0 else x >= -mpf(low))


def log_ratio_of(token):
    return token["own_logp"] - token["old_logp"]


def probability_gap(one, other):
    return lambda token: mp.exp(token[one]) - mp.exp(token[other])


def bernoulli_kl(one, other):
    """KL(Bernoulli(p) || Bernoulli(q)), with 1e-8 beside the chances of the others; p, q <= 1."""

    def measure(token):
        log_p, log_q = min(token[one], mpf(0)), min(token[other], mpf(0))
        p, q = mp.exp(log_p), mp.exp(log_q)
        others = mp.log((1 - p + mpf(1e-8)) / (1 - q + mpf(1e-8)))
        return p * (log_p - log_q) + (1 - p) * others

    return measure


def kl_mask(token, x, low=0.05, high=0.05):
    """arXiv:2602.04879."""
    u = log_ratio_of(token)
    return mpf(x <= mpf(high) or u <= 0 if token["advantage"] > 0 else x <= mpf(low) or u >= 0)


def at_most(default):
    return lambda token, x, high=default: mpf(abs(x) <= mpf(high))


def clip_mask(token, x, epsilon_low=0.2, epsilon_high=0.2):
    """Where ppo_clip has a gradient."""
    good, ratio = token["advantage"] > 0, mp.exp(x)
    return mpf(ratio <= 1 + mpf(epsilon_high) if good else ratio >= 1 - mpf(epsilon_low))


def ring_mask(token, x, epsilon_low=0.2, epsilon_high=0.2, far_low=0.4, far_high=0.4):
    """arXiv:2509.24203."""
    good, ratio = token["advantage"] > 0, mp.exp(x)
    far = ratio <= 1 - mpf(far_low) if good else ratio >= 1 + mpf(far_high)
    return mpf(1 - mpf(epsilon_low) <= ratio <= 1 + mpf(epsilon_high) or far)


def soft_sequence(token, x, k_pos=2, lambda_pos=3, k_neg=3, lambda_neg=2):
    """arXiv:2602.10693."""
    bad = token["advantage"] < 0
    k, rate = (k_neg, lambda_neg) if bad else (k_pos, lambda_pos)
    rho = mp.exp(x)
    return rho ** mpf(k) * mp.exp(mpf(rate) * (1 - rho))


def off_policy_mask(token, x, high=0.5):
    """arXiv:2512.02556."""
    return mpf(not (token["advantage"] < 0 and x > mpf(high)))


def self_distillation(token, x, mix=0.5, epsilon=0.2):
    """arXiv:2604.03128."""
    gain = mp.exp(mp.sign(token["advantage"]) * x)
    return 1 - mpf(mix) + mpf(mix) * min(max(gain, 1 - mpf(epsilon)), 1 + mpf(epsilon))


WEIGHTS = {
    "truncated_importance": (mismatch, truncated_importance),
    "masked_importance": (mismatch, masked_importance),
    "ratio_gate": (mismatch, ratio_gate),
    "tv_mask": (probability_gap("own_logp", "old_logp"), tv_mask),
    "kl_mask": (bernoulli_kl("old_logp", "own_logp"), kl_mask),
    "tv_band": (lambda t: abs(probability_gap("own_logp", "old_logp")(t)), at_most(0.1)),
    "clip_mask": (log_ratio_of, clip_mask),
    "ring_mask": (log_ratio_of, ring_mask),
    "masked_ratio": (log_ratio_of, partial(masked_importance, high=2)),
    "vespo": (log_ratio_of, soft_sequence),
    "opsm": (lambda t: -log_ratio_of(t), off_policy_mask),
    "uncertainty": (lambda t: min(t["own_logp"], mpf(0)), lambda t, x: mp.exp(x) * (1 - mp.exp(x))),
    "self_distillation": (lambda t: t["ref_logp"] - t["own_logp"], self_distillation),
    "k2_gate": (lambda t: mismatch(t) ** 2 / 2, at_most(0.5)),
    "k3_gate": (lambda t: mp.exp(mismatch(t)) - 1 - mismatch(t), at_most(0.5)),
    "tv_gate": (lambda t: abs(probability_gap("old_logp", "rollout_logp")(t)), at_most(0.2)),
    "binary_kl_gate": (bernoulli_kl("rollout_logp", "old_logp"), at_most(0.05)),
    "ratio_tv_gate": (lambda t: abs(min(mp.exp(mismatch(t)), mpf(2)) - 1), at_most(0.2)),
}
LEAVE = {name for name in WEIGHTS if name.endswith("_gate")}
REDUCTIONS = {
    "sequence_mean": lambda xs: mp.fsum(xs) / len(xs),
    "sequence_sum": mp.fsum,
    "sequence_min": min,
    "sequence_max": max,
}


def row_weights(frozen, weights):
    """W of each token: constants, however the row moves."""
    out = [mpf(1)] * len(frozen)
    for name, options in weights.items():
        measure, formula = WEIGHTS[name]
        options = dict(options)
        level = options.pop("level", "token")
        xs = [measure(token) for token in frozen]
        if level != "token":
            parts = segments(frozen, range(len(xs)), level)
            reduce = REDUCTIONS[level.replace("turn", "sequence")]
            xs = [x for part in parts for x in [reduce([xs[t] for t in part])] * len(part)]
        own = [formula(token, x, **options) for token, x in zip(frozen, xs, strict=True)]
        out = [a * b for a, b in zip(out, own, strict=True)]
    return out


# ---- rows and batches ----------------------------------------------------------------------------


def random_token(rng, spread):
    logp = grid(-rng.expovariate(0.7) - 0.01)
    log_ratio = grid(rng.gauss(0, spread))
    ref_logp = logp + grid(rng.gauss(0, spread))
    advantage = grid(rng.choice([-1, 1]) * rng.uniform(0.1, 2))
    return token_of(logp, logp - log_ratio, ref_logp, advantage)


def token_of(logp, old_logp, ref_logp, advantage):
    logp, old_logp = mpf(logp), mpf(old_logp)
    return {
        "logp": logp,
        "own_logp": logp,
        "old_logp": old_logp,
        "log_ratio": logp - old_logp,
        "ref_logp": mpf(ref_logp),
        "advantage": mpf(advantage),
    }


def row_factor(mode, constant, tokens, sequences, row_tokens):
    return {
        "token_mean": lambda: 1 / mpf(tokens),
        "sequence_mean_token_mean": lambda: 1 / (mpf(sequences) * row_tokens),
        "sequence_mean_token_sum": lambda: 1 / mpf(sequences),
        "sequence_sum_over_constant": lambda: 1 / (mpf(sequences) * mpf(constant)),
        "token_sum": lambda: mpf(1),
    }[mode]()


def levelled(row, frozen, level, clip=None):
    """The tokens of a row as the surrogate sees them (rl/level.h)."""
    ratios = zip(row, log_ratios(row, frozen, level, clip), strict=True)
    tokens = [{**token, "log_ratio": log_ratio} for token, log_ratio in ratios]
    if level in ("token", "sequence_token"):
        return tokens
    logp = mp.fsum(token["logp"] for token in row) / (1 if level == "sequence_sum" else len(row))
    return [{**token, "logp": logp} for token in tokens]


class Objective(NamedTuple):
    formula: Callable
    options: dict
    level: str
    beta: float
    kl: dict
    weights: dict
    clip: float | None = None


def row_loss(row, frozen, factor, objective):
    """The loss of a row."""
    level = objective.level
    seen = (levelled(each, frozen, level, objective.clip) for each in (row, frozen))
    tokens = zip(*seen, strict=True)
    surrogate = mp.fsum(
        W * pair[0].get("token_weight", 1) * objective.formula(*pair, **objective.options)[0]
        for W, pair in zip(row_weights(frozen, objective.weights), tokens, strict=True)
    )
    penalty = mp.fsum(value for value, _ in row_penalties(row, frozen, level, **objective.kl))
    return factor * (surrogate + mpf(objective.beta) * penalty)


def row_slopes(row, factor, objective):
    """The derivatives of the loss of a row by every logp."""
    level = objective.level
    slopes = [
        factor
        * W
        * token.get("token_weight", 1)
        * checked(objective.formula, token, **objective.options)[1]
        for W, token in zip(
            row_weights(row, objective.weights),
            levelled(row, row, level, objective.clip),
            strict=True,
        )
    ]
    if level in ("sequence_mean", "sequence_sum"):
        over = 1 if level == "sequence_sum" else len(row)
        shared = mp.fsum(slopes) / over
        slopes = [shared * counted(token, objective.clip)[1] for token in row]
    penalties = row_penalties(row, row, level, **objective.kl)
    slopes = [
        slope + factor * mpf(objective.beta) * by_penalty
        for slope, (_, by_penalty) in zip(slopes, penalties, strict=True)
    ]
    straight_through = objective.kl.get("estimator", "k3") != objective.kl.get("gradient", "k3")
    for t, slope in enumerate(slopes if not straight_through else ()):

        def loss(step, t=t):
            token = moved(row[t], step, ("logp", "own_logp"))
            return row_loss([*row[:t], token, *row[t + 1 :]], row, factor, objective)

        assert_derivative(loss, slope, t)
    return slopes


COLUMNS = {
    "logps": "logp",
    "old_logps": "old_logp",
    "ref_logps": "ref_logp",
    "advantages": "advantage",
}


def segments(row, places, level):
    """The places that share a ratio: of a row, or of each of its turns."""
    turns = itertools.groupby(places, key=lambda t: row[t]["turn"] if "turn" in level else 0)
    return [list(each) for _, each in turns]


def solved(rows, lengths, objective, mode, constant):
    """Loss and derivatives of a ragged batch: row i has lengths[i] tokens, the rest is masked, as
    are those that a weight takes out."""
    gates = {name: each for name, each in objective.weights.items() if name in LEAVE}
    stay = {name: each for name, each in objective.weights.items() if name not in LEAVE}
    objective = objective._replace(weights=stay)
    places = [
        [t for t, W in enumerate(row_weights(row[:n], gates)) if W != 0]
        for row, n in zip(rows, lengths, strict=True)
    ]
    # A turn is to its tokens what a sequence is to those of the row.
    of_segment = objective._replace(level=objective.level.replace("turn", "sequence"))
    tokens, sequences = sum(map(len, places)), sum(len(each) > 0 for each in places)
    loss, dlogps = mpf(0), []
    for row, kept in zip(rows, places, strict=True):
        slopes = [0.0] * len(row)
        for segment in segments(row, kept, objective.level):
            part = [row[t] for t in segment]
            factor = row_factor(mode, constant, tokens, sequences, len(kept))
            loss += row_loss(part, part, factor, of_segment)
            for t, slope in zip(segment, row_slopes(part, factor, of_segment), strict=True):
                slopes[t] = number(slope)
        dlogps += slopes
    return number(loss), dlogps


LENGTHS = (5, 0, 1, 7, 3)


def batch(name, row, lengths=LENGTHS, columns=7, beta=None, mode=None, constant=1, **changes):
    """A batch called `name` of the catalogue's row; changes: options, level, kl, weights, given,
    spread."""
    preset = ROWS[row]
    beta = preset.beta if beta is None else beta
    options, level = changes.get("options", preset.options), changes.get("level", preset.level)
    mode, kl = mode or preset.aggregation, changes.get("kl", preset.kl or {})
    choices = {"aggregation": mode, "level": level}
    choices |= {f"kl_{key}": value for key, value in kl.items() if key != "ratio_high"}
    if kl:
        choices["allow_biased_gradient"] = "true"
    options_of_weights = {}
    rng = stream(name)
    spread = changes.get("spread", 0.4)
    rows = [[random_token(rng, spread) for _ in range(columns)] for _ in lengths]
    weights, columns_of = changes.get("weights", preset.weights or {}), COLUMNS
    levels = {level, *(each.get("level", "token") for each in weights.values())}
    by_turns = any("turn" in each for each in levels)
    if by_turns:
        turns = stream(f"{name} turns")
        for row_of_tokens in rows:
            turn = 3
            for token in row_of_tokens:
                turn += turns.choice([0, 0, 1, 4])
                token["turn"] = turn
    if weights or any("rollout" in str(each) for each in kl.values()):
        rollouts, columns_of = (
            stream(f"{name} rollouts"),
            COLUMNS | {"rollout_logps": "rollout_logp"},
        )
        for token in (token for row in rows for token in row):
            token["rollout_logp"] = token["old_logp"] + mpf(grid(rollouts.gauss(0, 0.6)))
    for given in changes.get("given", ()):
        drawn, columns_of = stream(f"{name} {given}"), columns_of | {f"{given}s": given}
        for token in (token for row in rows for token in row):
            token[given] = mpf(grid(drawn.gauss(0.5, 1)))
    for weight, of_weight in weights.items():
        choices[weight] = of_weight.get("level", "token")
        settings = {key: value for key, value in of_weight.items() if key != "level"}
        options_of_weights |= {f"{weight}.{key}": value for key, value in settings.items()}
    clip = preset.log_ratio_clip
    objective = Objective(preset.formula, options, level, beta, kl, weights, clip)
    if clip is not None:
        options = options | {"log_ratio_low": clip, "log_ratio_high": clip}
    if "ratio_high" in kl:
        options = options | {"kl_ratio_high": kl["ratio_high"]}
    loss, dlogps = solved(rows, lengths, objective, mode, constant)
    arrays = {
        array: [float(token[key]) for row in rows for token in row]
        for array, key in columns_of.items()
    }
    return {
        "name": name,
        "preset": name == f"{row} preset",
        "objective": row,
        "options": options | options_of_weights,
        "beta": beta,
        "choices": choices,
        "constant": constant,
        "rows": len(lengths),
        "columns": columns,
        "response_mask": [int(t < n) for n in lengths for t in range(columns)],
        **arrays,
        **({"turn_ids": [token["turn"] for row in rows for token in row]} if by_turns else {}),
        "dlogps": dlogps,
        "loss": loss,
    }


def surrogate_cases(name):
    """Single tokens: the columns of the file."""
    rng, row = stream(f"{name} tokens"), ROWS[name]
    for spread in (0.01, 0.3, 1, 4):
        for _ in range(12):
            token = random_token(rng, spread)
            inputs = [float(token[key]) for key in COLUMNS.values()]
            yield inputs + [number(x) for x in checked(row.formula, token, **row.options)]


LEVELS = ("token", "sequence_mean", "sequence_token", "sequence_sum")
DUAL = {"epsilon_low": 0.125, "epsilon_high": 0.25, "dual_clip": 1.5}


def aggregation_batches():
    modes = {
        "token_mean": 1,
        "sequence_mean_token_mean": 1,
        "sequence_mean_token_sum": 1,
        "sequence_sum_over_constant": 6,
    }
    for mode, constant in modes.items():
        for level in LEVELS:
            yield batch(
                f"ppo dual clip, k3, {level}, {mode}",
                "ppo",
                columns=9,
                beta=0.5,
                mode=mode,
                constant=constant,
                options=DUAL,
                level=level,
            )
    yield batch("ppo, token_sum", "ppo", beta=0.5, mode="token_sum", options=DUAL)


def level_batches():
    for level in ("sequence_mean", "sequence_sum"):
        yield batch(f"reinforce, {level}", "reinforce", level=level)
        bounds = {"ratio_low": 0.75, "ratio_high": 1.25}
        yield batch(f"cispo, {level}", "cispo", level=level, options=bounds)


def penalty_batches():
    def penalised(name, lengths, level, kl):
        name = f"ppo, {kl['estimator']}, gradient of {kl['gradient']}, {name}"
        changes = {"options": DUAL, "level": level, "kl": kl}
        return batch(name, "ppo", lengths, columns=4, beta=0.5, **changes)

    def kl_of(estimator, gradient, correction):
        return {"estimator": estimator, "gradient": gradient, "correction": correction}

    for correction in ("none", "ratio", "detached_ratio", "on_policy"):
        for estimator in KL:
            for gradient in KL:
                kl = kl_of(estimator, gradient, correction)
                yield penalised(correction, (4, 2), "token", kl)
    for correction in ("detached_ratio", "detached_level_ratio"):
        for level in LEVELS:
            kl = kl_of("k1", "k2", correction) | {"ratio_high": 1.0625}
            yield penalised(f"{correction} at most 1.0625, {level}", (4, 0, 1, 3), level, kl)
    for correction in ("level_ratio", "detached_level_ratio"):
        for level in LEVELS:
            for estimator, gradient in (("k3", "k3"), ("k1", "k2"), ("k2", "k1")):
                kl = kl_of(estimator, gradient, correction)
                yield penalised(f"{correction}, {level}", (4, 0, 1, 3), level, kl)
    for correction in ("rollout_ratio", "detached_rollout_ratio"):
        for level in ("token", "sequence_mean"):
            for estimator, gradient in (("k3", "k3"), ("k1", "k2"), ("k2", "k1")):
                kl = kl_of(estimator, gradient, correction)
                yield penalised(f"{correction}, {level}", (4, 0, 1, 3), level, kl)
    kl = kl_of("k3", "k3", "detached_rollout_ratio") | {"ratio_high": 1.0625}
    for reference in ("reference", "rollout"):
        name = f"detached_rollout_ratio at most 1.0625, to {reference}"
        yield penalised(name, (4, 0, 1, 3), "token", kl | {"reference": reference})


def turn_batches():
    for level in ("turn_mean", "turn_token", "turn_sum"):
        for mode in ("token_mean", "sequence_mean_token_mean"):
            yield batch(f"ppo, {level}, {mode}", "ppo", beta=0.5, mode=mode, level=level)
        yield batch(f"reinforce, {level}", "reinforce", level=level)
        kl = {"estimator": "k3", "gradient": "k3", "correction": "level_ratio"}
        yield batch(f"ppo, level_ratio, {level}", "ppo", beta=0.5, level=level, kl=kl)
        weights = {"ratio_gate": {"low": 0.625, "high": 1.75}}
        yield batch(f"grpo, ratio gate, {level}", "grpo", level=level, weights=weights)
    for reduction in ("mean", "sum", "min", "max"):
        of_turns = {"low": 0.625, "high": 1.75, "level": f"turn_{reduction}"}
        for level in ("token", "sequence_mean"):
            weights = {"truncated_importance": of_turns, "tv_mask": {}}
            name = f"ppo, {level}, truncated importance of turn_{reduction}"
            yield batch(name, "ppo", beta=0.5, level=level, weights=weights)
        weights = {"ratio_gate": of_turns, "truncated_importance": {"level": f"turn_{reduction}"}}
        yield batch(f"grpo, ratio gate of turn_{reduction}", "grpo", beta=0.5, weights=weights)


def weighted_batches():
    levels = ("token", *REDUCTIONS)
    for level in LEVELS:
        for of_weight in levels:
            weights = {"truncated_importance": {"low": 0.25, "high": 1.5, "level": of_weight}}
            name = f"ppo, {level}, truncated importance of {of_weight}"
            yield batch(name, "ppo", (4, 0, 1, 3), beta=0.5, level=level, weights=weights)
    for of_weight in levels:
        weights = {"tv_mask": {"low": 0.03125, "high": 0.0625, "level": of_weight}}
        yield batch(f"cispo, tv mask of {of_weight}", "cispo", weights=weights)
    weights = {"masked_importance": {"low": 0.75, "high": 1.5}}
    yield batch("dapo, masked importance of token", "dapo", weights=weights)
    weights = {"masked_importance": {"level": "sequence_sum"}}
    yield batch("grpo, masked importance of sequence_sum", "grpo", weights=weights)
    for of_weight in levels:
        weights = {"ratio_gate": {"low": 0.625, "high": 1.75, "level": of_weight}}
        name = f"grpo, ratio gate of {of_weight}"
        yield batch(name, "grpo", beta=0.5, weights=weights)
    yield batch("gmpo by turns", "gmpo", level="turn_mean", beta=0.25)
    yield batch("gmpo of sums", "gmpo", level="sequence_sum", options=DUAL, mode="token_mean")
    yield batch("gmpo, a token mask", "gmpo", beta=0.25, weights={"tv_mask": {}})
    weights = {"ratio_gate": {}, "truncated_importance": {"level": "sequence_mean"}}
    yield batch("gspo, ratio gate and importance of sequence_mean", "gspo", weights=weights)
    drawn = {
        "kl_mask": {"low": 0.0078125, "high": 0.015625},
        "tv_band": {"high": 0.0625},
        "clip_mask": {"epsilon_low": 0.25, "epsilon_high": 0.125},
        "ring_mask": {"epsilon_low": 0.125, "epsilon_high": 0.25, "far_low": 0.3, "far_high": 0.5},
        "masked_ratio": {"low": 0.75, "high": 1.25},
        "vespo": {"k_pos": 1.5, "lambda_pos": 2.5, "k_neg": 2.5, "lambda_neg": 1.5},
        "opsm": {"high": 0.0625},
        "uncertainty": {},
        "self_distillation": {"mix": 0.25, "epsilon": 0.375},
        "k2_gate": {"high": 0.125},
        "k3_gate": {"high": 0.125},
        "tv_gate": {"high": 0.0625},
        "binary_kl_gate": {"high": 0.015625},
        "ratio_tv_gate": {"high": 0.375},
    }
    for weight, of_weight in drawn.items():
        for level in ("token", "sequence_mean"):
            weights = {weight: {**of_weight, "level": level}}
            yield batch(f"grpo, {weight} of {level}", "grpo", (4, 0, 1, 3), 4, weights=weights)
    given = ("token_weight", "kl_weight")
    for level in LEVELS:
        for correction in ("none", "ratio", "level_ratio"):
            kl = {"estimator": "k1", "gradient": "k3", "correction": correction}
            changes = {"options": DUAL, "level": level, "kl": kl, "given": given}
            yield batch(f"ppo, given weights, {level}, {correction}", "ppo", beta=0.5, **changes)
    for correction in ("none", "ratio"):
        kl = {"estimator": "low_var_kl", "gradient": "low_var_kl", "correction": correction}
        name = f"ppo, low_var_kl beyond its bound, {correction}"
        yield batch(name, "ppo", beta=0.5, kl=kl, spread=3)
    for reference in ("old", "rollout"):
        kl = {"correction": "detached_ratio", "reference": reference}
        yield batch(f"ppo, penalty to {reference}", "ppo", beta=0.5, kl=kl)
    weights = {"ratio_gate": {"low": 0.625, "high": 1.75}, "tv_mask": {}}
    yield batch("grpo, given weights and others", "grpo", beta=0.5, weights=weights, given=given)
    yield batch("kl_cov, picked tokens", "kl_cov", beta=0.25, given=("kl_weight",))
    both = {"truncated_importance": {"high": 3, "level": "sequence_sum"}, "tv_mask": {}}
    yield batch("gspo_token, two weights", "gspo_token", weights=both)


def main():
    write(
        "policy_golden.json",
        {
            "columns": ["logp", "old_logp", "ref_logp", "advantage", "loss", "dlogp"],
            "surrogates": {name: list(surrogate_cases(name)) for name in ROWS},
            "batches": [
                *(batch(f"{name} preset", name) for name in ROWS),
                *aggregation_batches(),
                *level_batches(),
                *penalty_batches(),
                *weighted_batches(),
                *turn_batches(),
            ],
        },
    )


if __name__ == "__main__":
    main()
