"""Records the losses of slime, ROLL, NeMo-RL, prime-rl and open-instruct, of checkouts in one
folder, on random ragged batches.

    build/peers/parts/bin/python tests/peers/record_checkouts.py FOLDER

where FOLDER has slime, ROLL, NeMo-RL, prime-rl and open-instruct. It writes
tests/golden/peers/{slime,roll,nemo_rl,prime_rl,open_instruct}_policy.json. Their modules of losses
are loaded alone (parts.py), and log-probabilities are given instead of computed by a model.
"""

import pathlib
import sys
import types

import parts
import recording
import torch
from recording import by_token, named, policy_batch, with_gradient

FOLDER = pathlib.Path(sys.argv[1])
Namespace = types.SimpleNamespace


def case_of(seed, name, settings, evaluate, per_token=False, prepare=dict):
    batch = prepare(policy_batch(seed, per_token=per_token))
    out = with_gradient(batch, "logps", evaluate)
    return {"name": name, "settings": settings} | batch | out


def write(name, folder, functions, cases):
    commit = parts.commit_of(FOLDER / folder)
    recording.write(f"{name}_policy.json", name, functions, cases, version=commit)


# ---- slime: rows without padding, one after the other --------------------------------------------

torch.compiler.set_stance("force_eager")
SLIME = parts.load(
    "slime.backends.megatron_utils.loss",
    root=FOLDER / "slime",
    absent=("megatron", "slime.utils.distributed_utils", "slime.utils.misc", "slime.utils.types"),
)
DENOMINATORS = sys.modules["slime.backends.megatron_utils.cp_utils"]
for each in (SLIME, DENOMINATORS):
    each.mpu = Namespace(get_context_parallel_world_size=lambda: 1,
                         get_context_parallel_group=lambda: None)  # fmt: skip
SLIME_DEFAULTS = {
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
    "use_rollout_logprobs": False,
    "entropy_coef": 0.0,
    "use_kl_loss": False,
    "kl_loss_type": "k1",
    "kl_loss_coef": 0.25,
    "use_unbiased_kl": False,
    "get_mismatch_metrics": False,
    "custom_tis_function_path": None,
    "rollouts": None,  # which rollout a row is of; rows of one share a denominator
}
SLIME_PLANS = [
    {},
    {"calculate_per_token_loss": True},
    {"eps_clip_c": 1.5},
    {"advantage_estimator": "gspo", "eps_clip": 0.05, "eps_clip_high": 0.1},
    {"advantage_estimator": "cispo"},
    {"use_tis": True},
    {"use_tis": True, "custom_tis_function_path": "icepop"},
    {"use_rollout_logprobs": True},
    {"rollouts": [0, 0, 1, 1, 2, 3, 3]},
]
SLIME_PENALTIES = [
    {"use_kl_loss": True, "kl_loss_type": kind, "use_unbiased_kl": unbiased}
    for kind in ("k1", "k2", "k3", "low_var_kl")
    for unbiased in (False, True)
]
SLIME_PLANS = dict(enumerate(SLIME_PLANS + SLIME_PENALTIES)) | {  # seeds where bounds matter
    63: {"use_opsm": True},
    129: {"use_opsm": True, "calculate_per_token_loss": True},
}
SLIME.load_function = lambda _: SLIME.icepop_function


def slime_denominators(rollouts, mask):
    if rollouts is None:
        return None
    rollouts = torch.tensor(rollouts)
    tokens = mask.sum(1).double()
    return [tokens[rollouts == each].sum() for each in rollouts]


def slime(batch, settings):
    args, mask = Namespace(**settings), batch["response_mask"]
    rows = {"logps": "log_probs", "old_logps": "old", "rollout_logps": "rollout_log_probs",
            "ref_logps": "ref_log_probs"}  # fmt: skip
    data = {word: list(batch[name].unbind()) for name, word in rows.items()}
    logps = data.pop("log_probs")
    SLIME.get_log_probs_and_entropy = lambda *_, **__: (
        None,
        {"log_probs": logps, "entropy": [torch.ones_like(row) for row in logps]},
    )
    SLIME.get_rollout_top_p_logprob_kwargs = lambda *_: {}
    lengths = [mask.shape[1]] * len(mask)
    masks = list(mask.double().unbind())
    shared = slime_denominators(settings["rollouts"], mask)
    data |= {"log_probs": data.pop("old"), "loss_masks": masks, "rollout_mask_sums": shared}
    data["advantages"] = list(by_token(batch["advantages"], mask).unbind())
    data |= {"response_lengths": lengths, "total_lengths": lengths, "unconcat_tokens": None}
    mean = DENOMINATORS.get_sum_of_sample_mean(
        lengths, lengths, masks, shared, settings["calculate_per_token_loss"]
    )
    return SLIME.policy_loss_function(args, data, None, mean)[0]


def slime_case(seed, changes):
    settings = SLIME_DEFAULTS | changes
    return case_of(seed, named(changes), settings, lambda live: slime(live, settings))


# ---- ROLL ----------------------------------------------------------------------------------------

ABSENT = ("codetiming", "imageio", "roll.configs", "roll.distributed", "roll.platforms",
          "roll.pipeline.agentic.agentic_config", "roll.pipeline.agentic.agentic_pipeline",
          "roll.pipeline.base_worker", "roll.pipeline.rlvr.actor_worker",
          "roll.pipeline.rlvr.rlvr_config", "roll.pipeline.rlvr.utils", "roll.utils.kl_controller",
          "roll.utils.logging", "tensordict", "transformers")  # fmt: skip
ANSWERS, TURNS = (
    parts.load(f"roll.pipeline.{name}", root=FOLDER / "ROLL", absent=ABSENT)
    for name in ("rlvr.actor_pg_worker", "agentic.agentic_actor_pg_worker")
)
ROLL_DEFAULTS = {
    "variant": "vanilla",
    "options": {},  # of the variant
    "loss_agg_mode": "seq-mean-token-mean",
    "pg_clip": 0.2,
    "pg_clip_low": 0.2,
    "pg_clip_high": 0.28,
    "dual_clip_loss": False,
    "kl_loss_coef": 0.0,
    "turns": False,  # the worker of agents, whose ratios are those of turns
    "is_weight": None,
    "filter": None,
    "score_sign": 1,  # of the advantage
}
FILTER = {"agg_type": "token", "ratio_enabled": False, "diff_enabled": False}
ROLL_PLANS = [
    *({"loss_agg_mode": f"seq-mean-token-{each}"} for each in ("sum", "mean", "sum-norm")),
    {"variant": "ppo"},
    {"variant": "ppo", "dual_clip_loss": True, "loss_agg_mode": "seq-mean-token-sum"},
    {"variant": "tis"},
    {"variant": "topr", "options": {"topr_positive_weight": 1.5, "topr_negative_weight": 0.5}},
    {"variant": "topr"},
    {"variant": "cispo"},
    {"variant": "kimi15", "options": {"kimi15_tau": 0.5}},
    {"variant": "kimi15", "loss_agg_mode": "seq-mean-token-sum"},
    {"variant": "ppo", "kl_loss_coef": 0.25},
    {"variant": "ppo", "is_weight": ("token", 1.2)},
    {"variant": "ppo", "is_weight": ("geometric", 1.05)},
    {"variant": "vanilla", "is_weight": ("sequence", 1.2)},
    {"variant": "vanilla", "is_weight": ("segment", 1.1)},
    *({"variant": "ppo", "filter": {"agg_type": each, "ratio_enabled": True,
                                    "ratio_low": 0.85, "ratio_high": 1.2}}
      for each in ("token", "geometric", "sequence", "segment")),
    {"variant": "ppo", "filter": {"diff_enabled": True, "diff_low": -0.08, "diff_high": 0.08}},
    {"variant": "ppo", "turns": True},
    {"variant": "tis", "turns": True},
    {"variant": "cispo", "turns": True},
]  # fmt: skip
UNIFIED = {"cispo_use_unified_mask": True, "cispo_epsilon_high": 0.25}
ROLL_PLANS = dict(enumerate(ROLL_PLANS)) | {
    35: {"variant": "cispo", "options": UNIFIED},
    36: {"variant": "topr", "score_sign": -1},
    40: {"variant": "kimi15", "loss_agg_mode": "token-mean"},  # where padding enters
}


def roll_config(settings):
    filters = [] if settings["filter"] is None else [
        Namespace(enabled=True, **FILTER | settings["filter"])
    ]  # fmt: skip
    kind, bound = settings["is_weight"] or (None, None)
    weight = Namespace(enabled=kind is not None, weight_type=kind, upper_bound=bound, detach=True)
    return Namespace(
        actor_train=Namespace(pg_variant=settings["variant"], **settings["options"]),
        train_infer_correction=Namespace(is_weight=weight, filters=filters),
        enable_old_logprobs_recompute=False,
        ratio_type="segment" if settings["turns"] else "token",
        use_pg_clip_range=True,
        use_kl_loss=settings["kl_loss_coef"] > 0,
        rl_loss_coef=1.0,
        entropy_loss_coef=0.0,
        **settings,
    )


def roll(batch, settings):
    mask = batch["response_mask"]
    worker = TURNS.ActorWorker() if settings["turns"] else ANSWERS.ActorPGWorker()
    worker.pipeline_config = roll_config(settings)
    entropies = torch.ones_like(batch["ref_logps"])
    worker.strategy = Namespace(op_compute_log_probs=lambda **_: batch["logps"],
                                op_compute_entropy=lambda **_: entropies)  # fmt: skip
    worker.get_old_log_probs_with_cache = lambda *_: batch["old_logps"]
    worker.compute_sample_weights = lambda *_: torch.ones(len(mask))
    worker._get_pg_metrics = lambda *_, **__: {}
    arrays = {
        "response_mask": torch.cat([torch.zeros_like(mask[:, :1]), mask], 1),
        "ref_log_probs": batch["ref_logps"],
        "advantages": by_token(batch["advantages"], mask) * mask,
        "infer_logprobs": batch["rollout_logps"],
        "input_ids": None,
        "scores": batch["advantages"] * settings["score_sign"],
    }
    counts = {"response_mask": mask.sum().item()}
    rows = {"response_mask": (mask.sum(1) > 0).sum().item()}
    data = Namespace(batch=arrays, meta_info={"batch_num_tokens": counts,
                                              "global_valid_samples": rows})  # fmt: skip
    return worker.loss_func(data, None)[0]


def roll_case(seed, changes):
    settings = ROLL_DEFAULTS | changes
    words = [str(each) for key, each in changes.items() if each is not True]
    name = ", ".join([*words, *(["turns"] if settings["turns"] else [])])
    return case_of(seed, name, settings, lambda live: roll(live, settings))


# ---- NeMo-RL -------------------------------------------------------------------------------------

NEMO = parts.load(
    "nemo_rl.algorithms.loss.loss_functions",
    root=FOLDER / "NeMo-RL",
    absent=("nemo_rl.algorithms.x_token", "nemo_rl.data", "nemo_rl.distributed", "nemo_rl.models",
            "nemo_rl.utils", "transformers"),
)  # fmt: skip
CORRECTED = {"use_importance_sampling_correction": True}
SEQUENCE = {"sequence_level_importance_ratios": True, "token_level_loss": False,
            "ratio_clip_min": 0.05, "ratio_clip_max": 0.1}  # fmt: skip
NEMO_PLANS = [
    {},
    {"token_level_loss": False},
    {"reference_policy_kl_penalty": 0.0, "ratio_clip_c": 1.5},
    SEQUENCE,
    {"use_cispo": True, "ratio_clip_max": 0.3},
    {"disable_ppo_ratio": True},
    {"force_on_policy_ratio": True},
    *({"reference_policy_kl_type": kind, "reference_policy_kl_penalty": 0.25}
      for kind in ("k1", "k2", "k3")),
    {"use_on_policy_kl_approximation": True, "reference_policy_kl_penalty": 0.25},
    CORRECTED,
    SEQUENCE | CORRECTED,
    *(CORRECTED | {"truncated_importance_sampling_type": kind,
                   "truncated_importance_sampling_ratio": high,
                   "truncated_importance_sampling_ratio_min": low}
      for kind, low, high in (("tis", None, 1.2), ("tis", 0.8, 1.2), ("icepop", 0.8, 1.2),
                              ("seq-mask-tis", 0.9, 1.1))),
    CORRECTED | {"truncated_importance_sampling_type": "seq-mask-tis",
                 "truncated_importance_sampling_ratio": 1.1,
                 "truncated_importance_sampling_ratio_min": 0.9, "token_level_loss": False},
    {"positive_example_nll_weight": 0.5},
]  # fmt: skip
NEMO_STEP = {"global_valid_seqs": 9.0, "global_valid_toks": 40.0}


def behind_a_token(array):
    """The first token of a text is not predicted."""
    return torch.cat([torch.zeros_like(array[:, :1]), array], 1)


def nemo(batch, options):
    mask = batch["response_mask"].float()
    data = {
        "token_mask": behind_a_token(mask),
        "sample_mask": torch.ones(len(mask)),
        "advantages": behind_a_token(by_token(batch["advantages"], mask)),
        "prev_logprobs": behind_a_token(batch["old_logps"]),
        "generation_logprobs": behind_a_token(batch["rollout_logps"]),
        "reference_policy_logprobs": behind_a_token(batch["ref_logps"]),
        "rewards": by_token(batch["advantages"], mask)[:, 0],
    }
    loss = NEMO.ClippedPGLossFn(NEMO.ClippedPGLossConfig(**options))
    step = {name: torch.tensor(each) for name, each in NEMO_STEP.items()}
    return loss(batch["logps"], data, **step)[0]


def nemo_case(seed, options):
    settings = {"options": NEMO.ClippedPGLossConfig(**options).model_dump(), "step": NEMO_STEP}
    name = named(options)
    return case_of(seed, name, settings, lambda live: nemo(live, options))


# ---- prime-rl: rows without padding --------------------------------------------------------------

PRIME = parts.load(
    "prime_rl.trainer.rl.loss",
    root=FOLDER / "prime-rl" / "src",
    absent=("prime_rl.configs", "prime_rl.utils"),
)
PRIME_PLANS = {
    0: ("default", {"dppo_mask_low": 0.2, "dppo_mask_high": 0.2, "adv_tau": 1.0, "kl_tau": 1e-3}),
    15: ("default", {"dppo_mask_low": 0.05, "dppo_mask_high": 0.1, "adv_tau": 1.0, "kl_tau": 0.2}),
    2: ("ipo", {"ipo_threshold": 0.1, "adv_tau": 1.0, "kl_tau": 1e-3}),
    3: ("ipo", {"ipo_threshold": 0.06, "adv_tau": 0.5, "kl_tau": 0.2}),
}


def prime(batch, loss, options):
    function = {"default": PRIME.default_loss_fn, "ipo": PRIME.ipo_loss_fn}[loss]
    arrays = (batch["logps"], batch["rollout_logps"], None, by_token(batch["advantages"],
              batch["logps"]), batch["response_mask"] > 0)  # fmt: skip
    rows = [None if each is None else list(each.unbind()) for each in arrays]
    scales = (batch["response_mask"].sum(), 1, 1)
    of_rl = lambda inputs: function(inputs, Namespace(**options))  # noqa: E731
    return PRIME.compute_loss(*rows, None, None, None, of_rl, *scales)[0]


def prime_case(seed, loss, options):
    settings = {"loss": loss, "options": options}
    evaluate = lambda live: prime(live, loss, options)  # noqa: E731
    return case_of(seed, f"{loss} {options}", settings, evaluate, per_token=seed % 2 == 1)


# ---- open-instruct -------------------------------------------------------------------------------

OPEN = parts.load(
    "open_instruct.grpo_utils",
    root=FOLDER / "open-instruct",
    absent=("datasets", "pandas", "ray", "transformers", "wandb", "open_instruct.utils"),
)

OPEN_DEFAULTS = {
    "loss_fn": "dapo",
    "clip_lower": 0.2,
    "clip_higher": 0.272,
    "use_rho_correction": True,
    "rho_clamp_lower_bound": 0.0,
    "rho_clamp_upper_bound": 1.2,
    "rho_mask_lower_bound": 0.0,
    "rho_mask_upper_bound": 0.0,
    "rho_mask_sequence_level": False,
    "rho_mask_tv_divergence": False,
}
OPEN_MASK = {"rho_mask_lower_bound": 0.8, "rho_mask_upper_bound": 1.3}
OPEN_PLANS = [
    {"use_rho_correction": False},
    {},
    {"loss_fn": "cispo", "rho_clamp_lower_bound": 0.85},
    OPEN_MASK,
    OPEN_MASK | {"rho_mask_sequence_level": True, "rho_mask_upper_bound": 1.1},
    *({"rho_mask_tv_divergence": True, "rho_mask_upper_bound": high} for high in (0.15, 0.1)),
]


def open_instruct(batch, settings):
    mask = batch["response_mask"] > 0
    loss_fn = OPEN.GRPOLossType(settings["loss_fn"])
    config = Namespace(**settings | {"loss_fn": loss_fn})
    advantages = by_token(batch["advantages"], mask)
    arrays = (batch["old_logps"], batch["rollout_logps"], mask, advantages)
    weights = OPEN.compute_rho_correction(*arrays, config).weights
    ratio = (batch["logps"] - batch["old_logps"]).exp()
    arrays = (batch["logps"], ratio, advantages, None, config, weights)
    return OPEN.masked_mean(OPEN.compute_grpo_loss(*arrays)[0], mask)


def open_case(seed, changes):
    settings = OPEN_DEFAULTS | changes
    name = named(changes)
    return case_of(seed, name, settings, lambda live: open_instruct(live, settings))


def main():
    functions = [SLIME.policy_loss_function, SLIME.compute_gspo_kl]
    functions += [DENOMINATORS.get_sum_of_sample_mean]
    write("slime", "slime", functions, [slime_case(*plan) for plan in SLIME_PLANS.items()])
    functions = [ANSWERS.ActorPGWorker.loss_func, TURNS.ActorWorker.loss_func, ANSWERS.agg_loss]
    functions += [ANSWERS.compute_train_infer_correction, TURNS.compute_segment_masked_mean]
    write("roll", "ROLL", functions, [roll_case(*plan) for plan in ROLL_PLANS.items()])
    cases = [nemo_case(seed, each) for seed, each in enumerate(NEMO_PLANS)]
    write("nemo_rl", "NeMo-RL", [NEMO.ClippedPGLossFn.__call__, NEMO.calculate_kl], cases)
    cases = [prime_case(seed, *each) for seed, each in PRIME_PLANS.items()]
    functions = [PRIME.default_loss_fn, PRIME.ipo_loss_fn, PRIME.compute_loss]
    write("prime_rl", "prime-rl", functions, cases)
    cases = [open_case(seed, each) for seed, each in enumerate(OPEN_PLANS)]
    functions = [OPEN.compute_rho_correction, OPEN.compute_grpo_loss]
    write("open_instruct", "open-instruct", functions, cases)


if __name__ == "__main__":
    main()
