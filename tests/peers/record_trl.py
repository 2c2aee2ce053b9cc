"""Records TRL's own GRPO loss, value and gradient, on random ragged batches.

    pip install -r tests/peers/requirements-trl.txt       in an environment of its own
    python tests/peers/record_trl.py                      writes tests/golden/peers/trl_grpo.json

`GRPOTrainer._compute_loss` itself is called, on an object that has what it reads of a trainer, with
the per-token log-probabilities given instead of computed by a model.
"""

import collections
import types

import recording
import torch
from recording import grid, ragged_mask
from trl import GRPOTrainer

# What the settings are when a case does not say so.
DEFAULTS = {
    "loss_type": "grpo",
    "importance_sampling_level": "token",
    "beta": 0.0,
    "use_bias_correction_kl": False,
    "epsilon_low": 0.2,
    "epsilon_high": 0.2,
    "delta": None,
    "accumulation_steps": 1,
    "steps_per_generation": 1,
    "processes": 1,
    "num_items_in_batch": None,  # dapo: None is the tokens of this batch
    "max_completion_length": 16,
    "sapo_temperature_pos": 1.0,
    "sapo_temperature_neg": 1.05,
    "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 3.0,
    "vespo_lambda_neg": 2.0,
}
ARGS = ("delta", "use_bias_correction_kl", "steps_per_generation", "sapo_temperature_pos",
        "sapo_temperature_neg", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg",
        "vespo_lambda_neg")  # fmt: skip

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

SEQUENCE = {"importance_sampling_level": "sequence"}
# cispo: epsilon_high bounds the ratio itself.
CISPO = {"loss_type": "cispo", "epsilon_high": 1.25}
OFF, DUAL, PER_TOKEN = list(VARIANTS)[1:]

# What only some loss types have: settings above those of the variant.
FURTHER = [
    *[(SEQUENCE | {"loss_type": each}, variant) for each in ("grpo", "bnpo", "dapo", "luspo")
      for variant in (OFF, DUAL, PER_TOKEN)],
    *[({"loss_type": "luspo"}, variant) for variant in (OFF, DUAL)],
    *[(CISPO, variant) for variant in (OFF, PER_TOKEN)],
    *[(SEQUENCE | CISPO | {"epsilon_high": 1.05}, variant) for variant in (OFF, PER_TOKEN)],
    *[({"loss_type": each, "use_bias_correction_kl": True}, OFF) for each in ("grpo", "dapo")],
    *[({"loss_type": each}, variant) for each in ("sapo", "vespo") for variant in (OFF, PER_TOKEN)],
]  # fmt: skip


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
        args=types.SimpleNamespace(**{name: settings[name] for name in ARGS}),
        importance_sampling_level=settings["importance_sampling_level"],
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
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


def recorded(seed, variant, over):
    changes, shape = VARIANTS[variant]
    settings = DEFAULTS | changes | over
    batch = random_batch(seed, **shape)
    loss, gradient = compute(settings, batch)
    words = [value if isinstance(value, str) else f"{key} {value}" for key, value in over.items()]
    case = {"name": f"{', '.join(words)}: {variant}", "settings": settings}
    return case | batch | {"loss": loss, "dlogps": gradient}


def entropy_case(seed, share):
    """Which tokens are among the `share` of highest entropy, with a quantile between two."""
    generator = torch.Generator().manual_seed(seed)
    mask = recording.ragged_mask(generator, 4, 7, empty_row=True)
    entropies = recording.normal(generator, 4, 7).abs()
    accelerator = types.SimpleNamespace(
        pad_across_processes=lambda tensor, **_: tensor, gather=lambda tensor: tensor
    )
    picked = GRPOTrainer.get_high_entropy_mask(
        types.SimpleNamespace(accelerator=accelerator), entropies, mask, 1 - share
    )
    case = {"name": f"top {share:g}", "share": share, "entropies": entropies}
    return case | {"response_mask": mask, "picked": picked.long()}


def main():
    plans = [
        ({"loss_type": loss_type}, variant)
        for loss_type in ("grpo", "bnpo", "dr_grpo", "dapo")
        for variant in VARIANTS
    ]
    cases = [recorded(seed, variant, over) for seed, (over, variant) in enumerate(plans + FURTHER)]
    recording.write("trl_grpo.json", "trl", [GRPOTrainer._compute_loss], cases)
    cases = [entropy_case(seed, share) for seed, share in enumerate((0.125, 0.25, 0.5, 0.9, 1.0))]
    recording.write("trl_entropy.json", "trl", [GRPOTrainer.get_high_entropy_mask], cases)


if __name__ == "__main__":
    main()
