"""tether's losses in the classes of torchrl 0.14.1.

    from tether.torchrl import GRPOLoss  # or DAPO, CISPOLoss: torchrl's names, arguments, results

The policy objective is tether's, any of `tether.objectives()` on request:

    GRPOLoss(actor, objective="topr", options={"weights": {"opsm": {"high": 0.1}}})

ESS, entropies and penalties stay torchrl's. `import tether` alone never imports torchrl.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tether._peer_batch import check_choice, clips_of, row_of_choice
from tether._trainers import check_version, module_of
from tether.objective import PolicyObjective
from tether.policy import Normalizer, policy_loss, policy_token_losses
from tether.surrogate import Surrogate

if TYPE_CHECKING:
    from tensordict import TensorDictBase

__all__ = ["DAPO", "CISPOLoss", "GRPOLoss"]

llm = module_of("torchrl", "torchrl.objectives.llm")


class _PolicyObjective:
    """torchrl's hooks: the first knows the tokens, the second their mask."""

    _objective: str | Surrogate = "torchrl.grpo"
    _options: Mapping[str, Any] | None = None  # of an objective that the user has chosen

    def __init__(
        self,
        *arguments: Any,
        objective: str | PolicyObjective | Surrogate | None = None,
        options: Mapping[str, Any] | None = None,
        **settings: Any,
    ):
        """torchrl's arguments, and an objective in its place with options of tether.policy_loss.

        What options leave open is clip_epsilon, where the objective has such clips, or the
        objective's own. ValueError or TypeError for what policy_loss refuses, and for denominators,
        which are torchrl's.
        """
        check_version("torchrl")
        super().__init__(*arguments, **settings)
        if objective is not None:
            choice = check_choice("tether.torchrl", "torchrl", objective, options or {})
            self._objective, self._options = choice
        elif options is not None:
            raise ValueError("tether.torchrl: objective must be given with options, got none")

    def _compute_policy_objective(
        self, log_weight: Tensor, advantage: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Both arrays as columns [..., T, 2], and the clip fraction, over all slots."""
        low, high = self._clip_bounds
        clipped = (log_weight < low) | (log_weight > high)
        columns = torch.cat([log_weight, advantage.expand_as(log_weight)], -1)
        return columns, clipped.to(log_weight.dtype).mean()

    def _aggregate_loss_value(
        self, value: Tensor, mask: Tensor, tensordict: TensorDictBase | None = None
    ) -> Tensor:
        if value.shape[-1] != 2:  # of entropies
            return super()._aggregate_loss_value(value, mask, tensordict)
        tokens = mask.shape[-1]
        log_ratios, advantages = value.reshape(-1, tokens, 2).unbind(-1)
        batch, settings = self._of_policy(log_ratios, tensordict)
        batch["advantages"] = advantages.detach()
        if self.aggregation == "none" or self.reduction == "none":
            batch["response_mask"] = mask.reshape(-1, tokens)
            terms = policy_token_losses(**batch, **settings)
            return terms.reshape(*mask.shape, 1).to(value.dtype)
        if self.aggregation == "prompt_mean":
            if mask.dim() > 2:
                raise ValueError(
                    "tether.torchrl: tokens must be [T] or [B, T] for prompt_mean, "
                    f"got {list(mask.shape)}"
                )
            settings["aggregation"] = "sequence_mean_token_mean"
            settings["normalizer"] = Normalizer(sequences=len(log_ratios))  # empty rows too
        else:
            for key in self._loss_mask_keys():  # which the batch may have
                other = None if tensordict is None else tensordict.get(key, default=None)
                mask = mask if other is None else mask & self._expand_loss_mask(other, mask)
            settings["aggregation"] = "token_mean"
            settings["normalizer"] = Normalizer(policy=mask.sum().clamp_min(1))
        batch["response_mask"] = mask.reshape(-1, tokens)
        loss = policy_loss(**batch, **settings).loss.to(value.dtype)
        of_batch = self.aggregation == "prompt_mean" and mask.dim() == 2
        return loss[None] if of_batch else loss

    def _of_policy(
        self, log_ratios: Tensor, tensordict: TensorDictBase | None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Log-probabilities and options: torchrl's losses are of log-ratios alone."""
        low, high = (bound.double().expm1() for bound in self._clip_bounds)
        row = row_of_choice("tether.torchrl", self._objective)
        clips = clips_of(row, {"epsilon_low": -low, "epsilon_high": high})
        settings = {"objective": self._objective, **clips, **(self._options or {})}
        if self._options is None:
            old = torch.zeros_like(log_ratios, requires_grad=False)
            return {"logps": log_ratios, "old_logps": old}, settings
        old = tensordict.get(
            self.tensor_keys.sample_log_prob,
            as_padded_tensor=True,
            padding_side="left",
            padding_value=0.0,
        ).reshape(log_ratios.shape)
        logps = tensordict.get("_cur_log_prob").reshape(log_ratios.shape)
        return {"logps": logps, "old_logps": old, "rollout_logps": old}, settings


class GRPOLoss(_PolicyObjective, llm.GRPOLoss):
    __doc__ = llm.GRPOLoss.__doc__


class DAPO(_PolicyObjective, llm.DAPO):
    __doc__ = llm.DAPO.__doc__


class CISPOLoss(_PolicyObjective, llm.CISPOLoss):
    __doc__ = llm.CISPOLoss.__doc__
    _objective = "torchrl.cispo"
