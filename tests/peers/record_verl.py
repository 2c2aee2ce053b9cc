"""Records verl's own losses, KL penalties and advantages on random ragged batches.

    pip install -r tests/peers/requirements-verl.txt      in an environment of its own
    python tests/peers/record_verl.py                     writes tests/golden/peers/verl_*.json

`verl.trainer.ppo.core_algos` is imported whole, nothing is stubbed.

Losses get an integer mask, as from verl's trainer; tokens + 1e-8, in "seq-mean-token-mean", is then
a float32, and the 1e-8 is lost in it. GAE and whitening get a float64 mask: with integers verl
rounds n / (n - 1) to float32.
"""

import numpy as np
import recording
import torch
from recording import grid, normal, ragged_mask
from verl.trainer.ppo import core_algos, rollout_corr_helper
from verl.utils import torch_functional
from verl.workers.config import ActorConfig, PolicyLossConfig

# ---- policy losses -------------------------------------------------------------------------------

LOSSES = {
    "vanilla": core_algos.compute_policy_loss_vanilla,
    "gspo": core_algos.compute_policy_loss_gspo,
    "cispo": core_algos.compute_policy_loss_cispo,
    "reinforce": core_algos.compute_policy_loss_reinforce,
    "dppo_tv": core_algos.compute_policy_loss_dppo_tv,
    "dppo_kl": core_algos.compute_policy_loss_dppo_kl,
    "sapo": core_algos.compute_policy_loss_sapo,
    "gpg": core_algos.compute_policy_loss_gpg,
    "dro": core_algos.compute_policy_loss_dro,
    "geo_mean": core_algos.compute_policy_loss_geo_mean,
    "clip_cov": core_algos.compute_policy_loss_clip_cov,
    "kl_cov": core_algos.compute_policy_loss_kl_cov,
}
MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
)
CLIPS = {
    "vanilla": {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 1.5},
    "gspo": {"clip_ratio_low": 0.1, "clip_ratio_high": 0.15},
    "cispo": {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28},
    "reinforce": {},
}
# Losses of which one mode is enough, with settings of verl's actor: sapo and geo_mean have theirs.
FURTHER = {
    "sapo": {"tau_pos": 1.25, "tau_neg": 1.75},
    "gpg": {},
    "dro": {"dro_beta": 0.25},
    "geo_mean": {"clip_ratio_low": 0.3, "clip_ratio_high": 0.4},
}
# Of the covariance of the batch. clip_cov picks at random: here more than there are.
COVARIANCES = {
    "clip_cov": (
        {"clip_ratio_low": 0.3, "clip_ratio_high": 0.4},
        {"clip_cov_ratio": 0.9, "clip_cov_lb": 0.125, "clip_cov_ub": 1.5},
    ),
    "kl_cov": ({}, {"kl_cov_ratio": 0.25, "ppo_kl_coef": 0.375}),
}
# The denominators of a step over two ranks, of which the batch is a part.
STEP = {"dp_size": 2, "batch_num_tokens": 61, "global_batch_size": 9, "loss_scale_factor": 12}


def policy_batch(seed, *, per_token, rows=4, columns=7):
    generator = torch.Generator().manual_seed(seed)
    log_prob = -normal(generator, rows, columns).abs() - 0.25
    return {
        "log_prob": log_prob,
        "old_log_prob": log_prob - grid(0.5 * normal(generator, rows, columns)),
        "advantages": normal(generator, rows, columns if per_token else 1).expand(rows, columns),
        "response_mask": ragged_mask(generator, rows, columns, empty_row=True),
    }


def policy_loss(name, batch, mode, clips, step, weights=None):
    required = {"strategy": "fsdp", "rollout_n": 1, "ppo_micro_batch_size_per_gpu": 1}
    own = {key: value for key, value in clips.items() if key != "dro_beta"}
    of_loss = PolicyLossConfig(dro_beta=clips.get("dro_beta"))
    config = ActorConfig(**required, **own, policy_loss=of_loss, global_batch_info=step)
    log_prob = batch["log_prob"].clone().requires_grad_()
    loss, _ = LOSSES[name](
        batch["old_log_prob"],
        log_prob,
        batch["advantages"],
        batch["response_mask"],
        mode,
        config,
        weights,
    )
    return loss, *torch.autograd.grad(loss, log_prob)


def policy_case(seed, name, mode, step, per_token):
    clips = (CLIPS | FURTHER)[name]
    batch = policy_batch(seed, per_token=per_token)
    loss, gradient = policy_loss(name, batch, mode, clips, step)
    words = [name, mode, *(["of a step"] if step else []), *(["per token"] if per_token else [])]
    settings = {"loss": name, "loss_agg_mode": mode, "clips": clips, "step": step}
    case = {"name": ", ".join(words), "settings": settings}
    return case | batch | {"loss": loss, "dlog_prob": gradient}


def covariance_case(seed, name):
    """What the loss and its gradient are, and, of ones, at which tokens."""
    clips, of_loss = COVARIANCES[name]
    batch = policy_batch(seed, per_token=True)
    required = {"strategy": "fsdp", "rollout_n": 1, "ppo_micro_batch_size_per_gpu": 1}
    policy = PolicyLossConfig(**of_loss)
    config = ActorConfig(**required, **clips, policy_loss=policy, global_batch_info={})
    log_prob = batch["log_prob"].clone().requires_grad_()
    arrays = (batch["advantages"], batch["response_mask"], "token-mean", config)
    loss, _ = LOSSES[name](batch["old_log_prob"], log_prob, *arrays, None)
    (gradient,) = torch.autograd.grad(loss, log_prob)
    settings = {"loss": name, "clips": clips, "of_loss": of_loss}
    case = {"name": f"{name}, seed {seed}", "settings": settings}
    return case | batch | {"loss": loss, "dlog_prob": gradient}


def mismatch_case(seed):
    """verl's metrics; it takes the mean over rows, so that every row has a token here."""
    batch = policy_batch(300 + seed, per_token=True)
    mask = batch["response_mask"]
    mask[:, 0] = 1
    generator = torch.Generator().manual_seed(seed)
    rollout = batch["old_log_prob"] + grid(0.3 * normal(generator, *mask.shape))
    arrays = {"old_log_prob": batch["old_log_prob"], "rollout_log_prob": rollout}
    metrics = rollout_corr_helper.compute_offpolicy_metrics(*arrays.values(), mask.double())
    return {"name": f"seed {seed}", **arrays, "response_mask": mask, "metrics": metrics}


def beyond_the_clamp():
    """Log-ratios on both sides of +-20, where verl clamps them and the gradient ends."""
    log_ratio = torch.tensor([[-24.0, -19.5, 0.0, 19.5, 24.0]], dtype=torch.float64)
    batch = {
        "log_prob": log_ratio - 30,
        "old_log_prob": torch.full_like(log_ratio, -30),
        "advantages": torch.tensor([[1.5, 1.5, 0.5, -0.75, -0.75]], dtype=torch.float64),
        "response_mask": torch.ones_like(log_ratio).long(),
    }
    clips = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "clip_ratio_c": 1e30}
    loss, gradient = policy_loss("vanilla", batch, "token-sum", clips, {})
    settings = {"loss": "vanilla", "loss_agg_mode": "token-sum", "clips": clips, "step": {}}
    case = {"name": "vanilla, beyond the clamp", "settings": settings}
    return case | batch | {"loss": loss, "dlog_prob": gradient}


def policy_cases():
    plans = [
        (name, mode, step, bool(step) == (name == "gspo"))  # advantages per token in half of them
        for name in CLIPS
        for mode in MODES
        for step in ({}, STEP)
    ]
    further = [
        (name, "token-mean", step, not step and name != "geo_mean")
        for name in FURTHER
        for step in ({}, STEP)
    ]
    cases = [policy_case(seed, *plan) for seed, plan in enumerate(plans)]
    return [
        *cases,
        beyond_the_clamp(),
        *(policy_case(100 + seed, *plan) for seed, plan in enumerate(further)),
    ]


# ---- importance weights of the rollout policy, and what a loss does with them --------------------

ROLLOUT_IS = {  # rollout_is, its threshold
    "token, truncated": ("token", 1.25),
    "sequence, truncated": ("sequence", 1.5),
    "token, IcePop": ("token", "0.75_1.25"),
    "sequence, IcePop": ("sequence", "0.5_2.0"),
}


def weighted_case(seed, name, what):
    rollout_is, threshold = ROLLOUT_IS[what]
    batch = policy_batch(seed, per_token=True)
    generator = torch.Generator().manual_seed(1000 + seed)
    mask = batch["response_mask"]
    gap = grid(0.3 * normal(generator, *mask.shape))
    batch["rollout_log_prob"] = batch["old_log_prob"] - gap
    weights, _ = rollout_corr_helper.compute_rollout_correction_weights(
        gap, mask, rollout_is=rollout_is, rollout_is_threshold=threshold
    )
    loss, gradient = policy_loss(name, batch, "token-mean", CLIPS[name], {}, weights)
    settings = {"loss": name, "loss_agg_mode": "token-mean", "clips": CLIPS[name], "step": {}}
    settings |= {"rollout_is": rollout_is, "threshold": threshold}
    case = {"name": f"{name}, {what}", "settings": settings}
    return case | batch | {"loss": loss, "dlog_prob": gradient}


REJECTION = {  # rollout_rs, its bounds, of e^-x
    "token": ("token_k1", "0.8_1.25"),
    "sum": ("seq_sum_k1", "0.5_2.0"),
    "mean": ("seq_mean_k1", "0.9_1.1"),
    "k2": ("token_k2", "0.05"),
    "k3": ("token_k3", "0.03"),
    "sum of k2": ("seq_sum_k2", "0.15"),
    "mean of k3": ("seq_mean_k3", "0.03"),
    "largest k3": ("seq_max_k3", "0.15"),
}


def rejection_case(seed, what):
    rollout_rs, threshold = REJECTION[what]
    batch = policy_batch(seed, per_token=True)
    gap = grid(0.3 * normal(torch.Generator().manual_seed(2000 + seed), *batch["log_prob"].shape))
    batch["rollout_log_prob"] = batch["old_log_prob"] - gap
    kept, _ = rollout_corr_helper.compute_rollout_rejection_mask(
        gap, batch["response_mask"], rollout_rs=rollout_rs, rollout_rs_threshold=threshold
    )
    part = batch | {"response_mask": kept.long()}
    loss, gradient = policy_loss("vanilla", part, "token-mean", CLIPS["vanilla"], {})
    settings = {"loss": "vanilla", "loss_agg_mode": "token-mean", "clips": CLIPS["vanilla"]}
    settings |= {"step": {}, "rollout_rs": rollout_rs, "threshold": threshold}
    case = {"name": f"vanilla, rejection by {what}", "settings": settings}
    return case | batch | {"kept": kept.long(), "loss": loss, "dlog_prob": gradient}


def trust_region_case(seed, name):
    clips = {"clip_ratio_low": 0.0625, "clip_ratio_high": 0.125, "clip_ratio_c": 1.25}
    batch = policy_batch(seed, per_token=True)
    loss, gradient = policy_loss(name, batch, "token-mean", clips, {})
    settings = {"loss": name, "loss_agg_mode": "token-mean", "clips": clips, "step": {}}
    case = {"name": f"{name} {seed}", "settings": settings}
    return case | batch | {"loss": loss, "dlog_prob": gradient}


def weighted_cases():
    plans = [(name, what) for name in ("vanilla", "gspo") for what in ROLLOUT_IS]
    weighted = [weighted_case(seed, *plan) for seed, plan in enumerate(plans)]
    rejected = [rejection_case(seed, what) for seed, what in enumerate(REJECTION)]
    names = ("dppo_tv", "dppo_kl")
    return weighted + rejected + [trust_region_case(k, name) for name in names for k in range(3)]


# ---- the loss of a value head --------------------------------------------------------------------


def value_case(seed, mode, cliprange, step):
    generator = torch.Generator().manual_seed(seed)
    shape = (4, 6)
    batch = {
        "values": normal(generator, *shape),
        "returns": normal(generator, *shape),
        "vpreds": normal(generator, *shape),
        "response_mask": ragged_mask(generator, *shape, empty_row=True),
    }
    vpreds = batch["vpreds"].clone().requires_grad_()
    loss, clipped = core_algos.compute_value_loss(
        vpreds=vpreds,
        returns=batch["returns"],
        values=batch["values"],
        response_mask=batch["response_mask"],
        cliprange_value=cliprange,
        loss_agg_mode=mode,
        **step,
    )
    (gradient,) = torch.autograd.grad(loss, vpreds)
    settings = {"loss_agg_mode": mode, "cliprange_value": cliprange, "step": step}
    case = {"name": f"{mode}, {cliprange}", "settings": settings} | batch
    return case | {"loss": loss, "dvpreds": gradient, "clipfrac": clipped}


def value_cases():
    plans = [("token-mean", 0.5, {}), ("token-mean", 0.2, STEP), ("seq-mean-token-sum", 0.5, STEP),
             ("seq-mean-token-sum-norm", 0.3, {})]  # fmt: skip
    return [value_case(seed, *plan) for seed, plan in enumerate(plans)]


# ---- KL penalties --------------------------------------------------------------------------------

KINDS = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3")


def kl_case(name, logprob, ref_logprob, upstream):
    batch = {"logprob": logprob, "ref_logprob": ref_logprob, "upstream": upstream}
    kinds = {}
    for kind in [*KINDS, *(f"{each}+" for each in KINDS)]:
        leaf = logprob.clone().requires_grad_()
        value = core_algos.kl_penalty(leaf, ref_logprob, kind)
        (gradient,) = torch.autograd.grad(value, leaf, upstream)
        kinds[kind] = {"value": value.tolist(), "dlogprob": gradient.tolist()}
    return {"name": name} | batch | {"kinds": kinds}


def kl_cases():
    generator = torch.Generator().manual_seed(0)
    logprob = -normal(generator, 24).abs() - 0.25
    near = logprob + grid(0.5 * normal(generator, 24))
    far = torch.tensor([-24.0, -20.5, -19.5, -3.0, 2.25, 2.625, 19.5, 24.0], dtype=torch.float64)
    return [
        kl_case("inside verl's clamps", logprob, near, normal(generator, 24)),
        kl_case("beyond them", -30 - far, torch.full_like(far, -30), normal(generator, 8)),
    ]


# ---- advantages ----------------------------------------------------------------------------------


def gae_case(seed, gamma, lam, empty_row):
    generator = torch.Generator().manual_seed(seed)
    shape = (4, 8)
    batch = {
        "rewards": normal(generator, *shape),
        "values": normal(generator, *shape),
        "response_mask": ragged_mask(generator, *shape, empty_row).double(),
    }
    advantages, returns = core_algos.compute_gae_advantage_return(*batch.values(), gamma, lam)
    case = {"estimator": "gae", "gamma": gamma, "lam": lam} | batch
    return case | {"advantages": advantages, "returns": returns}


def whiten_case(seed, shift_mean):
    generator = torch.Generator().manual_seed(seed)
    values = 3 + 2 * normal(generator, 4, 6)
    mask = ragged_mask(generator, 4, 6, empty_row=True).double()
    whitened = torch_functional.masked_whiten(values, mask, shift_mean)
    case = {"estimator": "masked_whiten", "shift_mean": shift_mean, "values": values}
    return case | {"response_mask": mask, "whitened": whitened}


GROUPED = {
    "grpo": core_algos.compute_grpo_outcome_advantage,
    "rloo": core_algos.compute_rloo_outcome_advantage,
    "rloo_vectorized": core_algos.compute_rloo_vectorized_outcome_advantage,
    "opo": core_algos.compute_opo_outcome_advantage,
}


def grouped_case(name, columns=2, **options):
    """Ragged groups that interleave; one of equal rewards, one of a single answer (id 5). The
    answers have 1 to `columns` tokens."""
    generator = torch.Generator().manual_seed(7)
    ids = np.array([0, 1, 0, 2, 5, 1, 0, 2, 1, 0, 2])
    rewards = normal(generator, len(ids))
    rewards[ids == 2] = 0.75
    token_level = torch.zeros(len(ids), columns, dtype=torch.float64)
    token_level[:, -1] = rewards
    lengths = torch.full((len(ids),), columns)
    lengths[-1] = 1
    if columns > 2:
        lengths = torch.randint(1, columns + 1, (len(ids),), generator=generator)
    mask = (torch.arange(columns) < lengths[:, None]).long()
    advantages, _ = GROUPED[name](token_level, mask, ids, **options)
    case = {"estimator": name, "options": options, "rewards": rewards, "ids": ids.tolist()}
    return case | {"response_mask": mask, "advantages": advantages}


def advantage_cases():
    return [
        gae_case(0, 1.0, 1.0, False),
        gae_case(1, 0.99, 0.95, True),
        gae_case(2, 0.9, 0.0, True),
        whiten_case(0, True),
        whiten_case(1, False),
        grouped_case("grpo", norm_adv_by_std_in_grpo=True),
        grouped_case("grpo", norm_adv_by_std_in_grpo=True, epsilon=0.5),
        grouped_case("grpo", norm_adv_by_std_in_grpo=False),
        grouped_case("rloo"),
        grouped_case("rloo_vectorized"),
        grouped_case("opo", columns=6),
    ]


def main():
    def write(name, functions, cases):
        recording.write(name, "verl", functions, cases)

    losses = [LOSSES[name] for name in CLIPS | FURTHER]
    write("verl_policy.json", losses, policy_cases())
    correction = [
        rollout_corr_helper.compute_rollout_correction_weights,
        rollout_corr_helper.compute_rollout_rejection_mask,
    ]
    losses = [loss for name, loss in LOSSES.items() if name not in COVARIANCES]
    write("verl_weights.json", [*losses, *correction], weighted_cases())
    cases = [covariance_case(seed, name) for name in COVARIANCES for seed in range(200, 204)]
    cases_of_mismatch = [mismatch_case(seed) for seed in range(3)]
    metrics = [rollout_corr_helper.compute_offpolicy_metrics]
    write("verl_mismatch.json", metrics, cases_of_mismatch)
    write("verl_covariance.json", [LOSSES[name] for name in COVARIANCES], cases)
    write("verl_value.json", [core_algos.compute_value_loss], value_cases())
    write("verl_kl.json", [core_algos.kl_penalty], kl_cases())
    advantages = [core_algos.compute_gae_advantage_return, torch_functional.masked_whiten]
    write("verl_advantages.json", [*advantages, *GROUPED.values()], advantage_cases())


if __name__ == "__main__":
    main()
