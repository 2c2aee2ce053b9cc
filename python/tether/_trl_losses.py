"""Losses of TRL's trainers by those here. Used by `tether.trl`.

Each takes TRL's own `_compute_loss`, and gives ours. Ours runs TRL's too, on the same
log-probabilities without their gradient: it logs the metrics and keeps the trainer's state. It is
left alone where the settings are not known here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from tether._ops import has_kernel
from tether._peer_batch import clips
from tether.policy import Normalizer, policy_loss
from tether.preference import preference_loss

# ---- what TRL's own loss is run on ---------------------------------------------------------------


class _Seen:
    """A trainer with some of its attributes replaced; what is set goes to the trainer."""

    def __init__(self, trainer: Any, **replaced: Any):
        vars(self).update(_trainer=trainer, _replaced=replaced)

    def __getattr__(self, name: str) -> Any:
        replaced = vars(self)["_replaced"]
        return replaced[name] if name in replaced else getattr(vars(self)["_trainer"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(vars(self)["_trainer"], name, value)


class _Record:
    """A function whose results are kept; the caller gets them without a gradient."""

    def __init__(self, function: Callable):
        self.function = function
        self.results = []

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.results.append(self.function(*arguments, **named))
        return tree_map_only(Tensor, Tensor.detach, self.results[-1])


def _recorded(trainer: Any, *names: str) -> dict[str, _Record]:
    return {name: _Record(getattr(trainer, name)) for name in names}


# ---- GRPOTrainer ---------------------------------------------------------------------------------

_CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
_OVER_THE_STEP = ("dapo", "cispo", "vespo")  # divided by the tokens of all its micro-batches
_WEIGHTS = ("get_off_policy_mask", "get_high_entropy_mask", "get_gamma_weights")


def grpo(own: Callable) -> Callable:
    @functools.wraps(own)
    def _compute_loss(self, model, inputs):
        if not _knows_grpo(self) or not has_kernel(inputs["completion_ids"]):
            return own(self, model, inputs)
        calls = _recorded(self, "_get_per_token_logps_and_entropies", *_WEIGHTS)
        entropy_coef = _entropy_coef(self)  # TRL's loss may move it for the next step
        own(_Seen(self, **calls), model, inputs)
        logps, entropies, aux_loss = calls["_get_per_token_logps_and_entropies"].results[0]
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        factors = {name: calls[name].results[0] for name in _WEIGHTS if calls[name].results}
        loss = policy_loss(
            logps,
            inputs["advantages"],
            mask,
            old_logps=inputs.get("old_per_token_logps"),
            ref_logps=inputs["ref_per_token_logps"] if self.beta else None,
            token_weights=_token_weights(self, inputs, logps, factors.values()),
            normalizer=_normalizer(self, inputs, mask),
            **_grpo_settings(self),
        ).loss
        if entropy_coef:
            acting = mask * factors.get("get_high_entropy_mask", 1)
            mean = (entropies * acting).sum() / acting.sum().clamp(min=1.0)
            loss = loss - entropy_coef * mean / _micro_batches(self)
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * aux_loss / _micro_batches(self)
        return loss

    return _compute_loss


def _knows_grpo(trainer: Any) -> bool:
    """Whether the settings are those of a loss here. Not here: a two-sided bound that cuts good
    tokens too; a penalty with the ratio of answers beside a surrogate with that of tokens."""
    delta, of_tokens = trainer.args.delta, trainer.loss_type in ("cispo", "vespo")
    of_answers = trainer.importance_sampling_level == "sequence"
    return (
        trainer.loss_type in (*_CLIPPED, "cispo", "sapo", "vespo")
        and trainer.importance_sampling_level in ("token", "sequence")
        and (trainer.loss_type not in _CLIPPED or delta is None or delta > 1 + trainer.epsilon_high)
        and not (of_tokens and of_answers and trainer.beta and trainer.args.use_bias_correction_kl)
    )


def _micro_batches(trainer: Any) -> int:
    """Of the optimizer step; an evaluation is not split."""
    return trainer.current_gradient_accumulation_steps if trainer.model.training else 1


def _entropy_coef(trainer: Any) -> float:
    """Of the entropy bonus in this step."""
    if not trainer._entropy_bonus_enabled:
        return 0.0
    too_high = (
        trainer.use_adaptive_entropy and trainer._last_world_entropy > trainer.args.entropy_target
    )
    return 0.0 if too_high else trainer.entropy_coef


def _grpo_settings(trainer: Any) -> dict[str, Any]:
    """The objective and its options. vespo's weights are token weights, made by TRL, which clamps
    them."""
    args, kind = trainer.args, trainer.loss_type
    of_answers = trainer.importance_sampling_level == "sequence"
    corrected = trainer.beta and args.use_bias_correction_kl
    correction = "none" if not corrected else "level_ratio" if of_answers else "ratio"
    settings = {"beta": trainer.beta, "kl_correction": correction}
    if kind == "vespo":
        return {**settings, "objective": "reinforce"}
    if kind == "cispo":
        level = "sequence_token" if of_answers else "token"
        bound = {"ratio_high": trainer.epsilon_high}
        return {**settings, "objective": "trl.cispo", "level": level, **bound}
    settings["level"] = "sequence_mean" if of_answers else "token"
    if kind == "sapo":
        taus = {"tau_pos": args.sapo_temperature_pos, "tau_neg": args.sapo_temperature_neg}
        return {**settings, "objective": "trl.sapo", **taus}
    if kind == "dr_grpo":
        settings["constant"] = trainer.max_completion_length
    bounds = clips(trainer.epsilon_low, trainer.epsilon_high, args.delta)
    return {**settings, "objective": f"trl.{kind}", **bounds}


def _token_weights(trainer: Any, inputs: dict, logps: Tensor, factors: Any) -> Tensor | None:
    """The product of what TRL multiplies the loss of a token by, like logps: masks, the weights of
    vespo, and how likely trainer and engine find the token."""
    corrected = trainer.use_vllm and trainer.vllm_importance_sampling_correction
    engine = inputs["importance_sampling_ratio"] if corrected else None
    if trainer.loss_type == "vespo":  # whose weights have it already
        engine = None
    given = [each for each in (*factors, engine) if each is not None]
    if not given:
        return None
    product = functools.reduce(torch.mul, (each.to(logps.dtype) for each in given))
    return product.expand_as(logps)


def _normalizer(trainer: Any, inputs: dict, mask: Tensor) -> Normalizer:
    """TRL's denominators: rows without tokens are counted too."""
    if trainer.loss_type not in _OVER_THE_STEP:
        tokens = mask.sum().clamp(min=1)
        return Normalizer(policy=tokens, sequences=len(mask), scale=1 / _micro_batches(trainer))
    items = inputs["num_items_in_batch"].clamp(min=1.0)  # of the generation batch, all ranks
    if trainer.model.training:
        items = items * _micro_batches(trainer) / trainer.args.steps_per_generation
    return Normalizer(policy=items, world_size=trainer.accelerator.num_processes)


# ---- RLOOTrainer ---------------------------------------------------------------------------------


def rloo(own: Callable) -> Callable:
    @functools.wraps(own)
    def _compute_loss(self, model, inputs):
        if not has_kernel(inputs["completion_ids"]):
            return own(self, model, inputs)
        calls = _recorded(self, "_get_per_token_logps_and_entropies")
        own(_Seen(self, **calls), model, inputs)
        logps, _, aux_loss = calls["_get_per_token_logps_and_entropies"].results[0]
        answers = (logps * inputs["completion_mask"]).sum(1, keepdim=True)  # rows of one token
        loss = policy_loss(
            answers,
            inputs["advantages"][:, None],
            torch.ones_like(answers, dtype=torch.bool, requires_grad=False),
            objective="trl.rloo",
            old_logps=inputs["old_logps"][:, None],
            **clips(self.epsilon_low, self.epsilon_high),
        ).loss
        return loss + self.router_aux_loss_coef * aux_loss if self.aux_loss_enabled else loss

    return _compute_loss


# ---- DPOTrainer, KTOTrainer ----------------------------------------------------------------------

_OF_ANSWERS = {  # TRL's name: ours
    "sigmoid": "dpo",
    "hinge": "hinge",
    "robust": "robust",
    "exo_pair": "exo_pair",
    "nca_pair": "nca_pair",
    "bco_pair": "bco_pair",
    "sppo_hard": "sppo_hard",
    "apo_zero": "apo_zero",
    "apo_down": "apo_down",
    "discopop": "discopop",
}
# Of AOT, arXiv:2406.05882, which rank an answer and its reference have where what is compared has
# been sorted: margins of the policy and of the reference, or scores of the chosen and the rejected.
_OF_RANKS = ("aot", "aot_unpaired")
_OF_MEANS = {"ipo": "ipo", "sigmoid_norm": "dpo"}
_LINKS = {
    "reverse_kl": "reverse_kl",
    "forward_kl": "forward_kl",
    "js_divergence": "js",
    "alpha_divergence": "alphapo",  # (t^(a - 1) - 1) / (a - 1) of t = e^S
}
_REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")


class _WithReference(dict):
    """Inputs whose reference is found where TRL asks for it: after the policy, so that dropout
    draws the same numbers as in TRL."""

    def __init__(self, inputs: dict, find: Callable):
        super().__init__(inputs)
        self.find = find

    def __missing__(self, name: str) -> Tensor:
        if name not in _REFERENCE:
            raise KeyError(name)
        self.update(zip(_REFERENCE, self.find(), strict=True))
        return self[name]


def dpo(own: Callable) -> Callable:
    @functools.wraps(own)
    def _compute_loss(self, model, inputs, return_outputs):
        if not _knows_dpo(self) or not has_kernel(inputs["input_ids"]):
            return own(self, model, inputs, return_outputs)
        if not self.precompute_ref_logps:
            reference = self.model if self.ref_model is None else self.ref_model
            plain = inputs
            inputs = _WithReference(plain, lambda: self.compute_ref_log_probs(reference, plain))
        policy = _Record(model)
        out = own(_Seen(self, precompute_ref_logps=True), policy, inputs, return_outputs)
        ref_logps = torch.cat([inputs[name] for name in _REFERENCE])
        mask = inputs["completion_mask"]
        logps = _logps(policy.results[0], mask)
        answer_weights = _wpo(policy.results[0], mask) if self.use_weighting else None
        loss = sum(
            weight * _dpo_loss(self, kind, logps, mask, ref_logps, answer_weights)
            for kind, weight in zip(self.loss_types, self.loss_weights, strict=True)
        )
        return _finished(self, loss, policy.results[0], out, return_outputs)

    return _compute_loss


def _knows_dpo(trainer: Any) -> bool:
    """Whether every loss of the sum is one of this library."""
    of_means = any(kind in _OF_MEANS for kind in trainer.loss_types)
    links = ("reverse_kl",) if of_means else _LINKS
    known = (*_OF_ANSWERS, *_OF_MEANS, *_OF_RANKS, *([] if trainer.use_weighting else ["sft"]))
    return (
        all(kind in known for kind in trainer.loss_types)
        and trainer.f_divergence_type in links
        and trainer.ld_alpha is None
    )


def _wpo(outputs: Any, mask: Tensor) -> Tensor:
    """[2 B]: how likely the policy finds an answer, by token and of its sum of squares: WPO,
    arXiv:2406.11827, eq. 2."""
    mask = mask[:, 1:]
    log_squares = outputs.log_sum_sq_probs[:, -mask.shape[1] :]
    aligned = (outputs.log_probs[:, -mask.shape[1] :] - log_squares) * mask
    return (aligned.sum(1) / mask.sum(1).clamp(min=1)).exp().detach()


def _by_rank(kind: str, answers: Tensor, ref_logps: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of answers with those that AOT compares them with."""
    (chosen, rejected), (ref_chosen, ref_rejected) = answers.chunk(2), ref_logps.chunk(2)
    if kind == "aot":
        policy, reference = (chosen - rejected).argsort(), (ref_chosen - ref_rejected).argsort()
        parts = (chosen[policy], rejected[policy], ref_chosen[reference], ref_rejected[reference])
    else:
        good, bad = (chosen - ref_chosen).argsort(), (rejected - ref_rejected).argsort()
        parts = (chosen[good], rejected[bad], ref_chosen[good], ref_rejected[bad])
    return torch.cat(parts[:2]), torch.cat(parts[2:])


def _dpo_loss(
    trainer: Any,
    kind: str,
    logps: Tensor,
    mask: Tensor,
    ref_logps: Tensor,
    answer_weights: Tensor | None,
) -> Tensor:
    """One loss of TRL's sum, of logps [2 B, T - 1] and ref_logps [2 B] of answers, the chosen ones
    first, with their mask [2 B, T]."""
    count = len(logps) // 2
    if kind == "sft":
        ones = torch.ones_like(ref_logps[:count])
        return policy_loss(logps[:count], ones, mask[:count, 1:], objective="reinforce").loss
    answers = logps.sum(1)
    settings = {"beta": trainer.beta, "answer_weights": answer_weights}
    if kind in _OF_RANKS:
        settings["label_smoothing"] = trainer.label_smoothing
        return preference_loss(
            *_by_rank(kind, answers, ref_logps), objective="cdpo", **settings
        ).loss
    if kind in _OF_MEANS:
        lengths = mask.sum(1).clamp(min=1.0)
        answers, ref_logps = answers / lengths, ref_logps / lengths
        return preference_loss(answers, ref_logps, objective=_OF_MEANS[kind], **settings).loss
    if kind in ("robust", "exo_pair"):
        settings["label_smoothing"] = trainer.label_smoothing
    if kind == "discopop":
        settings["tau"] = trainer.args.discopop_tau
    settings["link"] = _LINKS[trainer.f_divergence_type]
    if trainer.f_divergence_type == "alpha_divergence":
        settings["link_alpha"] = 1 - trainer.f_alpha_divergence_coef
    return preference_loss(answers, ref_logps, objective=_OF_ANSWERS[kind], **settings).loss


def kto(own: Callable) -> Callable:
    @functools.wraps(own)
    def _compute_loss(self, model, inputs, return_outputs):
        if not _knows_kto(self) or not has_kernel(inputs["input_ids"]):
            return own(self, model, inputs, return_outputs)
        policy, reference = _Record(model), _Record(self.ref_model)
        seen = self if self.precompute_ref_logps else _Seen(self, ref_model=reference)
        out = own(seen, policy, inputs, return_outputs)
        mask, place = inputs["completion_mask"], int(self.calculate_KL)  # after one for the KL
        logps, ref_logps = _logps(policy.results[place], mask).sum(1), inputs.get("ref_logps")
        if not self.precompute_ref_logps:
            ref_logps = _logps(reference.results[place], mask).sum(1)
        baseline = self._metrics["train" if self.model.training else "eval"]["kl"][-1]
        loss = preference_loss(
            logps,
            ref_logps,
            objective="kto",
            labels=torch.as_tensor(inputs["label"], dtype=torch.bool, device=logps.device),
            baselines=torch.full_like(logps, baseline, requires_grad=False),
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        ).loss
        return _finished(self, loss, policy.results[place], out, return_outputs)

    return _compute_loss


def _knows_kto(trainer: Any) -> bool:
    """Where adapters are switched off for the reference, its log-probabilities are not seen."""
    reference = trainer.precompute_ref_logps or trainer.ref_model is not None
    return reference and trainer.loss_type in ("kto", "apo_zero_unpaired")


def _logps(outputs: Any, mask: Tensor) -> Tensor:
    """[B, T - 1] of a mask [B, T] of answers: TRL's output, which is 0 outside of them. Virtual
    tokens of adapters come before."""
    return outputs.log_probs[:, 1 - mask.shape[1] :]


def _finished(trainer: Any, loss: Tensor, outputs: Any, out: Any, return_outputs: bool) -> Any:
    """TRL's result with this loss, and with the balance of experts."""
    if trainer.aux_loss_enabled:
        loss = loss + trainer.router_aux_loss_coef * outputs.aux_loss
    return (loss, out[1]) if return_outputs else loss
