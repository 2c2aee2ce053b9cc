"""tether's losses in the classes of OpenRLHF 0.11.2.

    import tether.openrlhf

    tether.openrlhf.patch()  # before a trainer builds its loss

PolicyLoss, ValueLoss and DPOLoss keep their names, constructors and results; `forward` is tether's.
`import tether` alone never imports OpenRLHF, and neither does this module before `patch()`.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from tether._peer_batch import Batch, clips
from tether._trainers import check_version, rebind
from tether.policy import Normalizer
from tether.preference import preference_loss
from tether.value import value_loss

__all__ = ["patch", "unpatch"]

_CLAMP = (-20.0, 20.0)  # of the log-ratio of "ppo"


def _aggregation(
    by_token: bool, dp_size: int, tokens: float | None, sequences: float | None
) -> dict[str, Any]:
    """Arguments of a loss. Without a denominator OpenRLHF takes the batch's, and no dp_size."""
    count = tokens if by_token else sequences
    world_size = 1 if count is None else dp_size
    name = "policy" if by_token else "sequences"
    normalizer = Normalizer(**{name: count}, world_size=world_size)
    name = "token_mean" if by_token else "sequence_mean_token_mean"
    return {"aggregation": name, "normalizer": normalizer}


class _PolicyLoss:
    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """The loss, clip_ratio, ppo_kl, vllm_kl and is_filter_ratio."""
        if self.policy_loss_type not in ("ppo", "gspo"):  # which OpenRLHF refuses
            return super().forward(log_probs, old_log_probs, advantages, action_mask)
        batch = Batch(log_probs, old_log_probs, advantages, action_mask)
        settings = clips(self.clip_eps_low, self.clip_eps_high, self.dual_clip)
        settings |= _aggregation(
            self.token_level_loss, dp_size, batch_num_tokens, global_batch_size
        )
        kl, corrected = batch.mean(-batch.log_ratio), self.is_correction_level != "off"
        of_engine = []
        if self.policy_loss_type == "gspo":
            if corrected:
                batch = batch._replace(old_logps=rollout_log_probs)
            loss, _ = batch.loss(objective="gspo", **settings)
            clipped = batch.mean(self._is_clipped(batch))
        else:
            if corrected:
                engine = Batch(old_log_probs, rollout_log_probs, advantages, action_mask)
                weights, filtered = self._correction(engine)
                batch = batch._replace(token_weights=weights)
                of_engine = [engine.mean(-engine.log_ratio), filtered]
            loss, values = batch.loss(_CLAMP, objective="ppo", **settings)
            clipped = values["clip_fraction_low"] + values["clip_fraction_high"]
        numbers = [log_probs.new_tensor(each) for each in (clipped, kl, *of_engine)]
        return (loss, *numbers, *[None] * (4 - len(numbers)))

    def _is_clipped(self, batch: Batch) -> Tensor:
        ratio = batch.mean_of_rows(batch.log_ratio).exp()
        above = (batch.advantages > 0) & (ratio > 1 + self.clip_eps_high)
        return above | ((batch.advantages < 0) & (ratio < 1 - self.clip_eps_low))

    def _correction(self, engine: Batch) -> tuple[Tensor, float]:
        """Weights of tokens, constants, and the share of tokens or rows outside of the bounds."""
        low, high = self.is_correction_threshold
        by_row, x = self.is_correction_level == "seq", engine.log_ratio
        measured = x
        if self.is_correction_gating != "ratio":
            p, q = (
                each.detach().exp().clamp(1e-6, 1 - 1e-6)
                for each in (engine.old_logps, engine.logps)
            )
            measured = (p - q).abs()
            if self.is_correction_gating == "binary_kl":
                measured = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        measured = engine.mean_of_rows(measured) if by_row else measured
        measured = measured.exp() if self.is_correction_gating == "ratio" else measured
        kept = (measured >= low) & (measured <= high)
        if by_row:  # a row without tokens counts as outside
            kept = kept & engine.response_mask.bool().any(1, keepdim=True)
        if self.is_correction_mode == "clip":
            weights = measured.clamp(low, high)
        else:
            weights = torch.where(kept, x.exp(), 0)
        return weights, (~kept).float().mean().item() if by_row else engine.mean(~kept)


class _ValueLoss:
    def forward(
        self,
        values: Tensor,
        old_values: Tensor,
        returns: Tensor,
        action_mask: Tensor,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> Tensor:
        clip = {} if self.clip_eps is None else {"clip_range": self.clip_eps}
        return value_loss(
            values,
            returns,
            action_mask,
            old_values=old_values if clip else None,
            **clip,
            **_aggregation(self.token_level_loss, dp_size, batch_num_tokens, global_batch_size),
        ).loss


class _DPOLoss:
    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss and the rewards of both answers."""
        smoothing = {} if self.ipo else {"label_smoothing": self.label_smoothing}
        logps = torch.cat([policy_chosen_logps, policy_rejected_logps])
        ref_logps = torch.cat([reference_chosen_logps, reference_rejected_logps])
        objective = "ipo" if self.ipo else "dpo"
        loss = preference_loss(logps, ref_logps, objective=objective, beta=self.beta, **smoothing)
        return (loss.loss, *(self.beta * (logps - ref_logps).detach()).chunk(2))


_FORWARDS = {"PolicyLoss": _PolicyLoss, "ValueLoss": _ValueLoss, "DPOLoss": _DPOLoss}
_OWN: dict[str, type] = {}  # OpenRLHF's classes and ours, once patched
_OURS: dict[str, type] = {}


def patch() -> None:
    """Puts tether's classes in the place of OpenRLHF's, in every module that has bound their names.

    Call it in each process, before a trainer builds its loss. Patching twice is patching once.
    RuntimeError for a version that is not known.
    """
    check_version("openrlhf")
    home = importlib.import_module("openrlhf.models.loss")
    for name, forward in _FORWARDS.items():
        if name not in _OWN:
            _OWN[name] = getattr(home, name)
            _OURS[name] = type(name, (forward, _OWN[name]), {"__module__": home.__name__})
        rebind("openrlhf", name, _OWN[name], _OURS[name])


def unpatch() -> None:
    """Takes back what `patch` did. Losses that were built in between stay."""
    for name in _OWN:
        rebind("openrlhf", name, _OURS[name], _OWN[name])
