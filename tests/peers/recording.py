"""What the recorders share: random ragged batches, and the file that a recording becomes.

Inputs are float64 multiples of 2^-10; numbers are written with as many digits as bring the same
float64 back.
"""

import hashlib
import importlib.metadata
import inspect
import json
import pathlib

import torch

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "golden" / "peers"


def grid(x):
    return (x * 1024).round() / 1024


def normal(generator, *shape):
    return grid(torch.randn(*shape, generator=generator, dtype=torch.float64))


def ragged_mask(generator, rows, columns, empty_row):
    lengths = torch.randint(1, columns + 1, (rows,), generator=generator)
    if empty_row:
        lengths[1::3] = 0
    mask = torch.arange(columns) < lengths[:, None]
    holes = torch.rand(rows, columns, generator=generator) < 0.15
    holes[:, 0] = False  # a tool's tokens inside an answer
    return (mask & ~holes).long()


def policy_batch(seed, *, rows=7, columns=6, per_token=False, spread=0.5, mismatch=0.3):
    """Ragged rows, some empty, with what four policies think of their tokens."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, columns)
    logps = -normal(generator, *shape).abs() - 0.25
    batch = {"logps": logps, "advantages": normal(generator, *(shape if per_token else (rows,)))}
    for name, start, far in (
        ("old_logps", "logps", spread),
        ("rollout_logps", "old_logps", mismatch),
        ("ref_logps", "logps", spread),
    ):
        moved = batch[start] - grid(far * normal(generator, *shape))
        batch[name] = moved.clamp(max=-1 / 16)  # of probabilities
    return batch | {"response_mask": ragged_mask(generator, *shape, empty_row=True)}


def by_token(advantages, like):
    return advantages if advantages.dim() == 2 else advantages[:, None].expand(like.shape)


def with_gradient(batch, name, evaluate):
    """What `evaluate` makes of the batch, a loss, and the gradient in the array of that name."""
    leaf = batch[name].clone().requires_grad_()
    loss = evaluate(batch | {name: leaf})
    (gradient,) = torch.autograd.grad(loss, leaf)
    return {"loss": loss.detach(), f"d{name}": gradient}


def named(settings):
    """A case by what is not a default."""
    return ", ".join(f"{key} {value}" for key, value in settings.items()) or "defaults"


def plain(value):
    return value.tolist() if isinstance(value, torch.Tensor) else value


def write(name, package, functions, cases, version=None):
    """tests/golden/peers/NAME: a line per case, below what was called and of which version, the
    installed one or the commit of a checkout."""
    sources = {pathlib.Path(inspect.getsourcefile(function)) for function in functions}
    head = {
        "functions": [f"{each.__module__}.{each.__qualname__}" for each in functions],
        package: version or importlib.metadata.version(package),
        "torch": torch.__version__,
        "sha256": {
            source.name: hashlib.sha256(source.read_bytes()).hexdigest()
            for source in sorted(sources)
        },
    }
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    rows = [json.dumps({key: plain(value) for key, value in case.items()}) for case in cases]
    lines.append('"cases": [\n' + ",\n".join(rows) + "\n]")
    GOLDEN.mkdir(parents=True, exist_ok=True)
    (GOLDEN / name).write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{name}: {len(cases)} cases, {package} {head[package]}")
