"""Reference values of the preference objectives, from 60-digit arithmetic.

    python tests/golden/make_preference_golden.py    writes preference_golden.json beside this file

The formulas are stated here once more, with their derivatives, and every derivative is compared
with a numerical one before it is written.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from golden import assert_derivative, grid, number, stream, write
from mpmath import mp, mpf

# ---- losses of a pair: value and derivative by the gap of the scores -----------------------------


def log_sigmoid(x):
    return -mp.log1p(mp.exp(-x))


def logistic(gap, beta, label_smoothing=0):
    """arXiv:2305.18290 eq. 7; with flipped labels ericmitchell.ai/cdpo.pdf."""
    x, flipped = beta * gap, mpf(label_smoothing)
    loss = -(1 - flipped) * log_sigmoid(x) - flipped * log_sigmoid(-x)
    return loss, beta * (flipped - 1 / (1 + mp.exp(x)))


def square(gap, beta):
    """arXiv:2310.12036 eq. 17."""
    off = gap - 1 / (2 * beta)
    return off**2, 2 * off


def hinge(gap, beta):
    """arXiv:2309.06657 eq. 9."""
    x = beta * gap
    return (1 - x, -beta) if x < 1 else (mpf(0), mpf(0))


def robust(gap, beta, label_smoothing):
    """arXiv:2403.00409."""
    x, e = beta * gap, mpf(label_smoothing)
    loss = (-(1 - e) * log_sigmoid(x) + e * log_sigmoid(-x)) / (1 - 2 * e)
    return loss, -beta * ((1 - e) / (1 + mp.exp(x)) + e / (1 + mp.exp(-x))) / (1 - 2 * e)


def exo(gap, beta, label_smoothing):
    """arXiv:2402.00856 eq. 16."""
    x, e = beta * gap, mpf(label_smoothing)
    q, other = 1 / (1 + mp.exp(-x)), 1 / (1 + mp.exp(x))
    loss = q * mp.log(q / (1 - e)) + other * mp.log(other / e)
    return loss, beta * q * other * (x - mp.log((1 - e) / e))


def discopop(gap, beta, tau):
    """arXiv:2406.08414 eq. 5."""
    x, y = beta * gap, beta * gap / mpf(tau)
    m = 1 / (1 + mp.exp(-y))
    loss = -(1 - m) * log_sigmoid(x) + m * mp.exp(-x)
    slope = m * (1 - m) / mpf(tau) * (log_sigmoid(x) + mp.exp(-x))
    return loss, beta * (slope - (1 - m) / (1 + mp.exp(x)) - m * mp.exp(-x))


class Row(NamedTuple):
    """A row of rl/catalogue.h, as its preset has it."""

    formula: Callable
    options: dict
    score: str = "sum"


ROWS = {
    "dpo": Row(logistic, {}),
    "cdpo": Row(logistic, {"label_smoothing": 0.1}),
    "ipo": Row(square, {}, "mean"),
    "hinge": Row(hinge, {}),
    "robust": Row(robust, {"label_smoothing": 0.1}),
    "exo_pair": Row(exo, {"label_smoothing": 0.001}),
    "discopop": Row(discopop, {"tau": 0.05}),
}

# arXiv:2309.16240, table 1: of a score, with its derivative.
LINKS = {
    "reverse_kl": lambda score: (score, mpf(1)),
    "forward_kl": lambda score: (-mp.exp(-score), mp.exp(-score)),
    "js": lambda score: (log_sigmoid(score), 1 / (1 + mp.exp(score))),
    # arXiv:2501.03884, alpha 1/4.
    "alphapo": lambda score: (4 * (1 - mp.exp(-score / 4)), mp.exp(-score / 4)),
}


def checked(function, x):
    """Value and derivative, the latter compared with a central difference."""
    value, slope = function(x)
    assert_derivative(lambda step: function(x + step)[0], slope, x)
    return value, slope


def pair_cases(name):
    """Single pairs: the columns of the file."""
    rng, row = stream(f"{name} pairs"), ROWS[name]
    for spread in (0.1, 1, 10, 100):
        for _ in range(8):
            chosen, rejected = grid(rng.gauss(0, spread)), grid(rng.gauss(0, spread))
            beta = rng.choice([0.0625, 0.25, 1.0])
            loss, slope = checked(
                lambda gap, row=row, beta=beta: row.formula(gap, mpf(beta), **row.options),
                chosen - rejected,
            )
            yield [float(chosen), float(rejected), beta, number(loss), number(slope)]


class Answer(NamedTuple):
    logps: list
    ref_logps: list
    n: int  # tokens; the rest is masked

    def score(self, kind, logps=None):
        ratios = zip(logps or self.logps, self.ref_logps, strict=True)
        total = mp.fsum(logp - ref_logp for logp, ref_logp in list(ratios)[: self.n])
        return total / self.n if kind == "mean" else total


def random_answer(rng, n, columns):
    logps = [grid(-rng.expovariate(0.7) - 0.01) for _ in range(columns)]
    return Answer(logps, [logp + grid(rng.gauss(0, 0.4)) for logp in logps], n)


def solved(pair, kind, link, loss_of_gap):
    """The loss of a pair, and its derivatives by the log-probabilities of both answers."""
    scores = [answer.score(kind) for answer in pair]
    (chosen, by_chosen), (rejected, by_rejected) = (checked(LINKS[link], each) for each in scores)
    loss, slope = checked(loss_of_gap, chosen - rejected)
    slopes = []
    for answer, by_score in zip(pair, (slope * by_chosen, -slope * by_rejected), strict=True):
        over = answer.n if kind == "mean" else 1
        slopes.append([by_score / over * (t < answer.n) for t in range(len(answer.logps))])
    return loss, slopes


def batch(name, row, link="reverse_kl", score=None, beta=0.1):
    """Ragged pairs of the catalogue's row; one that is padding counts for nothing."""
    preset, rng, columns = ROWS[row], stream(name), 6
    score = score or preset.score
    lengths = [(4, 6), (1, 3), (0, 0), (5, 2)]
    pairs = [[random_answer(rng, n, columns) for n in both] for both in lengths]
    count = sum(min(both) > 0 for both in lengths)
    loss, dlogps = mpf(0), [[[mpf(0)] * columns for _ in lengths] for _ in range(2)]
    for i, pair in enumerate(pairs):
        if min(lengths[i]) == 0:
            continue
        value, slopes = solved(
            pair, score, link, lambda gap: preset.formula(gap, mpf(beta), **preset.options)
        )
        loss += value / count
        for side in range(2):
            dlogps[side][i] = [slope / count for slope in slopes[side]]
    answers = [pair[side] for side in range(2) for pair in pairs]
    return {
        "name": name,
        "preset": name == f"{row} preset",
        "objective": row,
        "options": {"beta": beta} | preset.options,
        "choices": {"link": link, "score": score},
        "rows": len(answers),
        "columns": columns,
        "response_mask": [int(t < answer.n) for answer in answers for t in range(columns)],
        "logps": [float(x) for answer in answers for x in answer.logps],
        "ref_logps": [float(x) for answer in answers for x in answer.ref_logps],
        "dlogps": [number(slope) for side in dlogps for row in side for slope in row],
        "loss": number(loss),
    }


# ---- the whole product, as one function of the log-probabilities ---------------------------------


def log_odds(score):
    """arXiv:2403.07691, eq. 4."""
    return score - mp.log(1 - mp.exp(score))


def logistic_pair(chosen, rejected, beta):
    return -log_sigmoid(beta * (chosen - rejected))


def square_pair(chosen, rejected, beta):
    return (chosen - rejected - 1 / (2 * mpf(beta))) ** 2


def nca_pair(chosen, rejected, beta):
    """arXiv:2402.05369."""
    u, v = beta * chosen, beta * rejected
    return -log_sigmoid(u) - (log_sigmoid(-u) + log_sigmoid(-v)) / 2


def bco_pair(chosen, rejected, beta):
    """arXiv:2404.04656."""
    return -log_sigmoid(beta * chosen) - log_sigmoid(-beta * rejected)


def sppo_hard(chosen, rejected, beta):
    """arXiv:2405.00675 eq. 4.7."""
    target = 1 / (2 * mpf(beta))
    return (chosen - target) ** 2 + (rejected + target) ** 2


def sigmoid(x):
    return 1 / (1 + mp.exp(-x))


def apo_zero(chosen, rejected, beta):
    """arXiv:2408.06266 eq. 7."""
    return 1 - sigmoid(beta * chosen) + sigmoid(beta * rejected)


def apo_down(chosen, rejected, beta):
    """arXiv:2408.06266 eq. 8."""
    return sigmoid(beta * chosen) + 1 - sigmoid(beta * (chosen - rejected))


def prospect(score, label, beta, desirable_weight=1, undesirable_weight=1):
    """arXiv:2402.01306 eq. 8, of the score above the baseline."""
    sign, weight = (1, desirable_weight) if label > 0.5 else (-1, undesirable_weight)
    return weight * (1 - 1 / (1 + mp.exp(-sign * beta * score)))


# Of both answers, each by itself.
OF_ANSWERS = {
    "nca_pair": nca_pair,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
}


def answer_cases(name):
    """Single pairs: the columns of the file and the slope by the rejected answer."""
    rng, loss = stream(f"{name} pairs"), OF_ANSWERS[name]
    for spread in (0.1, 1, 10, 100):
        for _ in range(8):
            chosen, rejected = grid(rng.gauss(0, spread)), grid(rng.gauss(0, spread))
            beta = rng.choice([0.0625, 0.25, 1.0])
            by_chosen = mp.diff(lambda x, beta=beta, b=rejected: loss(x, b, beta), chosen)
            by_rejected = mp.diff(lambda x, beta=beta, a=chosen: loss(a, x, beta), rejected)
            value = loss(chosen, rejected, beta)
            yield [
                *map(float, (chosen, rejected)),
                beta,
                *map(number, (value, by_chosen, by_rejected)),
            ]


def label_cases():
    """Single answers: score, label, beta, loss, slope."""
    rng = stream("kto answers")
    for spread in (0.1, 1, 10, 100):
        for _ in range(8):
            score, label = grid(rng.gauss(0, spread)), rng.choice([0, 1])
            beta = rng.choice([0.0625, 0.25, 1.0])
            inside = 1 / (1 + mp.exp(beta * score))
            slope = beta * inside * (1 - inside) * (1 - 2 * label)
            loss, slope = checked(
                lambda x, slope=slope, label=label, beta=beta: (prospect(x, label, beta), slope),
                score,
            )
            yield [float(score), label, beta, number(loss), number(slope)]


@dataclass(frozen=True)
class Product:
    """A case: the loss of a pair or of an answer with its label, and the options that differ."""

    objective: str
    loss: Callable
    options: dict = field(default_factory=dict)
    choices: dict = field(default_factory=dict)
    labels: list = field(default_factory=list)
    preset: bool = False
    masks: str = "prefix"  # of the response: or with holes, or fractional
    own_nll_mask: bool = False
    with_baselines: bool = False
    with_weights: bool = False


PRODUCTS = {
    "dpo with baselines": Product("dpo", logistic_pair, with_baselines=True),
    "ipo with baselines and weights": Product(
        "ipo", square_pair, {"beta": 0.5}, {"score": "mean"}, with_baselines=True, with_weights=True
    ),
    "dpo, LD": Product("dpo", logistic_pair, {"ld_alpha": 0.25}),
    "dpo, LD with holes, of means": Product(
        "dpo", logistic_pair, {"ld_alpha": 0.5, "beta": 1}, {"score": "mean"}, masks="holes"
    ),
    "dpo, LD of fractional weights": Product(
        "dpo", logistic_pair, {"ld_alpha": 0}, masks="fractional"
    ),
    "dpo + NLL by token": Product("dpo", logistic_pair, {"nll_coef": 0.5, "loss_weight": 2}),
    "dpo + NLL by sequence": Product(
        "dpo", logistic_pair, {"nll_coef": 0.5}, {"nll_mean": "sequence_mean"}, masks="fractional"
    ),
    "ipo + NLL summed": Product(
        "ipo",
        square_pair,
        {"nll_coef": 0.25},
        {"nll_mean": "sequence_sum", "score": "mean"},
        masks="holes",
    ),
    "dpo, LD + NLL": Product(
        "dpo", logistic_pair, {"ld_alpha": 0.5, "nll_coef": 1}, masks="holes", with_weights=True
    ),
    "dpo, LD + NLL of another mask": Product(
        "dpo", logistic_pair, {"ld_alpha": 0.5, "nll_coef": 1}, own_nll_mask=True
    ),
    "dpo + NLL by sequence of another mask": Product(
        "dpo", logistic_pair, {"nll_coef": 1}, {"nll_mean": "sequence_mean"}, own_nll_mask=True
    ),
    "orpo preset": Product(
        "orpo",
        logistic_pair,
        {"beta": 1, "loss_weight": 0.1, "nll_coef": 1},
        {"score": "mean", "link": "log_odds"},
        preset=True,
    ),
    "orpo over prompt and answer": Product(
        "orpo",
        logistic_pair,
        {"beta": 1, "loss_weight": 0.25, "nll_coef": 1},
        {"score": "mean", "link": "log_odds"},
        own_nll_mask=True,
    ),
    "kto preset": Product("kto", prospect, labels=[1, 0, 1, 0, 1], preset=True),
    "kto with baselines and weights": Product(
        "kto",
        prospect,
        {"beta": 0.5, "desirable_weight": 1.5, "undesirable_weight": 0.75},
        labels=[1, 0, 0, 0.25, 0.75],
        masks="holes",
        with_baselines=True,
        with_weights=True,
    ),
    "kto + NLL of the desirable": Product(
        "kto", prospect, {"nll_coef": 0.5}, labels=[0, 1, 1, 0, 1], own_nll_mask=True
    ),
    **{
        f"{name} {'with baselines and weights' if more else 'preset'}": Product(
            name,
            loss,
            {"beta": 0.5} if more else {},
            preset=not more,
            masks=masks,
            with_baselines=more,
            with_weights=more,
        )
        for name, loss in OF_ANSWERS.items()
        for more, masks in ((False, "prefix"), (True, "holes"))
    },
    "dpo of log-odds": Product(
        "dpo", logistic_pair, {"beta": 1}, {"score": "mean", "link": "log_odds"}
    ),
}


def mask_of(rng, kind, n, columns):
    mask = [mpf(t < n) for t in range(columns)]
    if kind == "holes" and n > 0:
        mask = [mpf(t == 1 or rng.random() < 0.6) for t in range(columns)]
    if kind == "fractional":
        mask = [each * rng.choice([0.25, 0.5, 1]) for each in mask]
    return mask


def product_loss(case, data, logps):
    """The definition, answer by answer: loss_weight mean v phi + nll_coef NLL."""
    options = {"beta": 0.1, "loss_weight": 1, "nll_coef": 0, "ld_alpha": 1} | case.options
    options = {name: mpf(value) for name, value in options.items()}
    choices = {"score": "sum", "link": "reverse_kl", "nll_mean": "token"} | case.choices
    own = {k: v for k, v in options.items() if k not in ("loss_weight", "nll_coef", "ld_alpha")}
    rows, masks = len(logps), data["mask"]
    pairs = not case.labels
    examples = range(rows // 2 if pairs else rows)
    reference = choices["link"] != "log_odds"

    def partner(row):
        return (row + rows // 2) % rows

    def score(row):
        lengths = [sum(w != 0 for w in masks[each]) for each in (row, partner(row))]
        total, seen = mpf(0), 0
        for t, w in enumerate(masks[row]):
            if w == 0:
                continue
            tail = pairs and seen >= min(lengths)
            x = logps[row][t] - (data["ref_logps"][row][t] if reference else 0)
            total += w * (options["ld_alpha"] if tail else 1) * x
            seen += 1
        if choices["score"] == "mean":
            total /= max(sum(masks[row]), mpf(10) ** -30)
        link = log_odds if choices["link"] == "log_odds" else lambda x: x
        return link(total) - data["baselines"][row]

    def nll(row):
        mask = data["nll_mask"][row]
        total = -mp.fsum(w * logp for w, logp in zip(mask, logps[row], strict=True) if w != 0)
        by_mean = choices["nll_mean"] == "sequence_mean"
        return total / max(sum(mask), mpf(10) ** -30) if by_mean else total

    present = [i for i in examples if sum(masks[i]) > 0 or (pairs and sum(masks[partner(i)]) > 0)]
    loss, weights = mpf(0), data["answer_weights"]
    for i in present:
        if pairs:
            other = partner(i)
            each = case.loss(score(i), score(other), **own) * weights[i] * weights[other]
        else:
            each = case.loss(score(i), case.labels[i], **own) * weights[i]
        loss += options["loss_weight"] * each / len(present)
    if options["nll_coef"] != 0:
        good = [i for i in present if pairs or case.labels[i] > 0.5]
        of_tokens = choices["nll_mean"] == "token"
        count = sum(sum(data["nll_mask"][i]) for i in good) if of_tokens else len(present)
        loss += options["nll_coef"] * mp.fsum(nll(i) for i in good) / count
    return loss


def product_batch(name, case):
    """Value, and the gradient by central differences of 60 digits."""
    rng, columns = stream(name), 6
    lengths = [4, 1, 0, 5, 6, 3, 0, 2] if not case.labels else [4, 1, 0, 5, 6]
    rows = len(lengths)
    masks = [mask_of(rng, case.masks, n, columns) for n in lengths]
    logps = [[grid(-rng.expovariate(0.7) - 0.01) for _ in range(columns)] for _ in range(rows)]
    data = {
        "mask": masks,
        "ref_logps": [[x + grid(rng.gauss(0, 0.4)) for x in row] for row in logps],
        "nll_mask": masks,
        "baselines": [grid(rng.gauss(0, 1)) * case.with_baselines for _ in range(rows)],
        "answer_weights": [
            mpf(rng.choice([0, 0.5, 2])) if case.with_weights else mpf(1) for _ in range(rows)
        ],
    }
    if case.own_nll_mask:
        data["nll_mask"] = [
            [mpf(rng.choice([0, 0.5, 1, 1])) for _ in range(columns)] for _ in range(rows)
        ]
    step, slopes = mpf(10) ** -20, []
    for row in range(rows):
        for t in range(columns):
            moved = [
                [x + sign * step * ((i, j) == (row, t)) for j, x in enumerate(each)]
                for sign in (1, -1)
                for i, each in enumerate(logps)
            ]
            up, down = (product_loss(case, data, part) for part in (moved[:rows], moved[rows:]))
            slopes.append(number((up - down) / (2 * step)))
    reference = "false" if case.choices.get("link") == "log_odds" else "true"
    out = {
        "name": name,
        "preset": case.preset,
        "objective": case.objective,
        "options": case.options,
        "choices": {"reference": reference} | case.choices,
        "rows": rows,
        "columns": columns,
        "response_mask": [float(w) for row in masks for w in row],
        "logps": [float(x) for row in logps for x in row],
        "ref_logps": [float(x) for row in data["ref_logps"] for x in row],
        "dlogps": slopes,
        "loss": number(product_loss(case, data, logps)),
    }
    if case.labels:
        out["labels"] = case.labels
    if case.own_nll_mask:
        out["nll_mask"] = [float(w) for row in data["nll_mask"] for w in row]
    if case.with_baselines:
        out["baselines"] = [float(x) for x in data["baselines"]]
    if case.with_weights:
        out["answer_weights"] = [float(x) for x in data["answer_weights"]]
    return out


def batches():
    for name, row in ROWS.items():
        yield batch(f"{name} preset", name)
        other = "mean" if row.score == "sum" else "sum"
        yield batch(f"{name} of scores by {other}", name, score=other, beta=0.5)
        for link in LINKS:
            yield batch(f"{name}, {link}", name, link=link, beta=0.5)
    for name, case in PRODUCTS.items():
        yield product_batch(name, case)


def main():
    write(
        "preference_golden.json",
        {
            "columns": ["chosen", "rejected", "beta", "loss", "dchosen"],
            "pairs": {name: list(pair_cases(name)) for name in ROWS}
            | {name: list(answer_cases(name)) for name in OF_ANSWERS}
            | {"orpo": list(pair_cases("dpo")), "kto": list(label_cases())},
            "batches": list(batches()),
        },
    )


if __name__ == "__main__":
    main()
