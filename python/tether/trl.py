"""TRL's trainers with the heads and losses of this library, for TRL 1.16.0.

    import tether.trl

    tether.trl.patch()  # before the trainer is built

Replaced are TRL's log-probabilities and entropies of hidden states and of logits, which all of its
trainers call, and the losses of GRPOTrainer, RLOOTrainer, DPOTrainer and KTOTrainer. Each loss
still runs TRL's own function, on the same log-probabilities without their gradient: it logs the
metrics and keeps the trainer's state. Settings that are not known here, and tensors that no kernel
takes, are left to TRL. What that comes to: docs/trl.md.
"""

from __future__ import annotations

import functools
import importlib
import sys
from types import ModuleType
from typing import Any

from tether import _trl_heads as heads
from tether import _trl_losses as losses
from tether._trainers import check_version, rebind

# Each function here takes TRL's own and gives what stands in its place.
_REPLACEMENTS = {
    "trl.trainer.utils:selective_log_softmax": heads.selective_log_softmax,
    "trl.trainer.utils:entropy_from_logits": heads.entropy_from_logits,
    "trl.trainer.utils:selective_log_softmax_and_entropy": heads.selective_log_softmax_and_entropy,
    "trl.trainer.utils:_ChunkedLogProbFunction": heads.fused_head,
    "trl.trainer.utils:_use_triton": heads.scores_only_labels,
    "trl.trainer.grpo_trainer:GRPOTrainer._compute_loss": losses.grpo,
    "trl.trainer.rloo_trainer:RLOOTrainer._compute_loss": losses.rloo,
    "trl.trainer.dpo_trainer:DPOTrainer._compute_loss": losses.dpo,
    "trl.trainer.kto_trainer:KTOTrainer._compute_loss": losses.kto,
}
# place: (TRL's own, ours), while patched
_swapped: dict[str, tuple[Any, Any]] = {}


def patch() -> None:
    """Puts this library's functions in the place of TRL's, in every module of it that is loaded.

    A second call does nothing. Raises RuntimeError where TRL is of a version that is not known.
    """
    if _swapped:
        return
    check_version("trl")
    found = {}
    for place, ours in _REPLACEMENTS.items():
        module, _, path = place.partition(":")
        owner, name = _find(importlib.import_module(module), path)
        owned = vars(owner)[name]
        found[place] = (owned, ours(owned))
    _swapped.update(found)
    for place, (owned, ours) in _swapped.items():
        _swap(place, owned, ours)


def unpatch() -> None:
    """Takes `patch` back. Without it, nothing."""
    for place, (owned, ours) in _swapped.items():
        _swap(place, ours, owned)
    _swapped.clear()


def _find(module: ModuleType, name: str) -> tuple[Any, str]:
    """Where "function" or "Class.method" stands, and under which name."""
    *owners, name = name.split(".")
    return functools.reduce(getattr, owners, module), name


def _swap(place: str, old: Any, new: Any) -> None:
    """A public function in every module of TRL that has imported it; others where they stand. What
    somebody else has put there stays."""
    module, _, path = place.partition(":")
    owner, name = _find(sys.modules[module], path)
    if vars(owner).get(name) is old:
        setattr(owner, name, new)
    if owner is sys.modules[module] and not name.startswith("_"):
        rebind("trl", name, old, new)
