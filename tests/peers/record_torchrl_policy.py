"""Records torchrl's own GRPO and CISPO objectives on random ragged batches.

    build/peers/torchrl/bin/python tests/peers/record_torchrl_policy.py

writes tests/golden/peers/torchrl_policy.json. The parts of the losses that are of log-ratios and
advantages are called, and their aggregation, on an object that has what they read of a loss.
"""

import math
import types

import recording
import torch
from recording import policy_batch, with_gradient
from torchrl.objectives.llm import grpo

LOSSES = {"grpo": grpo.GRPOLoss, "cispo": grpo.CISPOLoss}
PLANS = [
    (loss, aggregation, bounds)
    for loss in LOSSES
    for aggregation in ("token_mean", "prompt_mean")
    for bounds in ((0.2, 0.2), (0.2, 0.28))
]


def loss_of(aggregation, bounds):
    low, high = (torch.tensor(each, dtype=torch.float64) for each in bounds)
    this = types.SimpleNamespace(
        aggregation=aggregation, reduction="mean", clip_epsilon_low=low, clip_epsilon_high=high
    )
    this._clip_bounds = grpo.GRPOLoss._clip_bounds.fget(this)
    this._loss_mask_keys = lambda: ()
    this._expand_loss_mask = grpo.GRPOLoss._expand_loss_mask
    this._reduce_loss = types.MethodType(grpo.GRPOLoss._reduce_loss, this)
    return this


def policy(batch, loss, aggregation, bounds):
    this = loss_of(aggregation, bounds)
    log_weight = (batch["logps"] - batch["old_logps"])[..., None]
    advantages = batch["advantages"][:, None, None].expand(log_weight.shape)
    terms, _ = LOSSES[loss]._compute_policy_objective(this, log_weight, advantages)
    mask = batch["response_mask"] > 0
    return grpo.GRPOLoss._aggregate_loss_value(this, terms, mask).sum()


def case_of(seed, *plan):
    batch = policy_batch(seed)
    out = with_gradient(batch, "logps", lambda live: policy(live, *plan))
    assert math.isfinite(out["loss"])
    loss, aggregation, bounds = plan
    settings = {"loss": loss, "aggregation": aggregation, "clip_epsilon": bounds}
    return {"name": f"{loss}, {aggregation}, {bounds}", "settings": settings} | batch | out


def main():
    cases = [case_of(seed, *plan) for seed, plan in enumerate(PLANS)]
    functions = [each._compute_policy_objective for each in LOSSES.values()]
    functions += [grpo.GRPOLoss._aggregate_loss_value]
    recording.write("torchrl_policy.json", "torchrl", functions, cases)


if __name__ == "__main__":
    main()
