"""Records the losses of Trinity-RFT, AReaL and SkyRL on random ragged batches.

    build/peers/parts/bin/python tests/peers/record_trainers.py

writes tests/golden/peers/{trinity,areal,skyrl}_policy.json, areal_m2po.json and
skyrl_advantages.json. Their modules of losses are loaded alone (parts.py). SkyRL's ratios and
means, and AReaL's ratios of its gates, are float32.
"""

import sys
import types

import parts
import recording
import torch
from recording import by_token, policy_batch, with_gradient


def case_of(seed, name, settings, evaluate, per_token=False):
    batch = policy_batch(seed, per_token=per_token)
    out = with_gradient(batch, "logps", evaluate)
    return {"name": name, "settings": settings} | batch | out


# ---- Trinity-RFT ---------------------------------------------------------------------------------

FOLDER = "trinity.algorithm.policy_loss_fn"
TRINITY = {
    "rec": ("rec_policy_loss", "RECPolicyLossFn"),
    "topr": ("topr_policy_loss", "TOPRPolicyLossFn"),
    "opmd": ("opmd_policy_loss", "OPMDPolicyLossFn"),
    "phi": ("chord_policy_loss", "SFTPhiLossFn"),
    "cispo": ("cispo_policy_loss", "CISPOPolicyLossFn"),
    "gspo": ("gspo_policy_loss", "GSPOLossFn"),
    "ppo": ("ppo_policy_loss", "PPOPolicyLossFn"),
}
TRINITY = {
    name: getattr(parts.load(f"{FOLDER}.{module}"), function)
    for name, (module, function) in TRINITY.items()
}
REC = {"epsilon_low": 0.2, "epsilon_high": 0.3, "epsilon_low_prime": 0.45,
       "epsilon_high_prime": 0.55}  # fmt: skip
SEQUENCES = {"loss_agg_mode": "seq-mean-token-mean"}
TRINITY_PLANS = [
    *(("rec", REC | {"clip_mode": mode, "weight": weight})
      for mode in ("none", "one-side", "two-side")
      for weight in ("none", "importance_sampling")),
    ("rec", REC | {"clip_mode": "two-side", "regularizer": "k2", "regularizer_coef": 0.3}),
    ("rec", REC | {"clip_mode": "none", "regularizer": "k2", "regularizer_coef": 0.3}),
    ("topr", {}),
    ("topr", SEQUENCES),
    ("opmd", {"tau": 0.5}),
    ("phi", {}),
    ("phi", SEQUENCES),
    ("cispo", {}),
    ("cispo", {"clip_range_low": 0.3, "enable_mask_clip": True, "mask_clip_range_low": 0.2,
               "mask_clip_range_high": 0.25}),
    ("gspo", {"clip_range_low": 0.05, "clip_range_high": 0.1}),
    ("ppo", {"clip_range_low": 0.2, "clip_range_high": 0.28, "clip_ratio_c": 1.5}),
]  # fmt: skip
TRINITY_PLANS = dict(enumerate(TRINITY_PLANS)) | {  # seeds where bounds matter
    63: ("ppo", {"clip_range": 0.2, "enable_sequence_masking": True,
                 "delta_sequence_masking": 0.05}),
    30: ("rec", REC | {"clip_mode": "gspo-one-side", "epsilon_low": 0.05, "epsilon_high": 0.05}),
    46: ("rec", REC | {"clip_mode": "ring", "weight": "none"}),
    80: ("rec", REC | {"clip_mode": "ring", "weight": "importance_sampling"}),
}  # fmt: skip


def trinity(batch, name, options):
    arrays = {
        "old_logprob": batch["old_logps"],
        "action_mask": batch["response_mask"],
        "advantages": by_token(batch["advantages"], batch["logps"]),
    }
    function = TRINITY[name](backend="verl", **options)
    words = {function.mapper.from_trinity(key): value for key, value in arrays.items()}
    return function(batch["logps"], **words)[0]


def trinity_case(seed, name, options):
    words = [f"{key} {value}" for key, value in options.items() if key not in REC]
    settings = {"loss": name, "options": options}
    return case_of(
        seed, ", ".join([name, *words]), settings, lambda live: trinity(live, name, options)
    )


# ---- AReaL ---------------------------------------------------------------------------------------

LOSSES = parts.load(
    "areal.utils.functional.functional",
    absent=("areal.api", "areal.infra", "einops", "numba", "torchdata"),
)
ACTOR = parts.load(
    "areal.trainer.ppo.actor", absent=("areal.experimental", "areal.utils.perf_tracer")
)


def gate(**options):
    defaults = {"level": "token", "action": "mask", "metric": "ratio", "agg": "mean", "lower": None}
    return types.SimpleNamespace(**defaults | options)


CLIPS = {"eps_clip": 0.2, "eps_clip_higher": 0.28}
BOTH = {"lower": 0.75, "upper": 1.25}
NEAR = {"lower": 0.9, "upper": 1.1}
AREAL_PLANS = [
    ("ppo", CLIPS, None),
    ("dual clip", CLIPS | {"c_clip": 1.5}, None),
    ("sequence", CLIPS | {"eps_clip": 0.1, "importance_sampling_level": "sequence"}, None),
    ("truncated", CLIPS, {"action": "clamp", "upper": 1.25}),
    ("truncated on both sides", CLIPS, {"action": "clamp", **BOTH}),
    ("masked", CLIPS | {"c_clip": 1.5}, BOTH),
    ("sequences truncated", CLIPS, {"level": "sequence", "action": "clamp", **NEAR}),
    ("sequences masked", CLIPS, {"level": "sequence", **NEAR}),
    ("sequences masked by their product", CLIPS, {"level": "sequence", "agg": "sum", **BOTH}),
    ("k2", CLIPS, {"metric": "kl_k2", "upper": 0.04}),
    ("k3 of sequences", CLIPS, {"metric": "kl_k3", "level": "sequence", "upper": 0.028}),
    ("largest k3", CLIPS, {"metric": "kl_k3", "level": "sequence", "agg": "max", "upper": 0.055}),
]


def areal(batch, options, gate_of, mask):
    advantages = by_token(batch["advantages"], batch["logps"])
    arrays = (batch["logps"], batch["old_logps"], batch["rollout_logps"], advantages)
    rejection = None if gate_of is None else gate(**gate_of)
    options = {"loss_mask": mask, "rejection_sampling": rejection, **options}
    return LOSSES.ppo_actor_loss_fn(*arrays, **options)[0]


def areal_case(seed, name, options, gate_of):
    settings = {"options": options, "gate": None if gate_of is None else vars(gate(**gate_of))}

    def evaluate(live):
        return areal(live, options, gate_of, live["response_mask"] > 0)

    return case_of(seed, name, settings, evaluate, per_token=gate_of is not None)


def m2po_case(seed, threshold):
    """The tokens that are kept, and the loss of these; the behaviour is the engine's."""
    batch = policy_batch(seed)
    kept = ACTOR._apply_m2po_masking(
        batch["rollout_logps"], batch["old_logps"], batch["response_mask"] > 0, threshold
    )
    out = with_gradient(batch, "logps", lambda live: areal(live, CLIPS, None, kept))
    settings = {"options": CLIPS, "threshold": threshold}
    case = {"name": f"threshold {threshold:g}", "settings": settings}
    return case | batch | {"kept": kept.long()} | out


# ---- SkyRL ---------------------------------------------------------------------------------------

SKYRL = parts.load(
    "skyrl.backends.skyrl_train.utils.ppo_utils",
    absent=("loguru", "omegaconf", "ray", "skyrl.train"),
)
CORRECTION = dict.fromkeys(
    ("tis_ratio_type", "sequence_mask_metric", "outlier_token_is_threshold_low",
     "outlier_token_is_threshold_high", "token_mask_is_threshold_low",
     "token_mask_is_threshold_high")
)  # fmt: skip
CORRECTIONS = {
    "tis": {"tis_ratio_type": "token", "token_tis_ratio_clip_high": 1.2},
    "tis of sequences": {"tis_ratio_type": "sequence", "sequence_tis_ratio_clip_high": 1.2},
    "low outliers": {"outlier_token_is_threshold_low": 0.7},
    "high outliers": {"outlier_token_is_threshold_high": 1.4},
    "tokens": {"token_mask_is_threshold_low": 0.75, "token_mask_is_threshold_high": 1.25},
    "geometric": {"sequence_mask_metric": "geometric", "geo_mask_low": 0.9, "geo_mask_high": 1.1},
    "product": {"sequence_mask_metric": "product", "product_mask_low": 0.7,
                "product_mask_high": 1.4, "tis_ratio_type": "token",
                "token_tis_ratio_clip_high": 1.3},
}  # fmt: skip
SKYRL_LOSSES = {
    "regular": SKYRL.ppo_policy_loss,
    "dual_clip": SKYRL.ppo_policy_loss,
    "sapo": SKYRL.sapo_policy_loss,
    "gspo": SKYRL.gspo_policy_loss,
    "cispo": SKYRL.compute_policy_loss_cispo,
    "rollout_is": SKYRL.rollout_is_policy_loss,
    "dppo": SKYRL.dppo_policy_loss,
    "importance_sampling": SKYRL.importance_sampling_loss,
    "cross_entropy": SKYRL.cross_entropy_loss,
}
BOUNDS = {"eps_clip_low": 0.2, "eps_clip_high": 0.28, "clip_ratio_c": 1.5}
OF_LOSS = {
    "gspo": {"eps_clip_low": 0.05, "eps_clip_high": 0.1},
    "cispo": {"cispo": {"cispo_eps_clip_low": 0.2, "cispo_eps_clip_high": 0.3}},
    "sapo": {"sapo": {"tau_pos": 1.5, "tau_neg": 2.0}},
}
DIVERGENCES = {31: ("binary_tv", 0.1, 0.05), 115: ("binary_kl", 0.03, 0.02)}


def namespace(options):
    nested = {key: namespace(each) if isinstance(each, dict) else each
              for key, each in options.items()}  # fmt: skip
    return types.SimpleNamespace(**nested)


def skyrl_case(seed, loss, changes, correction=None):
    options = BOUNDS | OF_LOSS.get(loss, {}) | changes
    of_correction = CORRECTIONS.get(correction, {})
    config = namespace(
        options
        | {"policy_loss_type": loss, "loss_reduction": "sequence_mean"}
        | {"off_policy_correction": CORRECTION | of_correction}
    )

    def evaluate(live):
        advantages = by_token(live["advantages"], live["logps"])
        arrays = (live["logps"], live["old_logps"], advantages, config, live["response_mask"])
        return SKYRL_LOSSES[loss](*arrays, live["rollout_logps"])[0]

    settings = {"loss": loss, "options": options, "correction": of_correction}
    words = [loss, *changes.get("dppo", {}).values(), *([correction] if correction else [])]
    name = ", ".join(map(str, words))
    return case_of(seed, name, settings, evaluate, per_token=loss != "gspo" and seed % 2 == 0)


def skyrl_cases():
    plans = [(loss, {}) for loss in SKYRL_LOSSES if loss != "dppo"]
    names = ("dppo_type", "delta_low", "delta_high")
    plans += [("regular", {}, correction) for correction in CORRECTIONS]
    cases = [skyrl_case(seed, *plan) for seed, plan in enumerate(plans)]
    for seed, each in DIVERGENCES.items():
        cases.append(skyrl_case(seed, "dppo", {"dppo": dict(zip(names, each, strict=True))}))
    return cases


def maxrl_case(seed, successes, shift=0.0):
    """Rewards at the last slot, of 0 and 1 or of any size; SkyRL's means are float32."""
    generator = torch.Generator().manual_seed(seed)
    ids = [0, 1, 0, 2, 5, 1, 0, 2, 1, 0, 2]
    rewards = recording.normal(generator, len(ids)).abs() + 0.25
    if successes:
        rewards = (rewards > 0.75).double()
        rewards[torch.tensor(ids) == 1] = 0
    rewards = rewards + shift
    mask = recording.ragged_mask(generator, len(ids), 4, empty_row=False)
    arrays = {"token_level_rewards": torch.nn.functional.pad(rewards[:, None], (3, 0))}
    advantages, _ = SKYRL.compute_maxrl_advantage(**arrays, response_mask=mask, index=ids)
    case = {"name": f"maxrl {seed}", "rewards": rewards, "ids": ids, "response_mask": mask}
    return case | {"advantages": advantages}


def main():
    cases = [trinity_case(seed, *plan) for seed, plan in TRINITY_PLANS.items()]
    functions = [*TRINITY.values(), sys.modules["trinity.algorithm.utils"].aggregate_loss]
    recording.write("trinity_policy.json", "trinity-rft", functions, cases)
    cases = [areal_case(seed, *plan) for seed, plan in enumerate(AREAL_PLANS)]
    functions = [LOSSES.ppo_actor_loss_fn, LOSSES.KLEstimator]
    recording.write("areal_policy.json", "areal", functions, cases)
    thresholds = (0.04, 0.01, 0.002, 1e-9, 1.0)
    cases = [m2po_case(seed, threshold) for seed, threshold in enumerate(thresholds)]
    functions = [ACTOR._apply_m2po_masking, LOSSES.ppo_actor_loss_fn]
    recording.write("areal_m2po.json", "areal", functions, cases)
    functions = [
        *dict.fromkeys(SKYRL_LOSSES.values()),
        SKYRL.apply_off_policy_correction,
        SKYRL.masked_mean,
    ]
    recording.write("skyrl_policy.json", "skyrl", functions, skyrl_cases())
    cases = [maxrl_case(seed, successes=seed == 0, shift=-4.0 * (seed == 2)) for seed in range(3)]
    recording.write("skyrl_advantages.json", "skyrl", [SKYRL.compute_maxrl_advantage], cases)


if __name__ == "__main__":
    main()
