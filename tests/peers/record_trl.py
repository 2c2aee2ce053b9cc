"""Records TRL's own GRPO loss, value and gradient, on random ragged batches.

    pip install -r tests/peers/requirements-trl.txt       in an environment of its own
    python tests/peers/record_trl.py                      writes tests/golden/peers/trl_grpo.json

`GRPOTrainer._compute_loss` itself is called, on an object that has what it reads of a trainer, with
the per-token log-probabilities given instead of computed by a model. Inputs are float64 multiples
of 2^-10.
"""

import collections
import hashlib
import importlib.metadata
import inspect
import json
import pathlib
import types

import torch
from trl import GRPOTrainer

OUT = pathlib.Path(__file__).resolve().parent.parent / "golden" / "peers" / "trl_grpo.json"

# What the settings are when a case does not say so.
DEFAULTS = {
    "loss_type": "grpo",
    "beta": 0.0,
    "epsilon_low": 0.2,
    "epsilon_high": 0.2,
    "delta": None,
    "accumulation_steps": 1,
    "steps_per_generation": 1,
    "processes": 1,
    "num_items_in_batch": None,  # dapo: None is the tokens of this batch
    "max_completion_length": 16,
}

VARIANTS = {
    "on policy": ({}, {"old": False}),
    "off policy, clip higher, beta": ({"beta": 0.04, "epsilon_high": 0.28}, {"ref": True}),
    "dual clip, narrow, beta, empty row": (
        {"beta": 0.25, "epsilon_low": 0.1, "epsilon_high": 0.3, "delta": 1.5,
         "accumulation_steps": 3, "steps_per_generation": 4, "num_items_in_batch": 52,
         "processes": 2},
        {"ref": True, "empty_row": True, "spread": 0.6},
    ),
    "advantages per token, two empty rows": (
        {"accumulation_steps": 2, "steps_per_generation": 2, "num_items_in_batch": 40},
        {"per_token": True, "empty_row": True, "rows": 6, "columns": 5},
    ),
}  # fmt: skip


def grid(x):
    return (x * 1024).round() / 1024


def ragged_mask(generator, rows, columns, empty_row):
    lengths = torch.randint(1, columns + 1, (rows,), generator=generator)
    if empty_row:
        lengths[1::3] = 0
    mask = torch.arange(columns) < lengths[:, None]
    holes = torch.rand(rows, columns, generator=generator) < 0.15
    holes[:, 0] = False  # a tool's tokens inside an answer
    return (mask & ~holes).long()


def random_batch(seed, *, rows=4, columns=7, old=True, ref=False, empty_row=False, per_token=False,
                 spread=0.3):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return grid(torch.randn(*shape, generator=generator, dtype=torch.float64))

    logps = -normal(rows, columns).abs() - 0.25
    return {
        "logps": logps,
        "old_logps": logps - grid(spread * normal(rows, columns)) if old else None,
        "ref_logps": logps + grid(spread * normal(rows, columns)) if ref else None,
        "advantages": normal(rows, columns) if per_token else normal(rows),
        "response_mask": ragged_mask(generator, rows, columns, empty_row),
    }


def trainer(settings, logps):
    """What _compute_loss reads of a GRPOTrainer in training."""
    entropies = torch.ones_like(logps).detach()
    return types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, entropies, None),
        loss_type=settings["loss_type"],
        beta=settings["beta"],
        epsilon_low=settings["epsilon_low"],
        epsilon_high=settings["epsilon_high"],
        current_gradient_accumulation_steps=settings["accumulation_steps"],
        max_completion_length=settings["max_completion_length"],
        args=types.SimpleNamespace(
            delta=settings["delta"],
            use_bias_correction_kl=False,
            steps_per_generation=settings["steps_per_generation"],
        ),
        importance_sampling_level="token",
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        model=types.SimpleNamespace(training=True),
        accelerator=types.SimpleNamespace(
            num_processes=settings["processes"],
            gather=lambda tensor: tensor,
            reduce=lambda tensor, reduction: tensor,
        ),
        _metrics={"train": collections.defaultdict(list)},
    )


def compute(settings, batch):
    logps = batch["logps"].clone().requires_grad_()
    mask = batch["response_mask"]
    prompts = torch.zeros(len(mask), 1, dtype=torch.long)
    items = settings["num_items_in_batch"]
    inputs = {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": batch["advantages"],
        "old_per_token_logps": batch["old_logps"],
        "ref_per_token_logps": batch["ref_logps"],
        "num_items_in_batch": mask.sum() if items is None else torch.tensor(items),
    }
    loss = GRPOTrainer._compute_loss(trainer(settings, logps), None, inputs)
    (gradient,) = torch.autograd.grad(loss, logps)
    return loss, gradient


def plain(value):
    return value.tolist() if isinstance(value, torch.Tensor) else value


def main():
    cases = []
    for loss_type in ("grpo", "bnpo", "dr_grpo", "dapo"):
        for name, (changes, shape) in VARIANTS.items():
            settings = DEFAULTS | changes | {"loss_type": loss_type}
            batch = random_batch(len(cases), **shape)
            loss, gradient = compute(settings, batch)
            case = {"name": f"{loss_type}: {name}", "settings": settings}
            case |= {key: plain(value) for key, value in batch.items()}
            case |= {"loss": loss.item(), "dlogps": gradient.tolist()}
            cases.append(case)
    source = pathlib.Path(inspect.getsourcefile(GRPOTrainer))
    recording = {
        "function": "trl.GRPOTrainer._compute_loss",
        "trl": importlib.metadata.version("trl"),
        "torch": torch.__version__,
        "sha256": {source.name: hashlib.sha256(source.read_bytes()).hexdigest()},
        "cases": cases,
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(recording, indent=1) + "\n")
    print(f"{OUT.name}: {len(cases)} cases, trl {recording['trl']}")


if __name__ == "__main__":
    main()
