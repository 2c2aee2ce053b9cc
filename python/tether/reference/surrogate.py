"""A surrogate of one's own: a formula of tokens, where the catalogue's rows have one of theirs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tether._checks import kind_of, savable, shape_text
from tether.reference.numbers import exp, spoiling
from tether.reference.rows import Tokens


@dataclasses.dataclass(frozen=True)
class Token:
    """What a surrogate sees of each token, tensors of one shape; log-probabilities in nats.

    The gradient flows through logp, log_ratio and ratio; the others are constants.
    """

    logp: Tensor  # log pi_theta(token | prefix); of the level, as the next two
    log_ratio: Tensor  # logp - old_logp
    ratio: Tensor  # exp(log_ratio), saturated
    advantage: Tensor
    old_logp: Tensor  # under the policy at the start of the optimizer step
    given_ref_logp: Tensor | None = None

    @property
    def ref_logp(self) -> Tensor:
        """Under the reference policy."""
        if self.given_ref_logp is None:
            raise ValueError(
                "policy_loss: ref_logps must be given where the surrogate reads ref_logp, got none"
            )
        return self.given_ref_logp

    def shifted(self, shift: Tensor) -> Token:
        """As a constant that moves with the shift of logp; its own tensors, if a formula writes."""
        given = {name: getattr(self, name) for name in _FIELDS}  # torch 2.10 traces no vars()
        fixed = {name: None if each is None else each.clone() for name, each in given.items()}
        log_ratio = fixed["log_ratio"].detach() + shift
        logp = fixed["logp"].detach() + shift
        return Token(**fixed | {"logp": logp, "log_ratio": log_ratio, "ratio": exp(log_ratio)})


_FIELDS = tuple(each.name for each in dataclasses.fields(Token))


class Formula(NamedTuple):
    function: Callable[..., Tensor]
    # The ratios whose weight it takes as it is: numbers, or options by name. Beyond, a token counts
    # as clipped although it keeps a gradient.
    truncation: tuple[float | str, float | str] = (0.0, math.inf)

    def of_tokens(
        self,
        logp: Tensor,
        log_ratio: Tensor,
        tokens: Tokens,
        options: dict[str, float | Tensor],
        *,
        has_reference: bool,
    ) -> tuple[Tensor, Tensor]:
        """S, with its gradient, and whether it is clipped. Where the mask is 0, the formula sees an
        ordinary token."""
        options = {name: savable(each) for name, each in options.items()}

        def seen(values: Tensor, otherwise: float) -> Tensor:
            return torch.where(tokens.active(), values, otherwise)

        log_ratio = seen(log_ratio, 0.0)
        token = Token(
            logp=seen(logp, -1.0),
            log_ratio=log_ratio,
            ratio=exp(log_ratio),
            advantage=seen(tokens.advantage, 1.0),
            old_logp=seen(tokens.old_logp, -1.0),
            given_ref_logp=seen(tokens.ref_logp, -1.0) if has_reference else None,
        )

        def loss_of(token: Token) -> Tensor:
            return _checked(self.function(token, **options), token.logp)

        slope = _slope(lambda shift: loss_of(token.shifted(shift)), token.logp)
        low, high = (options[end] if isinstance(end, str) else end for end in self.truncation)
        clipped = (slope == 0) | (token.ratio < low) | (token.ratio > high)
        return loss_of(token) * spoiling(~seen(slope, 0.0).isnan(), logp), clipped


def _checked(loss: Tensor, logp: Tensor) -> Tensor:
    if not isinstance(loss, Tensor):
        raise TypeError(f"policy_loss: the surrogate must return a tensor, got {kind_of(loss)}")
    if loss.shape != logp.shape or loss.device != logp.device:
        raise ValueError(
            f"policy_loss: the surrogate must return {shape_text(logp)} on {logp.device} like its "
            f"tokens, got {shape_text(loss)} on {loss.device}"
        )
    return loss.to(logp.dtype)


def _slope(loss_of: Callable[[Tensor], Tensor], logp: Tensor) -> Tensor:
    """The derivative of each token's loss by a shift of its logp, a constant."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        loss, pull = torch.func.vjp(loss_of, torch.zeros_like(logp))
        return pull(torch.ones_like(loss))[0].detach()
    # A checkpoint around the loss would make everything again for a derivative that is taken here.
    kept = saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with torch.inference_mode(False), torch.enable_grad(), kept:
        shift = torch.zeros(logp.shape, dtype=logp.dtype, device=logp.device, requires_grad=True)
        loss = loss_of(shift)
        if not loss.requires_grad:
            return torch.zeros_like(logp)
        (slope,) = torch.autograd.grad(loss.sum(), shift, allow_unused=True)
        return torch.zeros_like(logp) if slope is None else slope
