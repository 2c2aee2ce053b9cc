"""Records prime-rl's losses of single sequences with their metrics.

    build/peers/parts/bin/python tests/peers/record_prime_rl.py FOLDER

where FOLDER has a checkout prime-rl. It writes tests/golden/peers/prime_rl_loss.json. Its module of
losses is loaded alone (parts.py).
"""

import pathlib
import sys
import types

import parts
import recording
import torch
from recording import normal

FOLDER = pathlib.Path(sys.argv[1])
PRIME = parts.load(
    "prime_rl.trainer.rl.loss",
    root=FOLDER / "prime-rl" / "src",
    absent=("prime_rl.configs", "prime_rl.utils"),
)
DEFAULT = {"dppo_mask_low": 0.2, "dppo_mask_high": 0.2, "adv_tau": 1.0, "kl_tau": 1e-3}
IPO = {"ipo_threshold": 0.1, "adv_tau": 1.0, "kl_tau": 1e-3}
PLANS = [
    ("default", {}),
    ("default", {"dppo_mask_low": 0.05, "dppo_mask_high": 0.1, "kl_tau": 0.2}),
    ("default", {"dppo_mask_high": 10.0, "adv_tau": 0.5}),
    ("default", {"adv_tau": 0.0, "kl_tau": 0.3}),
    ("default", {"kl_tau": 0.0, "dppo_mask_low": 0.0, "dppo_mask_high": 0.0}),
    ("ipo", {}),
    ("ipo", {"ipo_threshold": 0.05, "adv_tau": 0.5, "kl_tau": 0.2}),
    ("ipo", {"ipo_threshold": 10.0, "kl_tau": 0.0}),
]
TOKENS = 12


def sequence(seed, *, weighted, empty):
    generator = torch.Generator().manual_seed(seed)
    logps = -normal(generator, TOKENS).abs() - 0.25
    advantages = normal(generator, TOKENS)
    advantages[1] = 0.0
    out = {
        "trainer_logprobs": logps,
        "inference_logprobs": (logps - recording.grid(0.5 * normal(generator, TOKENS))).clamp(
            max=-1 / 16
        ),
        "ref_logprobs": None,
        "advantages": advantages,
        "loss_mask": (torch.rand(TOKENS, generator=generator) < 0.8) & (not empty),
        "loss_weights": normal(generator, TOKENS) if weighted else None,
    }
    return out


def case_of(seed, loss, changes, *, empty=False):
    options = (DEFAULT if loss == "default" else IPO) | changes
    arrays = sequence(seed, weighted=seed % 2 == 1, empty=empty)
    leaf = arrays["trainer_logprobs"].clone().requires_grad_()
    inputs = PRIME.LossInputs(**arrays | {"trainer_logprobs": leaf})
    function = {"default": PRIME.default_loss_fn, "ipo": PRIME.ipo_loss_fn}[loss]
    out = function(inputs, types.SimpleNamespace(**options))
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    words = [f"{key} {value}" for key, value in changes.items()]
    how = ["weights"] * (arrays["loss_weights"] is not None) + ["no token"] * empty
    return {
        "name": ", ".join([loss, *words, *how]),
        "loss_type": loss,
        "options": options,
        "inputs": {name: recording.plain(each) for name, each in arrays.items()},
        "loss": out.loss.detach(),
        "dlogps": gradient,
        "metrics": {name: each.item() for name, each in out.metrics.items()},
    }


def main():
    cases = [case_of(2 * i + j, *plan) for i, plan in enumerate(PLANS) for j in range(2)]
    cases += [case_of(100, loss, {}, empty=True) for loss in ("default", "ipo")]
    commit = parts.commit_of(FOLDER / "prime-rl")
    functions = [PRIME.default_loss_fn, PRIME.ipo_loss_fn]
    recording.write("prime_rl_loss.json", "prime_rl", functions, cases, version=commit)


if __name__ == "__main__":
    main()
