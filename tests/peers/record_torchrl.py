"""Records torchrl's own advantages on random rows with ends.

    build/peers/torchrl/bin/python tests/peers/record_torchrl.py

writes tests/golden/peers/torchrl_advantages.json. torchrl has no mask; it asks for the value after
every token, knows an end that is over (terminated) and one that is cut off (done alone), and takes
the last token for done or not by its flags. Discounts are of float32 there: they are dyadic.
"""

import recording
import torch
from recording import normal
from torchrl.objectives.value import functional

SHAPE = (4, 12)


def rows_of(seed, ends):
    """Rewards, values and log-ratios; each token's next value is the next token's value, and one of
    its own at the end of an episode."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values, log_ratios, behind = (normal(generator, *SHAPE) for _ in range(4))
    which = torch.rand(SHAPE, generator=generator) if ends else torch.ones(SHAPE)
    terminated, truncated = which < 0.15, (which > 0.15) & (which < 0.3)
    done = terminated | truncated
    done[:, -1] = True  # the row ends, and is cut off where it is not over
    following = torch.where(done, behind, values.roll(-1, 1))
    rows = {"rewards": rewards, "values": values, "log_ratios": log_ratios}
    return rows | {"next_values": following, "done": done, "terminated": terminated}


def arguments(rows):
    columns = {name: each[..., None] for name, each in rows.items()}
    return {
        "state_value": columns["values"],
        "next_state_value": columns["next_values"],
        "reward": columns["rewards"],
        "done": columns["done"],
        "terminated": columns["terminated"],
    }


def case(estimator, rows, options, out):
    advantages, returns = (each[..., 0] for each in out)
    return {"estimator": estimator, **options, **rows, "advantages": advantages, "returns": returns}


def gae_case(seed, ends, gamma, lmbda):
    rows = rows_of(seed, ends)
    out = functional.generalized_advantage_estimate(gamma, lmbda, **arguments(rows))
    return case("gae", rows, {"gamma": gamma, "lambda": lmbda}, out)


def vtrace_case(seed, ends, gamma, rho_bar, c_bar):
    rows = rows_of(seed, ends)
    log_ratios = rows["log_ratios"][..., None]
    out = functional.vtrace_advantage_estimate(
        gamma,
        log_ratios,
        torch.zeros_like(log_ratios),
        **arguments(rows),
        rho_thresh=torch.tensor(rho_bar, dtype=torch.float64),
        c_thresh=torch.tensor(c_bar, dtype=torch.float64),
    )
    return case("vtrace", rows, {"gamma": gamma, "rho_bar": rho_bar, "c_bar": c_bar}, out)


def main():
    functions = [functional.generalized_advantage_estimate, functional.vtrace_advantage_estimate]
    cases = [
        gae_case(0, False, 1.0, 0.9375),
        gae_case(1, True, 0.875, 0.75),
        vtrace_case(2, False, 1.0, 1.0, 1.0),
        vtrace_case(3, True, 0.875, 1.0, 1.0),
        vtrace_case(4, True, 0.875, 1.5, 0.75),
    ]
    recording.write("torchrl_advantages.json", "torchrl", functions, cases)


if __name__ == "__main__":
    main()
