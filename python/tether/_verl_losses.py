"""verl's policy losses in tether's words. Reads verl's settings, imports nothing of it.

What verl clamps for safety is clamped: the log-ratio of `vanilla` and `sapo` to +-20, of `gspo`'s
answers to 10, where the gradient ends; the ratio of `cispo` and `dppo` from below to e^-20.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tether._peer_batch import Batch, Metrics, clips, clips_of, row_of_choice
from tether.batch_weights import batch_weights
from tether.policy import Normalizer, policy_loss
from tether.surrogate import Surrogate

_TOKENS, _ANSWERS = (-20.0, 20.0), (-math.inf, 10.0)  # bounds of log-ratios
_RATIO_MIN = math.exp(_TOKENS[0])


class Settings(NamedTuple):
    """verl's actor config, as far as losses read it."""

    low: float
    high: float
    dual: float
    config: Any

    @classmethod
    def of(cls, config: Any) -> Settings:
        low, high = (config.get(f"clip_ratio_{side}") for side in ("low", "high"))
        low, high = (config.clip_ratio if each is None else each for each in (low, high))
        return cls(float(low), float(high), float(config.get("clip_ratio_c", 3.0)), config)

    @property
    def epsilons(self) -> dict[str, float]:
        return clips(self.low, self.high)

    def of_loss(self, name: str, zero: bool = False) -> float:
        value = self.config.policy_loss.get(name)
        if value is None or not (value > 0 or (zero and value == 0)):
            rule = "at least 0" if zero else "positive"
            raise ValueError(f"tether.verl: policy_loss.{name} must be {rule}, got {value}")
        return float(value)


# ---- the denominators ----------------------------------------------------------------------------

_AGGREGATIONS = {  # verl's mode: ours, and the denominator that it needs
    "token-mean": ("token_mean", "batch_num_tokens"),
    "token-sum": ("token_sum", None),
    "seq-mean-token-sum": ("sequence_mean_token_sum", "global_batch_size"),
    "seq-mean-token-sum-norm": ("sequence_sum_over_constant", "global_batch_size"),
    "seq-mean-token-mean": ("sequence_mean_token_mean", "global_batch_size"),
}


def aggregation(mode: str, step: Mapping[str, Any], batch: Batch) -> dict[str, Any]:
    """Arguments of policy_loss for a loss_agg_mode and a global_batch_info."""
    rows, columns = batch.response_mask.shape
    if mode == "rows":  # geo_mean's: all of the batch, empty ones too
        return {
            "aggregation": "sequence_mean_token_mean",
            "normalizer": Normalizer(sequences=rows),
        }
    if mode not in _AGGREGATIONS:
        known = ", ".join(_AGGREGATIONS)
        raise ValueError(f'tether.verl: loss_agg_mode must be one of {known}, got "{mode}"')
    name, needed = _AGGREGATIONS[mode]
    ranks = step.get("dp_size", 1)
    if needed and ranks > 1 and step.get(needed) is None:
        raise ValueError(
            f"tether.verl: {needed} must be given for {mode} with a dp_size of {ranks}, got none"
        )
    # verl looks at the count that it divides by alone.
    policy, sequences = (
        step.get(count) if needed == count else None
        for count in ("batch_num_tokens", "global_batch_size")
    )
    normalizer = Normalizer(policy=policy, sequences=sequences, world_size=ranks)
    out = {"aggregation": name, "normalizer": normalizer}
    if name == "sequence_sum_over_constant":
        constant = step.get("loss_scale_factor")
        out["constant"] = columns if constant is None else constant
    return out


# ---- the losses ----------------------------------------------------------------------------------


class Loss(NamedTuple):
    """A loss of verl's signature: what it is here, and verl's metrics from the batch and ours."""

    objective: str | Surrogate
    options: Callable[[Settings], dict[str, Any]] = lambda s: {}
    metrics: Callable[[Batch, Settings, Metrics], Metrics] = lambda b, s, values: {}
    # Log-ratios that verl clamps to these bounds, where its gradient ends.
    clamp: tuple[float, float] = (-math.inf, math.inf)
    of_answers: bool = False  # it clamps their means
    arrays: Callable[[Batch, Settings], tuple[dict[str, Tensor], Metrics]] | None = None
    aggregation: str | None = None  # of verl, whatever the setting says

    def __call__(
        self, batch: Batch, mode: str, config: Any, **options: Any
    ) -> tuple[Tensor, Metrics]:
        settings = Settings.of(config)
        arrays, metrics = self.arrays(batch, settings) if self.arrays else ({}, {})
        arguments = {
            "objective": self.objective,
            **arrays,
            **aggregation(self.aggregation or mode, config.global_batch_info, batch),
            **self.options(settings),
            **options,
        }
        loss, values = batch.loss(self.clamp, self.of_answers, **arguments)
        return loss, {**self.metrics(batch, settings, values), **metrics}


def of_catalogue(objective: str | Surrogate) -> Loss:
    """An objective of tether: the clips that it has are verl's, all else is its own."""
    row = row_of_choice("tether.verl", objective)

    def options(settings: Settings) -> dict[str, float]:
        dual = settings.dual if row.name == "ppo_dual_clip" else None
        return clips_of(row, clips(settings.low, settings.high, dual))

    return Loss(objective, options, _clips)


def _vanilla_options(settings: Settings) -> dict[str, float]:
    if not settings.dual > 1:
        raise ValueError(f"tether.verl: clip_ratio_c must be greater than 1, got {settings.dual}")
    return clips(settings.low, settings.high, settings.dual)


def _clips(batch: Batch, settings: Settings, values: Metrics) -> Metrics:
    return {
        "actor/pg_clipfrac": values["clip_fraction_low"] + values["clip_fraction_high"],
        "actor/ppo_kl": values["approx_kl_k1"],
        "actor/pg_clipfrac_lower": values["clip_fraction_dual"],
    }


def _metrics(clipped: float, kl: float, dual: float = 0.0) -> Metrics:
    return {"actor/pg_clipfrac": clipped, "actor/ppo_kl": kl, "actor/pg_clipfrac_lower": dual}


def _kl(batch: Batch) -> float:
    return batch.mean(-batch.log_ratio)


def _gspo_metrics(batch: Batch, settings: Settings, values: Metrics) -> Metrics:
    ratio = batch.mean_of_rows(batch.log_ratio).clamp(*_ANSWERS).exp()
    good, bad = batch.advantages > 0, batch.advantages < 0
    clipped = (good & (ratio > 1 + settings.high)) | (bad & (ratio < 1 - settings.low))
    return _metrics(batch.mean(clipped), _kl(batch))


def _cispo_metrics(batch: Batch, settings: Settings, values: Metrics) -> Metrics:
    d = batch.log_ratio.clamp(*_TOKENS)
    ratio = d.exp()
    clipped = (ratio < 1 - settings.low) | (ratio > 1 + settings.high)
    return _metrics(batch.mean(clipped), batch.mean(-d))


def _dppo_options(mask: str) -> Callable[[Settings], dict[str, Any]]:
    return lambda s: {
        "weights": {mask: {"low": s.low, "high": s.high}},
        "ratio_low": _RATIO_MIN,
        "ratio_high": s.dual,
    }


def _dppo_metrics(mask: str) -> Callable[[Batch, Settings, Metrics], Metrics]:
    def metrics(batch: Batch, settings: Settings, values: Metrics) -> Metrics:
        # Which tokens the mask keeps: those with a gradient, were every advantage +-1.
        with torch.enable_grad():
            logps = batch.logps.detach().requires_grad_()
            signs = torch.where(batch.advantages > 0, 1.0, -1.0)
            loss = policy_loss(
                logps,
                signs,
                batch.response_mask,
                objective=f"dppo_{mask}",
                old_logps=batch.old_logps,
                aggregation="token_sum",
                **_dppo_options(f"{mask}_mask")(settings),
            ).loss
            kept = torch.autograd.grad(loss, logps)[0] != 0
        d = batch.log_ratio.clamp(*_TOKENS)
        truncated = kept & (d.exp() > settings.dual)
        return _metrics(batch.mean(~kept), batch.mean(-d), batch.mean(truncated))

    return metrics


def _geo_mean_arrays(batch: Batch, settings: Settings) -> tuple[dict[str, Tensor], Metrics]:
    mask = batch.response_mask.bool()
    low = torch.where(mask, batch.advantages, math.inf).amin(1)
    high = torch.where(mask, batch.advantages, -math.inf).amax(1)
    if (low < high).any():
        raise ValueError(
            "tether.verl: advantages must be the same at every token of an answer for "
            "tether_geo_mean, got others"
        )
    if batch.token_weights is None:
        return {}, {}
    weights = batch.mean_of_rows((batch.token_weights + 1e-10).log()).exp()
    return {"token_weights": weights.expand(mask.shape)}, {}


def _geo_mean_metrics(batch: Batch, settings: Settings, values: Metrics) -> Metrics:
    d = batch.log_ratio
    beyond = (d < -settings.low) | (d > settings.high)
    above, below = (beyond & each for each in (batch.advantages > 0, batch.advantages < 0))
    return _metrics(batch.mean(above), _kl(batch), batch.mean(below))


def _clip_cov_arrays(batch: Batch, settings: Settings) -> tuple[dict[str, Tensor], Metrics]:
    """verl draws among the candidates, in the order of their slots, by torch's generator."""
    candidates = batch_weights(
        "clip_cov",
        **_of_batch_weights(batch),
        share=1.0,
        low=settings.config.policy_loss.clip_cov_lb,
        high=settings.config.policy_loss.clip_cov_ub,
        **settings.epsilons,
    )
    share = settings.of_loss("clip_cov_ratio")
    places = (candidates == 0).nonzero()
    if len(places) > 0:
        count = max(int(share * batch.response_mask.sum().item()), 1)
        places = places[torch.randperm(len(places))[:count].to(places.device)]
    picks = torch.ones_like(candidates)
    picks[places[:, 0], places[:, 1]] = 0
    weights = {"token_weights": _times(picks, batch.token_weights)}
    return weights, {"actor/pg_clipfrac": batch.mean(picks == 0)}


def _kl_cov_arrays(batch: Batch, settings: Settings) -> tuple[dict[str, Tensor], Metrics]:
    share = settings.of_loss("kl_cov_ratio")
    picks = batch_weights("kl_cov", **_of_batch_weights(batch), share=share)
    return {"kl_weights": _times(picks, batch.token_weights)}, {}


def _of_batch_weights(batch: Batch) -> dict[str, Tensor]:
    arrays = batch._asdict()
    del arrays["token_weights"]
    return arrays | {"logps": batch.logps.detach()}


def _times(weights: Tensor, others: Tensor | None) -> Tensor:
    return weights if others is None else weights * others


LOSSES = {
    "vanilla": Loss(
        "verl.vanilla",
        _vanilla_options,
        _clips,
        _TOKENS,
    ),
    "gspo": Loss("verl.gspo", lambda s: s.epsilons, _gspo_metrics, _ANSWERS, of_answers=True),
    "sapo": Loss(
        "verl.sapo",
        lambda s: {"tau_pos": s.config.tau_pos, "tau_neg": s.config.tau_neg},
        lambda b, s, values: _metrics(0.0, values["approx_kl_k1"]),
        _TOKENS,
        aggregation="seq-mean-token-mean",
    ),
    "gpg": Loss("verl.gpg"),
    "geo_mean": Loss(
        "verl.geo_mean",
        lambda s: {"log_ratio_low": s.low, "log_ratio_high": s.high},
        _geo_mean_metrics,
        arrays=_geo_mean_arrays,
        aggregation="rows",
    ),
    "dro": Loss(
        "verl.dro",
        lambda s: {"tau": s.of_loss("dro_beta")},
        lambda b, s, values: {"actor/ppo_kl": values["approx_kl_k1"]},
    ),
    "cispo": Loss(
        "verl.cispo",
        lambda s: {"ratio_low": max(1 - s.low, _RATIO_MIN), "ratio_high": 1 + s.high},
        _cispo_metrics,
    ),
    "dppo_tv": Loss("verl.dppo_tv", _dppo_options("tv_mask"), _dppo_metrics("tv")),
    "dppo_kl": Loss("verl.dppo_kl", _dppo_options("kl_mask"), _dppo_metrics("kl")),
    "clip_cov": Loss(
        "verl.clip_cov",
        lambda s: s.epsilons,
        lambda b, s, values: {"actor/ppo_kl": values["approx_kl_k1"]},
        arrays=_clip_cov_arrays,
    ),
    "kl_cov": Loss(
        "verl.kl_cov",
        lambda s: {"beta": s.of_loss("ppo_kl_coef", zero=True)},
        lambda b, s, values: {"actor/ppo_kl": b.mean(b.log_ratio.abs())},
        arrays=_kl_cov_arrays,
    ),
}
