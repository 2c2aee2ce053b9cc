"""Reference values of the preference objectives, from 60-digit arithmetic.

    python tests/golden/make_preference_golden.py    writes preference_golden.json beside this file

The formulas are stated here once more, with their derivatives, and every derivative is compared
with a numerical one before it is written.
"""

from collections.abc import Callable
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


def batches():
    for name, row in ROWS.items():
        yield batch(f"{name} preset", name)
        other = "mean" if row.score == "sum" else "sum"
        yield batch(f"{name} of scores by {other}", name, score=other, beta=0.5)
        for link in LINKS:
            yield batch(f"{name}, {link}", name, link=link, beta=0.5)


def main():
    write(
        "preference_golden.json",
        {
            "columns": ["chosen", "rejected", "beta", "loss", "dchosen"],
            "pairs": {name: list(pair_cases(name)) for name in ROWS},
            "batches": list(batches()),
        },
    )


if __name__ == "__main__":
    main()
