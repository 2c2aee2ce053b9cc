"""python -m tether doctor: what is installed, and whether it works."""

from __future__ import annotations

import argparse
import importlib.metadata
import pathlib
import platform
import sys
from collections.abc import Iterator

import torch

import tether
from tether import _cuda
from tether._trainers import KNOWN, is_known, version_of


def report() -> Iterator[str]:
    yield f"tether {tether.__version__} in {pathlib.Path(tether.__file__).parent}"
    yield f"Python {platform.python_version()}, torch {torch.__version__}, {platform.platform()}"
    capability = torch.backends.cpu.get_cpu_capability()
    yield f"CPU: {capability}, {torch.get_num_threads()} threads: fused kernels"
    if torch.cuda.is_available():
        kernels = ", ".join(sorted(_cuda.KERNELS)) or "no kernels"
        yield f"{torch.cuda.get_device_name()}: torch's operations; {kernels}"
    counts = (tether.objectives(), tether.dialects(), tether.weights(), tether.advantages())
    names = ("objectives", "dialects", "weights", "advantages")
    yield ", ".join(f"{len(each)} {name}" for each, name in zip(counts, names, strict=True))
    for trainer, known in KNOWN.items():
        version = version_of(trainer)
        wanted = " or ".join(known)
        found = "not installed" if version is None else f"{version} installed"
        state = (
            "" if version is None else ": known" if is_known(trainer, version) else ": not known"
        )
        yield f"tether.{trainer}, for {trainer} {wanted}: {found}{'' if version is None else state}"
    plugins = importlib.metadata.entry_points(group="verl.plugins")
    seen = any(each.value == "tether.verl" for each in plugins)
    yield f"entry point of verl: {'seen' if seen else 'not seen'}"


def check() -> float:
    """The largest difference of a loss or gradient to that of the formula in plain torch."""
    generator = torch.Generator().manual_seed(0)
    logps, old, ref, rollout = -torch.rand(4, 4, 9, generator=generator, dtype=torch.float64)
    batch = {
        "advantages": torch.tensor([1.0, -1.0, 0.5, 0.0], dtype=torch.float64),
        "response_mask": torch.rand(4, 9, generator=generator) < 0.8,
        "old_logps": old,
        "ref_logps": ref,
        "rollout_logps": rollout,
    }
    gaps = []
    for name in tether.objectives():
        found = []
        for function in (tether.policy_loss, tether.reference.policy_loss):
            leaf = logps.clone().requires_grad_()
            loss = function(leaf, **batch, objective=name)[0]
            slopes = torch.autograd.grad(loss, leaf)[0].flatten()
            found.append(torch.cat([loss.detach()[None], slopes]))
        gaps.append((found[0] - found[1]).abs().max())
    return torch.stack(gaps).max().item()  # NaN is the largest


def doctor() -> int:
    print(*report(), sep="\n")
    worst = check()
    sound = worst < 1e-12
    print(
        f"kernels and formulas in plain torch differ by {worst:.1e}: {'good' if sound else 'BAD'}"
    )
    return 0 if sound else 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tether")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    text = "print versions, what runs where, and whether it is right"
    commands.add_parser("doctor", help=text).set_defaults(run=doctor)
    return parser.parse_args().run()


if __name__ == "__main__":
    sys.exit(main())
