"""tether's losses in the classes of torchrl 0.14.1.

    from tether.torchrl import GRPOLoss  # or DAPO, CISPOLoss: torchrl's names, arguments, results

The policy objective is tether's; ESS, entropies and penalties stay torchrl's. `import tether` alone
never imports torchrl.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.objectives import llm

from tether._trainers import check_version
from tether.policy import Normalizer, policy_loss, policy_token_losses

__all__ = ["DAPO", "CISPOLoss", "GRPOLoss"]


class _PolicyObjective:
    """torchrl's hooks: the first knows the tokens, the second their mask."""

    _objective = "torchrl.grpo"

    def __init__(self, *arguments: Any, **settings: Any):
        check_version("torchrl")
        super().__init__(*arguments, **settings)

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
        low, high = (bound.double().expm1() for bound in self._clip_bounds)
        settings = {
            "objective": self._objective,
            "old_logps": torch.zeros_like(log_ratios, requires_grad=False),
            "epsilon_low": -low,
            "epsilon_high": high,
        }
        if self.aggregation == "none" or self.reduction == "none":
            batch = (log_ratios, advantages.detach(), mask.reshape(-1, tokens))
            return policy_token_losses(*batch, **settings).reshape(*mask.shape, 1).to(value.dtype)
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
            settings["normalizer"] = Normalizer(policy=mask.sum().clamp_min(1))
        batch = (log_ratios, advantages.detach(), mask.reshape(-1, tokens))
        loss = policy_loss(*batch, **settings).loss.to(value.dtype)
        of_batch = self.aggregation == "prompt_mean" and mask.dim() == 2
        return loss[None] if of_batch else loss


class GRPOLoss(_PolicyObjective, llm.GRPOLoss):
    __doc__ = llm.GRPOLoss.__doc__


class DAPO(_PolicyObjective, llm.DAPO):
    __doc__ = llm.DAPO.__doc__


class CISPOLoss(_PolicyObjective, llm.CISPOLoss):
    __doc__ = llm.CISPOLoss.__doc__
    _objective = "torchrl.cispo"
