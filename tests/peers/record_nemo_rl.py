"""Records NeMo-RL's losses with their metrics, on micro-batches as its trainer hands them over.

    build/peers/parts/bin/python tests/peers/record_nemo_rl.py FOLDER

where FOLDER has a checkout NeMo-RL. It writes tests/golden/peers/nemo_rl_{loss,dpo}.json. The
module of losses is loaded alone (parts.py). The settings are the attributes of a loss.
"""

import pathlib
import sys

import parts
import recording
import torch
from recording import named, normal, policy_batch

FOLDER = pathlib.Path(sys.argv[1])
NEMO = parts.load(
    "nemo_rl.algorithms.loss.loss_functions",
    root=FOLDER / "NeMo-RL",
    absent=("nemo_rl.algorithms.x_token", "nemo_rl.data", "nemo_rl.distributed", "nemo_rl.models",
            "nemo_rl.utils", "transformers"),
)  # fmt: skip
CORRECTED = {"use_importance_sampling_correction": True}
ANSWERS = {"sequence_level_importance_ratios": True, "token_level_loss": False,
           "ratio_clip_min": 0.05, "ratio_clip_max": 0.1}  # fmt: skip
ROWS = {"token_level_loss": False}


def truncated(kind, low, high):
    return CORRECTED | {
        "truncated_importance_sampling_type": kind,
        "truncated_importance_sampling_ratio": high,
        "truncated_importance_sampling_ratio_min": low,
    }


KL = {"reference_policy_kl_penalty": 0.25}
NARROW = KL | {"kl_input_clamp_value": 0.6, "kl_output_clamp_value": 0.1}
PLANS = [
    {},
    ROWS,
    {"reference_policy_kl_penalty": 0.0, "ratio_clip_c": 1.5, "ratio_clip_max": 0.28},
    ANSWERS | {"ratio_clip_c": 1.5},
    {"use_cispo": True, "ratio_clip_min": 0.25, "ratio_clip_max": 0.3},
    {"disable_ppo_ratio": True},
    {"disable_ppo_ratio": True, "ratio_clip_c": 3.0} | ROWS,
    {"force_on_policy_ratio": True, "ratio_clip_c": 3.0},
    {"force_on_policy_ratio": True} | ANSWERS | CORRECTED,
    {"use_kl_in_reward": True},
    *(KL | {"reference_policy_kl_type": kind} for kind in ("k1", "k2", "k3")),
    *(NARROW | {"reference_policy_kl_type": kind} for kind in ("k1", "k2", "k3")),
    *(NARROW | {"reference_policy_kl_type": kind, "use_on_policy_kl_approximation": True}
      for kind in ("k1", "k2", "k3")),
    KL | {"kl_input_clamp_value": None, "kl_output_clamp_value": None} | ROWS,
    CORRECTED,
    ANSWERS | CORRECTED,
    ANSWERS | truncated("tis", 0.6, 1.4),
    truncated("tis", None, 1.2),
    truncated("tis", 0.8, 1.2) | ROWS,
    truncated("icepop", 0.8, 1.2),
    truncated("icepop", 0.8, 1.2) | ANSWERS,
    truncated("seq-mask-tis", 0.9, 1.1),
    truncated("seq-mask-tis", 0.9, 1.1) | ROWS,
    {"positive_example_nll_weight": 0.5},
    {"ratio_clip_min": 1.5},
    {"use_cispo": True, "ratio_clip_min": 1.5},
    *(KL | {"reference_policy_kl_type": "k1", "use_on_policy_kl_approximation": of_engine,
            "kl_input_clamp_value": 0.4, "kl_output_clamp_value": None}
      for of_engine in (False, True)),
]  # fmt: skip
STEP = {"global_valid_seqs": 9.0, "global_valid_toks": 40.0}


def behind_a_token(array):
    """The first token of a text is not predicted: its slot is never read."""
    return torch.cat([torch.full_like(array[:, :1], 7.0), array], 1)


def policy_data(seed):
    """Answers behind prompts; a sample that is not taken; of every other seed advantages of tokens.
    `filtered_by`: what a top-k has added to log-probabilities."""
    batch = policy_batch(seed, per_token=seed % 2 == 1)
    mask = batch["response_mask"].double()
    samples = torch.ones(len(mask), dtype=torch.float64)
    samples[-1] = 0.0
    advantages = recording.by_token(batch["advantages"], mask)
    data = {
        "advantages": behind_a_token(advantages),
        "prev_logprobs": behind_a_token(batch["old_logps"]),
        "generation_logprobs": behind_a_token(batch["rollout_logps"]),
        "reference_policy_logprobs": behind_a_token(batch["ref_logps"]),
        "token_mask": behind_a_token(mask),
        "sample_mask": samples,
        "rewards": advantages[:, 0].clone(),
    }
    if seed % 4 == 2:
        data["filtered_by"] = recording.grid(0.25 * batch["logps"].sin().abs())
    return batch["logps"], data


def pair_data(seed):
    """Neighbours are pairs; one pair is not taken, and of another the rejected answer is not."""
    generator = torch.Generator().manual_seed(seed)
    logps = -normal(generator, 8, 5).abs() - 0.25
    mask = (torch.arange(5) < torch.randint(1, 6, (8,), generator=generator)[:, None]).double()
    samples = torch.ones(8, dtype=torch.float64)
    samples[3:6] = 0.0
    ref = logps - 0.5 * normal(generator, 8, 5)
    data = {
        "reference_policy_logprobs": torch.cat([ref, ref[:, :1]], 1),
        "token_mask": behind_a_token(mask),
        "sample_mask": samples,
    }
    return logps, data


def settings_of(loss):
    """The attributes that are numbers or words."""
    words = {key: each.value if key == "loss_type" else each for key, each in vars(loss).items()}
    return {key: each for key, each in words.items()
            if each is None or isinstance(each, (bool, int, float, str))}  # fmt: skip


def case_of(loss, options, logps, data):
    """Masks in float32, as NeMo-RL has them: its 1e-8 is nothing beside their counts."""
    leaf = logps.clone().requires_grad_()
    step = {name: torch.tensor(each) for name, each in STEP.items()}
    masks = {name: data[name].float() for name in ("token_mask", "sample_mask")}
    given = data | masks
    if "filtered_by" in data:
        given["curr_logprobs_unfiltered"] = leaf - data["filtered_by"]
    value, metrics = loss(leaf, given, **step)
    (gradient,) = torch.autograd.grad(value, leaf)
    return {
        "name": named(options),
        "settings": settings_of(loss),
        "step": STEP,
        "data": {name: each.tolist() for name, each in data.items()},
        "logps": logps,
        "loss": value.detach(),
        "dlogps": gradient,
        "metrics": metrics,
    }


def policy_case(seed, options):
    loss = NEMO.ClippedPGLossFn(NEMO.ClippedPGLossConfig(**options))
    return case_of(loss, options, *policy_data(seed))


DPO_PLANS = [
    {},
    {"preference_average_log_probs": True, "reference_policy_kl_penalty": 0.5},
    {"sft_loss_weight": 0.3, "preference_loss_weight": 0.7},
    {"sft_loss_weight": 0.3, "sft_average_log_probs": True},
]


def pair_case(seed, options):
    loss = NEMO.DPOLossFn(NEMO.DPOLossConfig(**options))
    return case_of(loss, options, *pair_data(seed))


def write(name, functions, cases):
    commit = parts.commit_of(FOLDER / "NeMo-RL")
    recording.write(f"nemo_rl_{name}.json", "nemo_rl", functions, cases, version=commit)


def main():
    cases = [policy_case(seed, options) for seed, options in enumerate(PLANS)]
    write("loss", [NEMO.ClippedPGLossFn.__call__, NEMO.calculate_kl], cases)
    cases = [pair_case(seed, options) for seed, options in enumerate(DPO_PLANS)]
    write("dpo", [NEMO.DPOLossFn.__call__], cases)


if __name__ == "__main__":
    main()
