"""Batches and configurations as verl's engine hands them to a policy loss."""

import numpy as np
import torch
from verl.trainer.ppo import core_algos
from verl.workers.config import ActorConfig, PolicyLossConfig

MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
)
# The denominators of a step over two ranks, of which the batch is a part.
STEP = {"dp_size": 2, "batch_num_tokens": 61, "global_batch_size": 9, "loss_scale_factor": 12}
OF_LOSS = {
    "clip_cov_ratio": 0.125,
    "clip_cov_lb": 0.125,
    "clip_cov_ub": 1.5,
    "kl_cov_ratio": 0.25,
    "ppo_kl_coef": 0.375,
    "dro_beta": 0.25,
}
CLIPS = {"clip_ratio_low": 0.15, "clip_ratio_high": 0.28, "clip_ratio_c": 1.5}


def actor_config(step=None, of_loss=OF_LOSS, **settings):
    settings = {**CLIPS, "tau_pos": 1.25, "tau_neg": 1.75, **settings}
    return ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=PolicyLossConfig(**of_loss),
        global_batch_info=dict(step or {}),
        **settings,
    )


def policy_batch(seed, *, weighted=False, dtype=torch.float64, spread=0.5):
    """Six answers of up to nine tokens: one empty, one with a gap, one of advantage 0."""
    generator = torch.Generator().manual_seed(seed)

    def normal():
        return torch.randn(6, 9, generator=generator, dtype=torch.float64)

    mask = torch.arange(9) < torch.tensor([9, 4, 0, 7, 1, 6])[:, None]
    mask[3, 2:4] = False
    advantages = torch.randn(6, 1, generator=generator, dtype=torch.float64).expand(6, 9).clone()
    advantages[5] = 0
    log_prob = -normal().abs() - 0.25
    weights = 2 * torch.rand(6, 9, generator=generator, dtype=torch.float64)
    weights[0, 1] = 0
    batch = {
        "old_log_prob": log_prob - spread * normal(),
        "log_prob": log_prob,
        "advantages": advantages * mask,
        "rollout_is_weights": weights if weighted else None,
    }
    batch = {name: None if each is None else each.to(dtype) for name, each in batch.items()}
    return batch | {"response_mask": mask}


def grouped_batch(dtype, alone=True):
    """Ragged groups of string ids that interleave, one of a single answer unless said."""
    ids = np.array([f"{k}f3-{k}" for k in (0, 1, 0, 2, 5, 1, 0, 2, 1, 0, 2)], dtype=object)
    generator = torch.Generator().manual_seed(7)
    rewards = torch.randn(len(ids), 6, generator=generator, dtype=torch.float64).to(dtype)
    mask = (torch.arange(6) < torch.randint(1, 7, (len(ids), 1), generator=generator)).long()
    kept = np.arange(len(ids)) != (-1 if alone else 4)
    arrays = {"token_level_rewards": rewards, "response_mask": mask, "index": ids}
    return {name: each[kept] for name, each in arrays.items()}


TOLERANCES = {torch.float64: (1e-12, 1e-14), torch.float32: (2e-6, 1e-6)}


def assert_near(ours, own, dtype):
    rtol, atol = TOLERANCES[dtype]
    for mine, theirs in zip(ours, own, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol)


def outcome(loss_mode, batch, mode, config):
    """Value, gradient and metrics, as the engine calls a loss."""
    torch.manual_seed(0)  # clip_cov draws
    log_prob = batch["log_prob"].clone().requires_grad_()
    loss, metrics = core_algos.get_policy_loss_fn(loss_mode)(
        **batch | {"log_prob": log_prob}, loss_agg_mode=mode, config=config
    )
    (gradient,) = torch.autograd.grad(loss, log_prob)
    return loss.detach(), gradient, metrics
