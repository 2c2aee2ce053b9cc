"""RLHF objectives and estimators: value, gradient and metrics in one pass.

    loss, metrics = tether.policy_loss(logps, advantages, response_mask, objective="dapo")
    loss.backward()

`tether.objectives()` lists the objectives; `tether.reference` states every formula in plain torch.
"""

from tether import reference
from tether._objectives import Choice, Objective, Option, objectives
from tether.policy import Normalizer, PolicyLoss, PolicyMetrics, local_counts, policy_loss
from tether.preference import PreferenceLoss, PreferenceMetrics, dpo_loss, preference_loss

__all__ = [
    "Choice",
    "Normalizer",
    "Objective",
    "Option",
    "PolicyLoss",
    "PolicyMetrics",
    "PreferenceLoss",
    "PreferenceMetrics",
    "dpo_loss",
    "local_counts",
    "objectives",
    "policy_loss",
    "preference_loss",
    "reference",
]
