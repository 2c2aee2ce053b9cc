"""Records ms-swift's own GRPO loss on random ragged batches.

    build/peers/swift/bin/python tests/peers/record_swift.py

writes tests/golden/peers/swift_grpo.json and swift_teacher.json. The trainer's
`_compute_loss_and_metrics` itself is called, on a trainer that has only what it reads, with the
log-probabilities given instead of computed by a model; and the functions of a teacher's
log-probabilities.
"""

import collections
import math
import types

import recording
import torch
from recording import policy_batch, with_gradient
from swift.rl_core.advantage import apply_rlsd_reweight, compute_sdar_loss
from swift.rlhf_trainers.grpo_trainer import GRPOTrainer

# Of the trainer; what is of its `args` besides.
DEFAULTS = {
    "loss_type": "grpo",
    "importance_sampling_level": "token",
    "beta": 0.0,
    "epsilon_low": 0.2,
    "epsilon_high": 0.28,
    "max_completion_length": 16,
    "tau_pos": 1.0,
    "tau_neg": 1.05,
    "fipo_gamma": 2 ** (-1 / 32),
    "fipo_clip_range": 0.2,
    "fipo_clip_high_only": True,
    "fipo_safety_threshold": 4.0,
    "top_entropy_quantile": 1.0,
    "rollout_importance_sampling_mode": None,
    "rollout_importance_sampling_threshold": 1.1,
    "off_policy_sequence_mask_delta": None,
}
ARGS = {"delta": None, "top_entropy_quantile": 1.0, "gradient_accumulation_steps": 3}
STEP = {"items": 52, "processes": 2}  # tokens of the step, over its ranks

FIPO = {"loss_type": "fipo", "fipo_gamma": 0.75}
WIDE = {"fipo_clip_range": 0.3, "fipo_clip_high_only": False, "fipo_safety_threshold": 1.2}
PLANS = [
    ("fipo", FIPO, {}),
    ("fipo, clipped on both sides", FIPO | WIDE, {}),
    ("fipo, dual clip", FIPO | WIDE, {"delta": 1.5}),
    ("fipo, gamma 1", {"loss_type": "fipo", "fipo_gamma": 1.0, "fipo_clip_range": 0.9}, {}),
    *((each, {"loss_type": each}, {}) for each in ("grpo", "bnpo", "dr_grpo", "dapo", "sapo")),
    ("cispo", {"loss_type": "cispo", "epsilon_high": 1.25}, {}),
    ("dual clip, beta", {"beta": 0.25}, {"delta": 1.5}),
    *((f"grpo, {level}", {"importance_sampling_level": level, "epsilon_low": 0.1}, {})
      for level in ("sequence", "sequence_token")),
    *((mode, {"rollout_importance_sampling_mode": mode, "loss_type": "dapo"}, {})
      for mode in ("token_truncate", "token_mask", "sequence_truncate")),
    ("token_mask, beta", {"rollout_importance_sampling_mode": "token_mask", "beta": 0.25}, {}),
]  # fmt: skip
# Of seeds where the bounds tell.
SEQUENCE_MASK = {"rollout_importance_sampling_mode": "sequence_mask", "loss_type": "dapo"}
OFF_POLICY = {"grpo": 98, "bnpo": 129, "dapo": 221}
HOLES = ("fipo, holes in the mask", FIPO | WIDE, {})


def trainer_of(settings, args, logps):
    """A trainer in training that has what its loss reads."""
    trainer = object.__new__(GRPOTrainer)
    accelerator = types.SimpleNamespace(
        num_processes=STEP["processes"], gather_for_metrics=lambda tensor: tensor
    )
    trainer.__dict__ |= settings | {
        "args": types.SimpleNamespace(**ARGS | args, log_entropy=False),
        "model": types.SimpleNamespace(training=True),
        "accelerator": accelerator,
        "compute_entropy": False,
        "overlong_filter": False,
        "kl_in_reward": False,
        "log_rollout_offpolicy_metrics": False,
        "disable_rollout_importance_sampling": False,
        "_has_teacher": False,
        "sdar_loss_coef": 0.0,
        "chord_sft_iterator": None,
        "model_accepts_loss_kwargs": True,
        "compute_loss_func": None,
        "_metrics": {"train": collections.defaultdict(list)},
        "_get_per_token_logps_and_entropies": lambda *_, **__: (logps, None),
    }
    return trainer


def grpo(batch, settings, args):
    mask = batch["response_mask"] > 0
    with_engine = settings["rollout_importance_sampling_mode"] is not None
    inputs = types.SimpleNamespace(
        completion_mask=mask,
        truncated_mask=torch.zeros(len(mask), dtype=torch.bool),
        advantages=batch["advantages"][:, None].expand(mask.shape),
        old_per_token_logps=batch["old_logps"],
        ref_per_token_logps=batch["ref_logps"],
        rollout_per_token_logps=batch["rollout_logps"] if with_engine else None,
        num_items_in_batch=torch.tensor(STEP["items"]),
    )
    trainer = trainer_of(settings, args, batch["logps"])
    return trainer._compute_loss_and_metrics(None, {}, inputs)[0]


def grpo_case(seed, name, changes, args, holes=False):
    settings = DEFAULTS | changes
    batch = policy_batch(seed)
    if not holes:
        lengths = batch["response_mask"].sum(1, keepdim=True)
        batch["response_mask"] = (torch.arange(batch["logps"].shape[1]) < lengths).long()
    out = with_gradient(batch, "logps", lambda live: grpo(live, settings, args))
    settings = settings | {"delta": args.get("delta"), "step": STEP}
    return {"name": name, "settings": settings} | batch | out


# ---- a teacher, whose log-probabilities are ref_logps --------------------------------------------


def rlsd_case(seed, mix, clip, negative_only):
    """GRPO with the advantages that the teacher has shared out among the tokens."""
    batch = policy_batch(seed)
    mask = batch["response_mask"]
    advantages = apply_rlsd_reweight(
        batch["advantages"], mask, batch["ref_logps"], batch["logps"], mix, clip, negative_only
    )
    settings = {"loss": "rlsd", "mix": mix, "epsilon": clip, "negative_only": negative_only}
    case = {"name": f"RLSD, negative only {negative_only}", "settings": settings}
    return case | batch | {"reweighted": advantages}


def sdar_case(seed, mode):
    batch = policy_batch(seed)
    out = with_gradient(
        batch,
        "logps",
        lambda live: compute_sdar_loss(
            live["logps"], live["ref_logps"], live["response_mask"], loss_agg_mode=mode
        )[0],
    )
    settings = {"loss": "sdar", "gate_beta": 5.0, "loss_agg_mode": mode}
    return {"name": f"SDAR, {mode}", "settings": settings} | batch | out


def main():
    cases = [grpo_case(seed, *plan) for seed, plan in enumerate(PLANS)]
    cases.append(grpo_case(23, "sequence_mask", SEQUENCE_MASK, {}))
    for loss, seed in OFF_POLICY.items():
        changes = {"loss_type": loss, "off_policy_sequence_mask_delta": 0.05}
        cases.append(grpo_case(seed, f"off-policy mask, {loss}", changes, {}))
    cases.append(grpo_case(100, *HOLES, holes=True))
    assert all(math.isfinite(case["loss"]) for case in cases)
    functions = [GRPOTrainer._compute_loss_and_metrics]
    recording.write("swift_grpo.json", "ms-swift", functions, cases)
    cases = [rlsd_case(0, 0.5, 0.2, False), rlsd_case(1, 0.75, 0.3, True)]
    modes = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")
    cases += [sdar_case(10 + seed, mode) for seed, mode in enumerate(modes)]
    functions = [apply_rlsd_reweight, compute_sdar_loss]
    recording.write("swift_teacher.json", "ms-swift", functions, cases)


if __name__ == "__main__":
    main()
