"""Every formula once more, in plain torch: the oracle of the tests, and the path of other devices.

Written from the papers, not from the C++ code, to be read. Log-probabilities are in nats. Two rules
hold throughout (core/number.h):

  ties         minimum(a, b) and maximum(a, b) take a; clamp passes the gradient on [low, high]
  saturation   x enters exp clamped to +-60 (float64: +-600), and the derivative is the one there,
               not 0: a token that ran away is still pulled back, and nothing overflows

Arithmetic is in float32, in float64 for float64 log-probabilities or logits. Formulas of tokens,
pairs and groups are in the modules; here are the functions that run them.
"""

from tether.reference.advantages import (
    GROUP_RULES,
    RECURSIONS,
    advantage,
    discounted_returns,
    generalized_advantage_estimation,
    group_advantage,
)
from tether.reference.batch_weights import BATCH_WEIGHTS, batch_weights
from tether.reference.kl import k1, k2, k3, kl_report
from tether.reference.logps import categorical_kl, token_logps, token_statistics, top_k_kl
from tether.reference.mismatch import mismatch_report
from tether.reference.objectives import OBJECTIVES
from tether.reference.policy import local_counts, policy_loss, policy_token_losses
from tether.reference.preference import LINKS, PREFERENCES, preference_loss
from tether.reference.value import value_loss
from tether.reference.weights import WEIGHTS
from tether.reference.whitening import moments, whiten

__all__ = [
    "BATCH_WEIGHTS",
    "GROUP_RULES",
    "LINKS",
    "OBJECTIVES",
    "PREFERENCES",
    "RECURSIONS",
    "WEIGHTS",
    "advantage",
    "batch_weights",
    "categorical_kl",
    "discounted_returns",
    "generalized_advantage_estimation",
    "group_advantage",
    "k1",
    "k2",
    "k3",
    "kl_report",
    "local_counts",
    "mismatch_report",
    "moments",
    "policy_loss",
    "policy_token_losses",
    "preference_loss",
    "token_logps",
    "token_statistics",
    "top_k_kl",
    "value_loss",
    "whiten",
]
