"""RLHF objectives and estimators: value, gradient and metrics in one pass.

    loss, metrics = tether.policy_loss(logps, advantages, response_mask, objective="dapo")
    loss.backward()

`tether.objectives()` lists the objectives; `tether.reference` states every formula in plain torch.
"""

from tether import reference
from tether.policy import (
    Normalizer,
    Objective,
    Option,
    PolicyLoss,
    PolicyMetrics,
    local_counts,
    objectives,
    policy_loss,
)

__all__ = [
    "Normalizer",
    "Objective",
    "Option",
    "PolicyLoss",
    "PolicyMetrics",
    "local_counts",
    "objectives",
    "policy_loss",
    "reference",
]
