"""RLHF objectives and estimators: value, gradient and metrics in one pass.

    loss, metrics = tether.policy_loss(logps, advantages, response_mask, objective="dapo")
    loss.backward()

`tether.objectives()` lists the objectives; `tether.reference` states every formula in plain torch.
"""

from tether import reference
from tether._objectives import Choice, Objective, Option, objectives
from tether.logits import (
    CategoricalKl,
    TokenLogps,
    categorical_kl,
    linear_token_logps,
    token_logps,
)
from tether.policy import Normalizer, PolicyLoss, PolicyMetrics, local_counts, policy_loss
from tether.preference import PreferenceLoss, PreferenceMetrics, dpo_loss, preference_loss

__all__ = [
    "CategoricalKl",
    "Choice",
    "Normalizer",
    "Objective",
    "Option",
    "PolicyLoss",
    "PolicyMetrics",
    "PreferenceLoss",
    "PreferenceMetrics",
    "TokenLogps",
    "categorical_kl",
    "dpo_loss",
    "linear_token_logps",
    "local_counts",
    "objectives",
    "policy_loss",
    "preference_loss",
    "reference",
    "token_logps",
]
