"""RLHF objectives and estimators: value, gradient and metrics in one pass.

    loss, metrics = tether.policy_loss(logps, advantages, response_mask, objective="dapo")
    loss.backward()

`tether.objectives()` lists the objectives, `tether.weights()` the weights of tokens, with their
options, which `tether.objective` and `tether.weight` have as typed values,
`tether.batch_weight_rules()` those that need the whole batch,
`tether.advantages()` the estimators of advantages; `tether.reference` states every formula in plain
torch.
"""

import importlib.metadata

from tether import objective, reference, weight
from tether._catalogue import (
    Choice,
    Dialect,
    Objective,
    Option,
    Weight,
    dialects,
    objectives,
    weights,
)
from tether._ids import check_ids
from tether._support import Support, support
from tether.advantages import (
    AdvantageEstimator,
    AdvantagesAndReturns,
    advantage,
    advantages,
    discounted_returns,
    generalized_advantage_estimation,
    group_advantage,
)
from tether.batch_weights import BatchWeightRule, batch_weight_rules, batch_weights
from tether.estimators import (
    KlReport,
    MismatchReport,
    Moments,
    RatioSpread,
    kl_report,
    mismatch_report,
    moments,
    whiten,
)
from tether.linear import (
    LinearPolicyOutput,
    linear_policy_loss,
    linear_preference_loss,
    linear_token_logps,
)
from tether.logits import (
    CategoricalKl,
    TokenLogps,
    VocabularyShard,
    categorical_kl,
    token_logps,
)
from tether.policy import (
    Normalizer,
    PolicyLoss,
    PolicyMetrics,
    local_counts,
    policy_loss,
    policy_token_losses,
)
from tether.preference import PreferenceLoss, PreferenceMetrics, dpo_loss, preference_loss
from tether.responses import ResponseTargets, response_targets
from tether.surrogate import Surrogate, Token
from tether.terms import aggregate, kl_terms
from tether.top_k import head_logps, top_k_kl
from tether.value import ValueLoss, ValueMetrics, value_loss

__version__ = importlib.metadata.version("tether")

__all__ = [
    "AdvantageEstimator",
    "AdvantagesAndReturns",
    "BatchWeightRule",
    "CategoricalKl",
    "Choice",
    "Dialect",
    "KlReport",
    "LinearPolicyOutput",
    "MismatchReport",
    "Moments",
    "Normalizer",
    "Objective",
    "Option",
    "PolicyLoss",
    "PolicyMetrics",
    "PreferenceLoss",
    "PreferenceMetrics",
    "RatioSpread",
    "ResponseTargets",
    "Support",
    "Surrogate",
    "Token",
    "TokenLogps",
    "ValueLoss",
    "ValueMetrics",
    "VocabularyShard",
    "Weight",
    "advantage",
    "advantages",
    "aggregate",
    "batch_weight_rules",
    "batch_weights",
    "categorical_kl",
    "check_ids",
    "dialects",
    "discounted_returns",
    "dpo_loss",
    "generalized_advantage_estimation",
    "group_advantage",
    "head_logps",
    "kl_report",
    "kl_terms",
    "linear_policy_loss",
    "linear_preference_loss",
    "linear_token_logps",
    "local_counts",
    "mismatch_report",
    "moments",
    "objective",
    "objectives",
    "policy_loss",
    "policy_token_losses",
    "preference_loss",
    "reference",
    "response_targets",
    "support",
    "token_logps",
    "top_k_kl",
    "value_loss",
    "weight",
    "weights",
    "whiten",
]
