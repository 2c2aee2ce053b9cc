"""Losses: how tether and its peers compute them from log-probabilities.

policy       PPO's clipped surrogate, its mean over tokens, and the fraction that is clipped
preference   DPO from the log-probabilities of the tokens of both answers

TRL's losses are inside of its trainers (bench/trl_step.py measures a step), Liger's begin at hidden
states (kind "linear").
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

import tether

# ---- methods: (logps, old_logps, advantages, mask) -> loss ---------------------------------------


def policy_eager(logps, old_logps, advantages, mask):
    logps, tokens = logps.float(), mask.sum()
    ratio = (logps - old_logps).exp()
    terms = ratio * advantages
    bounded = ratio.clamp(0.8, 1.2) * advantages
    with torch.no_grad():
        ((bounded < terms) * mask).sum() / tokens
    return -(torch.minimum(terms, bounded) * mask).sum() / tokens


def policy_verl():
    from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla
    from verl.workers.config import ActorConfig

    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1)

    def loss(logps, old_logps, advantages, mask):
        arguments = (old_logps, logps, advantages.expand(logps.shape), mask)
        return compute_policy_loss_vanilla(*arguments, "token-mean", config)[0]

    return loss


def policy_tether():
    return lambda logps, old_logps, advantages, mask: (
        tether.policy_loss(logps, advantages, mask, objective="ppo", old_logps=old_logps).loss
    )


POLICY_METHODS = {
    "eager": lambda: policy_eager,
    "torch.compile": lambda: torch.compile(policy_eager),
    "verl": policy_verl,
    "tether": policy_tether,
}


# ---- methods: (logps, ref_logps, mask) -> loss; chosen answers first, then the rejected ones -----


def preference_eager(logps, ref_logps, mask):
    scores = ((logps.float() - ref_logps) * mask).sum(-1)
    chosen, rejected = scores.chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


def preference_tether():
    return lambda logps, ref_logps, mask: tether.dpo_loss(logps, ref_logps, mask).loss


PREFERENCE_METHODS = {
    "eager": lambda: preference_eager,
    "torch.compile": lambda: torch.compile(preference_eager),
    "tether": preference_tether,
}


# ---- running -------------------------------------------------------------------------------------


def policy_inputs(shape, dtype):
    torch.manual_seed(1)
    logps = -torch.rand(shape)
    lengths = torch.randint(shape[1] // 2, shape[1] + 1, shape[:1])
    return {
        "logps": logps.to(dtype, copy=True).requires_grad_(),
        "others": logps + 0.1 * torch.randn(shape),  # of the old policy, or the reference
        "advantages": torch.randn(shape[0], 1),
        "mask": (torch.arange(shape[1]) < lengths[:, None]).float(),
    }


def run_policy(method, inputs, both):
    arguments = inputs["logps"], inputs["others"], inputs["advantages"], inputs["mask"]
    return _run(method, arguments, both)


def run_preference(method, inputs, both):
    return _run(method, (inputs["logps"], inputs["others"], inputs["mask"]), both)


def _run(method, arguments, both):
    if not both:
        with torch.no_grad():
            return method(*arguments)
    return torch.autograd.grad(method(*arguments), arguments[0])
