"""tether inside verl 0.9.1.

    actor_rollout_ref.actor.policy_loss.loss_mode=tether_vanilla

Once both are installed, `import verl` loads this module (entry point "verl.plugins"), which adds
names to verl's registries: of losses tether_vanilla, tether_gspo, ... for verl's own and
tether_topr, ... for the objectives of `tether.objectives()`; of advantages tether_rloo, ... Nothing
of verl is replaced until `patch()`. `import tether` alone never imports verl.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor

from tether import _verl_advantages, reference
from tether._catalogue import objectives
from tether._checks import check_strings, names_of
from tether._ops import has_kernel
from tether._peer_batch import Batch, Metrics, check_choice
from tether._trainers import check_version, module_of, rebind
from tether._verl_losses import LOSSES, Loss, of_catalogue
from tether.advantages import advantages
from tether.logits import token_logps
from tether.objective import PolicyObjective
from tether.reference.kl import low_var_kl
from tether.reference.numbers import with_gradient_of
from tether.surrogate import Surrogate

__all__ = ["PARTS", "patch", "register_loss", "unpatch"]

core_algos = module_of("verl", "verl.trainer.ppo.core_algos")
torch_functional = module_of("verl", "verl.utils.torch_functional")

# ---- losses --------------------------------------------------------------------------------------


def register_loss(name: str, objective: str | PolicyObjective | Surrogate, **options: Any) -> None:
    """Makes loss_mode=`name` an objective of tether.policy_loss with settings of its own.

    options are those of tether.policy_loss: options and choices of the objective and `weights`.
    What they leave open is as in tether_`objective`, where epsilon_low and epsilon_high are verl's
    clips; loss_agg_mode gives the aggregation. Raises ValueError or TypeError for a name of verl's
    own, and for what policy_loss refuses.
    """
    function = "tether.verl.register_loss"
    check_strings(function, name=name)
    known = core_algos.POLICY_LOSS_REGISTRY
    if name in known and known[name].__module__ != __name__:
        raise ValueError(f'{function}: name must not be one of verl\'s, got "{name}"')
    objective, options = check_choice(function, "verl", objective, options)
    _register(name, of_catalogue(objective), options)


def _register(name: str, loss: Loss, options: dict[str, Any]) -> None:
    def loss_of_verl(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, Metrics]:
        check_version("verl")
        batch = Batch(log_prob, old_log_prob, advantages, response_mask, rollout_is_weights)
        return loss(batch, loss_agg_mode, config, **options)

    loss_of_verl.__name__ = loss_of_verl.__qualname__ = name
    called = getattr(loss.objective, "__name__", loss.objective)
    loss_of_verl.__doc__ = f"{called} of tether, as verl's losses are called."
    core_algos.register_policy_loss(name)(loss_of_verl)


# ---- advantages ----------------------------------------------------------------------------------


def _register_rule(name: str) -> None:
    """A rule of groups of tether's; `grpo` as verl's setting has it."""

    def estimator(
        token_level_rewards: Tensor,
        response_mask: Tensor,
        index: Iterable[Hashable] | None = None,
        config: Any = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor]:
        batch = (token_level_rewards, response_mask, index)
        if name == "grpo":
            scaled = config is None or config.get("norm_adv_by_std_in_grpo", True)
            return _verl_advantages.grpo(*batch, norm_adv_by_std_in_grpo=scaled)
        return _verl_advantages.of_groups(name, *batch)

    _register_estimator(name, estimator)


def _register_estimator(name: str, estimator: Callable[..., tuple[Tensor, Tensor]]) -> None:
    def checked(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        check_version("verl")
        return estimator(*arguments, **options)

    core_algos.register_adv_est(f"tether_{name}")(checked)


# ---- log-probabilities and penalties -------------------------------------------------------------


_NONE = -(2**53)  # verl refuses a label of -100


def _logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    if not has_kernel(logits):
        return _OWN["logprobs_from_logits"](logits, labels, inplace_backward)
    return token_logps(logits, labels, ignore_index=_NONE).logps.to(logits.dtype)


def _entropies(logits: Tensor) -> Tensor:
    ids = logits.new_zeros(logits.shape[:-1], dtype=torch.int64)
    return token_logps(logits, ids, entropies=True).entropies


def _entropy_from_logits(logits: Tensor) -> Tensor:
    if not has_kernel(logits):
        return _OWN["entropy_from_logits"](logits)
    return _entropies(logits).to(logits.dtype)


def _entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    if not has_kernel(logits):
        return _OWN["entropy_from_logits_with_chunking"](logits, chunk_size)
    return _entropies(logits).float()


_KL = {
    **dict.fromkeys(("kl", "k1"), reference.k1),
    **dict.fromkeys(("mse", "k2"), reference.k2),
    **dict.fromkeys(("low_var_kl", "k3"), low_var_kl),
    "abs": torch.abs,
}


def _kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    form = _KL.get(kl_penalty.removesuffix("+"))
    if form is None:
        return _OWN["kl_penalty"](logprob, ref_logprob, kl_penalty)
    d = ref_logprob - logprob
    value = form(d)
    return with_gradient_of(value, reference.k2(d)) if kl_penalty.endswith("+") else value


# ---- in place of verl's own ----------------------------------------------------------------------

PARTS: dict[str, dict[str, Callable]] = {
    "logps": {"logprobs_from_logits": _logprobs_from_logits},
    "entropies": {
        "entropy_from_logits": _entropy_from_logits,
        "entropy_from_logits_with_chunking": _entropy_from_logits_with_chunking,
    },
    "gae": {"compute_gae_advantage_return": _verl_advantages.gae},
    "grpo": {"compute_grpo_outcome_advantage": _verl_advantages.grpo},
    "advantages": _verl_advantages.BY_FUNCTION,
    "kl": {"kl_penalty": _kl_penalty},
}
_OURS = {name: each for part in PARTS.values() for name, each in part.items()}
_HOMES = (core_algos, torch_functional)
_OWN = {name: getattr(home, name) for home in _HOMES for name in _OURS if hasattr(home, name)}


def patch(*parts: str) -> None:
    """Puts functions of tether in the place of verl's, in every module that has bound their names.

    parts   of `PARTS`; none: all but "kl"
        logps       logprobs_from_logits
        entropies   entropy_from_logits and the one with chunking
        gae         compute_gae_advantage_return, which is a loop over time in verl
        grpo        compute_grpo_outcome_advantage, a loop over answers
        advantages  those of its other estimators
        kl          kl_penalty: no faster, k3 without cancellation near 0

    Call it in each process, before workers are built: an engine binds its entropy when it is made.
    Patching twice is patching once. RuntimeError for a verl that is not known, ValueError for an
    unknown part.
    """
    check_version("verl")
    for name in _names(parts or [part for part in PARTS if part != "kl"]):
        _swap(name, _OWN[name], _OURS[name])


def unpatch(*parts: str) -> None:
    """Takes back what `patch` did, all of it unless parts are named."""
    for name in _names(parts or PARTS):
        _swap(name, _OURS[name], _OWN[name])


def _names(parts: Iterable[str]) -> list[str]:
    for part in names_of("tether.verl: parts", parts):
        if part not in PARTS:
            raise ValueError(f'tether.verl: parts must be of {", ".join(PARTS)}, got "{part}"')
    return [name for part in parts for name in PARTS[part]]


def _swap(name: str, old: Callable, new: Callable) -> None:
    rebind("verl", name, old, new)
    for key, each in core_algos.ADV_ESTIMATOR_REGISTRY.items():
        if each is old:
            core_algos.ADV_ESTIMATOR_REGISTRY[key] = new


for _name, _loss in LOSSES.items():
    _register(f"tether_{_name}", _loss, {})
for _name in objectives().keys() - LOSSES.keys():
    _register(f"tether_{_name}", of_catalogue(_name), {})
for _name, _row in advantages().items():
    if _row.of_groups:
        _register_rule(_name)
for _name, _estimator in _verl_advantages.BY_NAME.items():
    _register_estimator(_name, _estimator)
