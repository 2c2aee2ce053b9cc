"""Weights of tokens that need the whole batch. Constants: nothing here has a gradient."""

from __future__ import annotations

import copy
from typing import NamedTuple

from torch import Tensor

from tether import reference
from tether._checks import check_known
from tether._functions import BATCH_WEIGHTS, FUNCTIONS, Call
from tether._lists import Choice, Numbers, Option, Value, checked_settings
from tether._ops import has_kernel


class BatchWeightRule(NamedTuple):
    name: str
    formula: str
    paper: str
    agreement: str  # who computes the same in the tests
    options: dict[str, Option]
    choices: dict[str, Choice]


_CATALOGUE = {row[0]: BatchWeightRule(*row, *rest) for row, *rest in BATCH_WEIGHTS}


def batch_weight_rules() -> dict[str, BatchWeightRule]:
    """Every rule of `batch_weights` by name, with its formula, paper and options."""
    return copy.deepcopy(_CATALOGUE)


def batch_weights(
    rule: str,
    logps: Tensor,
    response_mask: Tensor,
    *,
    old_logps: Tensor | None = None,
    rollout_logps: Tensor | None = None,
    advantages: Numbers | None = None,
    entropies: Tensor | None = None,
    turn_ids: Tensor | None = None,
    offsets: Numbers | None = None,
    **options: Value,
) -> Tensor:
    """Weights of tokens by ranks, quantiles and means of the batch, or by the rest of an answer.

    rule             a row of `batch_weight_rules()`; options are its own, share=0.002
    logps            [B, T], or packed [N] with offsets [nats]; the others like it, advantages also
                     [B]. A rule looks at what it needs and asks for it
    response_mask    like logps; slots of weight 0 may hold anything and come out as 1
    turn_ids         like logps, int32 or int64; None: each run of response_mask is a turn

    Like logps, in their dtype. For policy_loss: token_weights=batch_weights("clip_cov", ...),
    kl_weights=batch_weights("kl_cov", ...) of the objective kl_cov, and, where what is taken out
    shall not be counted, response_mask=mask * batch_weights("m2po", ...).

    Over the batch that is given: pass the micro-batches of a step packed, those of its ranks
    gathered. Absent old_logps stand for nothing here: of a first update pass logps. In float64; on
    other devices than the CPU by torch's operations, which wait for nothing. A number that is not
    finite, of those that the rule needs, makes every weight NaN. Raises ValueError or TypeError.
    """
    function = "batch_weights"
    check_known(function, "rule", rule, _CATALOGUE)
    tensors = {
        "logps": logps,
        "response_mask": response_mask,
        "old_logps": old_logps,
        "rollout_logps": rollout_logps,
        "advantages": advantages,
        "entropies": entropies,
        "turn_ids": turn_ids,
        "offsets": offsets,
    }
    checked = FUNCTIONS[function].checked(tensors)
    row = _CATALOGUE[rule]
    settings = checked_settings(function, row.options, row.choices, options)
    choices = {"rule": rule, **settings.choices}
    call = Call(FUNCTIONS[function], checked, settings._replace(choices=choices)).detached()
    if has_kernel(logps):
        return call.run()
    call.check_settings()
    return reference.batch_weights(**call.tensors, **call.named_settings())
