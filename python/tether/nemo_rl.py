"""tether's losses in the classes of NeMo-RL 0.6.0.

    import tether.nemo_rl

    tether.nemo_rl.patch()  # before the trainer builds its loss; or pass tether.nemo_rl's own

ClippedPGLossFn and DPOLossFn keep their configs, arguments and metrics; the loss is tether's. An
entry `tether` of ClippedPGLossFn's config, {"objective": "topr", ...}, takes the surrogate's place.
`import tether` alone never imports NeMo-RL.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tether import reference
from tether._peer_batch import check_choice, clips, clips_of, row_of_choice
from tether._trainers import check_version, module_of, rebind
from tether.policy import Normalizer, policy_loss
from tether.preference import preference_loss
from tether.terms import aggregate, kl_terms

__all__ = ["ClippedPGLossFn", "DPOLossFn", "patch", "unpatch"]

nemo = module_of("nemo_rl", "nemo_rl.algorithms.loss.loss_functions")
_KL = {"k1": reference.k1, "k2": reference.k2, "k3": reference.k3}
_TINY = 1e-8  # that NeMo-RL adds to every denominator
_SETTINGS = {
    "ClippedPGLossFn": {
        "disable_ppo_ratio",
        "force_on_policy_ratio",
        "kl_input_clamp_value",
        "kl_output_clamp_value",
        "loss_type",
        "metric_normalizations",
        "positive_example_nll_weight",
        "ratio_clip_c",
        "ratio_clip_max",
        "ratio_clip_min",
        "reference_policy_kl_penalty",
        "reference_policy_kl_type",
        "sequence_level_importance_ratios",
        "truncated_importance_sampling_ratio",
        "truncated_importance_sampling_ratio_min",
        "truncated_importance_sampling_type",
        "use_cispo",
        "use_fused_linear_logprobs",
        "use_importance_sampling_correction",
        "use_on_policy_kl_approximation",
    },
    "DPOLossFn": {
        "preference_average_log_probs",
        "preference_loss_weight",
        "reference_policy_kl_penalty",
        "sft_average_log_probs",
        "sft_loss",
        "sft_loss_weight",
        "use_fused_linear_logprobs",
    },
}


def _check_settings(loss: Any) -> None:
    """NeMo-RL's main branch moves on under one version: a setting that is new is refused."""
    name = type(loss).__name__
    new = sorted(vars(loss).keys() - _SETTINGS[name])
    if new:
        raise ValueError(f"tether.nemo_rl: settings of {name} must be known, got {', '.join(new)}")


def _to_dict(numbers: Mapping[str, Tensor]) -> dict[str, float]:
    """The one synchronisation with a device."""
    values = torch.stack([each.double() for each in numbers.values()]).tolist()
    return dict(zip(numbers, values, strict=True))


# ---- policy losses -------------------------------------------------------------------------------


class _Arrays:
    """Of a micro-batch, in the places of the log-probabilities, [B, T]."""

    def __init__(self, loss: ClippedPGLossFn, logps: Tensor, data: Mapping[str, Tensor]):
        self.logps = logps
        self.now = logps.detach()
        self.advantages = data["advantages"][:, 1:]
        self.engine = data["generation_logprobs"][:, 1:]
        self.old = self.now if loss.force_on_policy_ratio else data["prev_logprobs"][:, 1:]
        self.tokens = data["token_mask"][:, 1:]
        self.samples = data["sample_mask"]
        self.mask = (self.tokens * self.samples[:, None]).to(logps.dtype)

    def sum(self, values: Tensor) -> Tensor:
        """Over tokens; masked slots may hold anything."""
        return torch.where(self.mask > 0, values * self.mask, 0).sum()

    def mean_of_rows(self, values: Tensor) -> Tensor:
        """[B, 1], as NeMo-RL takes it: of all tokens of a row, of a sample that is taken or not."""
        kept = torch.where(self.tokens > 0, values * self.tokens, 0)
        return kept.sum(1, keepdim=True) / (self.tokens.sum(1, keepdim=True) + _TINY)


class ClippedPGLossFn(nemo.ClippedPGLossFn):
    __doc__ = nemo.ClippedPGLossFn.__doc__

    def __init__(self, cfg: Any, *arguments: Any, **settings: Any):
        check_version("nemo_rl")
        super().__init__(cfg, *arguments, **settings)
        _check_settings(self)
        high = self.truncated_importance_sampling_ratio
        if high is not None and self.truncated_importance_sampling_type is None:
            raise ValueError(
                "tether.nemo_rl: truncated_importance_sampling_type must be given with "
                f"truncated_importance_sampling_ratio, got a ratio of {high} and none"
            )
        self.choice = dict(getattr(cfg, "tether", {}))
        if self.choice:
            if "objective" not in self.choice:
                raise ValueError("tether.nemo_rl: objective must be given in tether, got none")
            objective = self.choice.pop("objective")
            objective, options = check_choice("tether.nemo_rl", "NeMo-RL", objective, self.choice)
            self.choice = {"objective": objective, **options}

    def __call__(
        self,
        next_token_logprobs: Tensor,
        data: Mapping[str, Tensor],
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor,
    ) -> tuple[Tensor, dict[str, Any]]:
        """The loss of a micro-batch, and NeMo-RL's metrics."""
        arrays = _Arrays(self, next_token_logprobs, data)
        counts = {"tokens": global_valid_toks + _TINY, "samples": global_valid_seqs + _TINY}
        mean = self._mean(counts)
        weights, outside = self._importance(arrays)
        correct = self.use_importance_sampling_correction
        loss = policy_loss(
            arrays.logps,
            arrays.advantages,
            arrays.mask,
            old_logps=arrays.old,
            rollout_logps=arrays.engine,
            token_weights=weights.expand_as(arrays.mask) if correct else None,
            **{"beta": 0.0, **self._surrogate()},
            **mean,
        ).loss
        terms = self._terms(arrays, data, mean)
        numbers = {name: each.detach() for name, each in terms.items()}
        loss = loss + self.reference_policy_kl_penalty * terms["kl_penalty"]
        loss = loss + self.positive_example_nll_weight * terms["positive_nll_loss"]
        numbers["loss"] = loss.detach()
        return loss, self._metrics(arrays, counts, numbers, weights, outside)

    def _terms(
        self, arrays: _Arrays, data: Mapping[str, Tensor], mean: dict[str, Any]
    ) -> dict[str, Tensor]:
        """What the loss has beside the surrogate, 0 where it is off, without coefficients."""
        nothing = arrays.now.new_zeros(())
        terms = {"kl_penalty": nothing, "positive_nll_loss": nothing}
        if self.reference_policy_kl_penalty != 0:
            terms["kl_penalty"] = self._penalty(arrays, data, mean)
        if self.positive_example_nll_weight > 0 and "rewards" in data:
            good = arrays.mask * (data["rewards"] > 0)[:, None]
            normalizer = Normalizer(policy=good.sum(dtype=arrays.tokens.dtype) + _TINY)
            terms["positive_nll_loss"] = aggregate(-arrays.logps, good, normalizer=normalizer)
        return terms

    def _surrogate(self) -> dict[str, Any]:
        """A dialect and its options, or the user's choice. Where every ratio is 1 nothing clips."""
        low, high = min(self.ratio_clip_min, 1.0), self.ratio_clip_max
        if self.choice:
            row = row_of_choice("tether.nemo_rl", self.choice["objective"])
            return {**clips_of(row, clips(low, high)), **self.choice}
        if self.force_on_policy_ratio:
            return {"objective": "nemo_rl.grpo"}
        if self.disable_ppo_ratio:
            return {"objective": "nemo_rl.reinforce"}
        if self.use_cispo:
            return {"objective": "nemo_rl.cispo", "ratio_low": 1 - low, "ratio_high": 1 + high}
        name = "gspo" if self.sequence_level_importance_ratios else "grpo"
        return {"objective": f"nemo_rl.{name}", **clips(low, high, self.ratio_clip_c)}

    def _mean(self, counts: Mapping[str, Tensor]) -> dict[str, Any]:
        """Arguments of policy_loss and aggregate."""
        if self.loss_type == nemo.LossType.TOKEN_LEVEL:
            normalizer = Normalizer(policy=counts["tokens"])
            return {"aggregation": "token_mean", "normalizer": normalizer}
        return {
            "aggregation": "sequence_mean_token_mean",
            "normalizer": Normalizer(sequences=counts["samples"]),
        }

    def _importance(self, arrays: _Arrays) -> tuple[Tensor, Tensor | None]:
        """The actor's weights, of tokens or of rows [B, 1], and which are outside of the bounds."""
        d = arrays.old - arrays.engine
        if self.sequence_level_importance_ratios:
            d = torch.where(arrays.mask > 0, d * arrays.mask, 0).sum(1, keepdim=True)
        weights = torch.nan_to_num(d.exp(), nan=0.0, posinf=0.0, neginf=0.0)
        low, high = (
            self.truncated_importance_sampling_ratio_min or 0.0,
            self.truncated_importance_sampling_ratio,
        )
        kind = self.truncated_importance_sampling_type
        if kind is None:
            return weights, None
        measured = weights
        if kind == "seq-mask-tis":
            d = torch.nan_to_num(d, nan=0.0, posinf=0.0, neginf=0.0)
            measured = arrays.mean_of_rows(d).exp()
        outside = (measured < low) | (measured > high)
        if kind == "tis":
            return weights.clamp(low, high), outside
        return torch.where(outside, 0, weights), outside

    def _penalty(self, arrays: _Arrays, data: Mapping[str, Tensor], mean: dict[str, Any]) -> Tensor:
        """The mean KL to the reference; beyond NeMo-RL's clamps it is constant."""
        logps = data.get("curr_logprobs_unfiltered", arrays.logps)
        ref = data["reference_policy_logprobs"][:, 1:]
        engine = arrays.engine if self.use_on_policy_kl_approximation else None
        if self.kl_input_clamp_value is not None:
            now = logps.detach()
            d = (ref - now).clamp(-self.kl_input_clamp_value, self.kl_input_clamp_value)
            beyond = d != ref - now
            logps, ref = torch.where(beyond, 0, logps), torch.where(beyond, d, ref)
            engine = None if engine is None else torch.where(beyond, engine - now, engine)
        terms = kl_terms(
            logps,
            ref,
            arrays.mask,
            kl_estimator=self.reference_policy_kl_type,
            kl_correction="on_policy" if engine is None else "rollout_ratio",
            rollout_logps=engine,
            allow_biased_gradient=True,
        )
        if self.kl_output_clamp_value is not None:
            terms = terms.clamp(-self.kl_output_clamp_value, self.kl_output_clamp_value)
        return aggregate(terms, arrays.mask, **mean)

    def _ratios(self, arrays: _Arrays) -> tuple[Tensor, Tensor]:
        """What NeMo-RL reports as such, and clipped."""
        if self.force_on_policy_ratio:
            return (torch.ones_like(arrays.now),) * 2
        if self.disable_ppo_ratio:
            return arrays.now, arrays.now
        d = arrays.now - arrays.old
        if self.sequence_level_importance_ratios:
            d = arrays.mean_of_rows(d).expand_as(d)
        ratio = d.exp()
        return ratio, ratio.clamp(1 - self.ratio_clip_min, 1 + self.ratio_clip_max)

    def _metrics(
        self,
        arrays: _Arrays,
        counts: Mapping[str, Tensor],
        numbers: dict[str, Tensor],
        weights: Tensor,
        outside: Tensor | None,
    ) -> dict[str, float]:
        old, engine, form = arrays.old, arrays.engine, _KL[self.reference_policy_kl_type]
        mixture = torch.logaddexp(old, engine) - math.log(2)
        means = {
            "token_mult_prob_error": ((engine - old).abs() * arrays.mask).exp(),
            "gen_kl_error": form(old - engine),
            "policy_kl_error": form(engine - old),
            "js_divergence_error": (_KL["k3"](old - mixture) + _KL["k3"](engine - mixture)) / 2,
            "approx_entropy": -(arrays.now - engine).exp() * arrays.now,
            "sampling_importance_ratio": weights,
        }
        for name, ratio in zip(("", "_clamped"), self._ratios(arrays), strict=True):
            means[f"probs_ratio{name}"] = ratio
            kept = arrays.mask > 0
            numbers[f"probs_ratio{name}_min"] = torch.where(kept, ratio, math.inf).amin()
            numbers[f"probs_ratio{name}_max"] = torch.where(kept, ratio, -math.inf).amax()
        numbers |= {name: arrays.sum(each) / counts["tokens"] for name, each in means.items()}
        if self.sequence_level_importance_ratios:
            kept = (weights[:, 0] * arrays.samples).sum()
            numbers["sampling_importance_ratio"] = kept / counts["samples"]
        numbers["num_valid_samples"] = arrays.samples.sum()
        if outside is not None:
            share = arrays.sum(outside) / counts["tokens"]
            if self.truncated_importance_sampling_type == "seq-mask-tis":
                share = (outside[:, 0] * arrays.samples).sum() / counts["samples"]
            numbers["is_oob_ratio"] = share
        return _to_dict(numbers)


# ---- preference losses ---------------------------------------------------------------------------


def _chosen_first(rows: Tensor) -> Tensor:
    """NeMo-RL's pairs are neighbours."""
    return torch.cat([rows[::2], rows[1::2]])


class DPOLossFn(nemo.DPOLossFn):
    __doc__ = nemo.DPOLossFn.__doc__

    def __init__(self, *arguments: Any, **settings: Any):
        check_version("nemo_rl")
        super().__init__(*arguments, **settings)
        _check_settings(self)

    def __call__(
        self,
        next_token_logprobs: Tensor,
        data: Mapping[str, Tensor],
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor | None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """The loss of a micro-batch, and NeMo-RL's metrics."""
        logps = _chosen_first(next_token_logprobs)
        ref_logps = _chosen_first(data["reference_policy_logprobs"][:, :-1])
        samples = _chosen_first(data["sample_mask"]).to(logps.dtype)
        tokens = _chosen_first(data["token_mask"][:, 1:]).to(logps.dtype)
        kept, _ = samples.chunk(2)  # the chosen answer's says whether a pair is taken
        mask = tokens * kept.repeat(2)[:, None]
        pairs = global_valid_seqs / 2 + _TINY
        preference = preference_loss(
            logps,
            ref_logps,
            mask,
            answer_weights=torch.cat([kept, torch.ones_like(kept)]),
            pairs=pairs,
            beta=self.reference_policy_kl_penalty,
            score="mean" if self.preference_average_log_probs else "sum",
        ).loss
        likelihood = preference.new_zeros(())
        if self.sft_loss_weight > 0:
            name = "token_mean" if self.sft_average_log_probs else "token_sum"
            likelihood = aggregate(
                -logps[: len(kept)],
                mask[: len(kept)],
                f"sequence_mean_{name}",
                normalizer=Normalizer(sequences=pairs),
            )
        loss = self.preference_loss_weight * preference + self.sft_loss_weight * likelihood
        numbers = {"loss": loss, "sft_loss": likelihood, "preference_loss": preference}
        numbers = {name: each.detach() for name, each in numbers.items()}
        return loss, _to_dict(numbers | self._means(logps - ref_logps, tokens, samples, pairs))

    def _means(
        self, log_ratios: Tensor, tokens: Tensor, samples: Tensor, pairs: Tensor
    ) -> dict[str, Tensor]:
        """Of rewards, over pairs."""
        rewards = torch.where(tokens > 0, log_ratios.detach() * tokens, 0).sum(1)
        if self.preference_average_log_probs:
            rewards = rewards / tokens.sum(1).clamp(min=1)
        (good, bad), (of_good, of_bad) = rewards.chunk(2), samples.chunk(2)
        return {
            "accuracy": ((good > bad) * of_good).sum() / pairs,
            "rewards_chosen_mean": (good * of_good).sum() / pairs,
            "rewards_rejected_mean": (bad * of_bad).sum() / pairs,
            "num_valid_samples": samples.sum() / 2,
        }


# ---- in place of NeMo-RL's -----------------------------------------------------------------------

_OURS = {"ClippedPGLossFn": ClippedPGLossFn, "DPOLossFn": DPOLossFn}


def patch() -> None:
    """Puts tether's classes in the place of NeMo-RL's, in every module that has bound their names.

    Call it in the process that builds the loss; where it is called, tether must be installed too.
    Patching twice is patching once. RuntimeError for a version that is not known.
    """
    check_version("nemo_rl")
    for name, ours in _OURS.items():
        rebind("nemo_rl", name, ours.__base__, ours)


def unpatch() -> None:
    """Takes back what `patch` did. Losses that were built in between stay."""
    for name, ours in _OURS.items():
        rebind("nemo_rl", name, ours, ours.__base__)
