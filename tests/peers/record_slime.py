"""Records slime's policy loss with its metrics, and its advantages, on micro-batches as its trainer
hands them over: ragged rows, one after the other.

    build/peers/parts/bin/python tests/peers/record_slime.py FOLDER

where FOLDER has a checkout slime. It writes tests/golden/peers/slime_{loss,advantages}.json. Its
modules are loaded alone (parts.py); log-probabilities and entropies are given, not computed by a
model.
"""

import pathlib
import sys
import types

import parts
import recording
import torch
from recording import normal

FOLDER = pathlib.Path(sys.argv[1])
Namespace = types.SimpleNamespace
torch.compiler.set_stance("force_eager")
SLIME = parts.load(
    "slime.backends.megatron_utils.loss",
    root=FOLDER / "slime",
    absent=("megatron", "slime.utils.distributed_utils", "slime.utils.misc", "slime.utils.types"),
)
DENOMINATORS = sys.modules["slime.backends.megatron_utils.cp_utils"]
for each in (SLIME, DENOMINATORS, sys.modules["megatron.core"]):
    each.mpu = Namespace(
        get_context_parallel_world_size=lambda: 1,
        get_context_parallel_rank=lambda: 0,
        get_context_parallel_group=lambda: None,
        is_pipeline_last_stage=lambda: True,
    )
DEFAULTS = {
    "advantage_estimator": "grpo",
    "eps_clip": 0.2,
    "eps_clip_high": 0.28,
    "eps_clip_c": None,
    "calculate_per_token_loss": False,
    "use_opsm": False,
    "opsm_delta": 0.05,
    "use_tis": False,
    "tis_clip_low": 0.8,
    "tis_clip": 1.2,
    "custom_tis_function_path": None,
    "custom_pg_loss_reducer_function_path": None,
    "get_mismatch_metrics": False,
    "use_rollout_logprobs": False,
    "entropy_coef": 0.0,
    "use_kl_loss": False,
    "kl_loss_type": "k1",
    "kl_loss_coef": 0.25,
    "use_unbiased_kl": False,
}
KINDS = ("k1", "k2", "k3", "low_var_kl")
PLANS = [
    {},
    {"calculate_per_token_loss": True, "entropy_coef": 0.1},
    {"eps_clip_c": 1.5, "eps_clip": 1.2},
    {"advantage_estimator": "gspo", "eps_clip": 0.05, "eps_clip_high": 0.1, "use_tis": True},
    {"advantage_estimator": "cispo"},
    {"advantage_estimator": "cispo", "eps_clip": 1.2},
    {"advantage_estimator": "ppo", "use_tis": True},
    {"use_tis": True, "custom_tis_function_path": "rejection", "entropy_coef": 0.1},
    {"get_mismatch_metrics": True, "use_rollout_logprobs": True},
    {"use_rollout_logprobs": True},
    {"custom_pg_loss_reducer_function_path": "constant"},
    {"use_opsm": True, "opsm_delta": 0.0},
    {"use_opsm": True, "advantage_estimator": "gspo", "use_kl_loss": True},
    *({"use_kl_loss": True, "kl_loss_type": kind, "use_unbiased_kl": unbiased}
      for kind in KINDS for unbiased in (False, True)),
]  # fmt: skip
LENGTHS = [5, 3, 1, 6, 4, 2]


def rejection(args, *, pg_loss, train_log_probs, rollout_log_probs, loss_masks, **_):
    """A correction of a user: twice the loss of tokens whose ratio is near, no others."""
    ratios = [(a - b).exp() for a, b in zip(train_log_probs, rollout_log_probs, strict=True)]
    masks = [m * (r <= args.tis_clip) for m, r in zip(loss_masks, ratios, strict=True)]
    return 2 * pg_loss, masks, {"far": torch.cat(ratios) / 2}


def constant(total_lengths, response_lengths, loss_masks, calculate_per_token_loss):
    """A mean of a user."""
    mask = torch.cat(loss_masks)
    return lambda x: (x * mask).sum() / (100 + sum(total_lengths))


SLIME.load_function = {"rejection": rejection, "constant": constant}.__getitem__


def rows_of(seed):
    """Six answers, one of them masked altogether."""
    generator = torch.Generator().manual_seed(seed)
    masks = [(torch.rand(each, generator=generator) < 0.8).int() for each in LENGTHS]
    for row, mask in enumerate(masks):
        mask[0] = int(row != 3)
        mask *= int(row != 3)
    names = {"logps": 0.0, "old": 0.5, "rollout": 0.3, "ref": 0.5}
    rows = {"loss_masks": masks}
    start = [-normal(generator, each).abs() - 0.25 for each in LENGTHS]
    for name, far in names.items():
        rows[name] = [row - recording.grid(far * normal(generator, len(row))) for row in start]
    for row in rows["ref"][:2]:
        row[0] += 3.0  # far beyond the bound of low_var_kl
    rows["advantages"] = [
        normal(generator, 1).expand(each) if seed % 2 else normal(generator, each)
        for each in LENGTHS
    ]
    rows["entropies"] = [normal(generator, each).abs() for each in LENGTHS]
    return rows


def batch_of(rows, seed):
    """What slime calls a batch. Of some rollouts are several answers; some batches have no
    log-probabilities of the trainer, some a teacher."""
    rollouts = torch.tensor([0, 0, 1, 2, 3, 3] if seed % 3 == 0 else [0, 1, 2, 3, 4, 5])
    counts = torch.tensor([float(each.sum()) for each in rows["loss_masks"]])
    sums = torch.stack([counts[rollouts == each].sum() for each in rollouts])
    batch = {
        "advantages": rows["advantages"],
        "rollout_log_probs": rows["rollout"],
        "ref_log_probs": rows["ref"],
        "loss_masks": rows["loss_masks"],
        "rollout_mask_sums": sums,
        "response_lengths": LENGTHS,
        "total_lengths": [each + 2 for each in LENGTHS],
        "unconcat_tokens": None,
    }
    if seed % 4 != 1:
        batch["log_probs"] = rows["old"]
    if seed % 4 == 2:
        batch["opd_reverse_kl"] = rows["entropies"]
    return batch


def plain(value):
    return [plain(each) for each in value] if isinstance(value, list) else recording.plain(value)


def loss_case(seed, changes):
    settings, rows = DEFAULTS | changes, rows_of(seed)
    args, batch = Namespace(**settings), batch_of(rows, seed)
    leaves = {name: [row.clone().requires_grad_() for row in rows[name]]
              for name in ("logps", "entropies")}  # fmt: skip
    found = {"log_probs": leaves["logps"], "entropy": leaves["entropies"]}
    SLIME.get_log_probs_and_entropy = lambda *_, **__: (None, found)
    SLIME.get_rollout_top_p_logprob_kwargs = lambda *_: {}
    mean = DENOMINATORS.get_sum_of_sample_mean(
        batch["total_lengths"],
        LENGTHS,
        batch["loss_masks"],
        batch["rollout_mask_sums"],
        args.calculate_per_token_loss,
    )
    loss, shown = SLIME.policy_loss_function(args, batch, None, mean)
    gradients = torch.autograd.grad(loss, leaves["logps"], retain_graph=True)
    of_entropies = torch.autograd.grad(loss, leaves["entropies"], allow_unused=True)
    return {
        "name": recording.named(changes),
        "settings": settings,
        "rows": {name: plain(rows[name]) for name in ("logps", "entropies")},
        "batch": {name: plain(each) for name, each in batch.items()},
        "loss": loss.detach(),
        "dlogps": torch.cat(gradients),
        "dentropies": torch.cat(of_entropies),
        "metrics": {name: each.item() for name, each in shown.items()},
    }


# ---- advantages ----------------------------------------------------------------------------------

ESTIMATORS = ("grpo", "gspo", "cispo", "ppo", "reinforce_plus_plus", "reinforce_plus_plus_baseline")
ADVANTAGES = {
    "kl_loss_type": "k2",
    "gamma": 0.875,
    "lambd": 0.75,
    "use_rollout_logprobs": False,
    "custom_advantage_function_path": None,
    "use_opd": False,
    "normalize_advantages": False,
}


def advantage_case(seed, estimator, kl_coef):
    rows = rows_of(seed)
    del rows["loss_masks"][3]  # an answer that is masked altogether is refused
    names = {"log_probs": "old", "ref_log_probs": "ref", "values": "advantages"}
    lengths = [each for row, each in enumerate(LENGTHS) if row != 3]
    data = {
        name: [row.float() for i, row in enumerate(rows[word]) if i != 3]
        for name, word in names.items()
    }
    data |= {"loss_masks": rows["loss_masks"], "rewards": [1.0, -0.5, 2.0, 0.25, 0.75]}
    data |= {"response_lengths": lengths, "total_lengths": [each + 2 for each in lengths]}
    settings = ADVANTAGES | {"advantage_estimator": estimator, "kl_coef": kl_coef}
    SLIME.compute_advantages_and_returns(Namespace(**settings), data)
    return {
        "name": f"{estimator}, kl_coef {kl_coef:g}",
        "settings": settings,
        "data": {name: plain(each) for name, each in data.items()},
    }


def write(name, functions, cases):
    commit = parts.commit_of(FOLDER / "slime")
    recording.write(f"slime_{name}.json", "slime", functions, cases, version=commit)


def main():
    cases = [loss_case(seed, changes) for seed, changes in enumerate(PLANS)]
    functions = [SLIME.policy_loss_function, SLIME.compute_policy_loss]
    write("loss", functions, cases)
    cases = [
        advantage_case(seed, estimator, kl_coef)
        for seed, estimator in enumerate(ESTIMATORS)
        for kl_coef in (0.0, 0.25)
    ]
    functions = [SLIME.compute_advantages_and_returns, SLIME.get_advantages_and_returns_batch]
    write("advantages", functions, cases)


if __name__ == "__main__":
    main()
