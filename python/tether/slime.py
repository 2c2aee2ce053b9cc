"""tether's losses, advantages and rewards as the functions that slime 0.3.1 takes.

    --loss-type custom_loss --custom-loss-function-path tether.slime.policy_loss
    --custom-advantage-function-path tether.slime.compute_advantages
    --custom-reward-post-process-path tether.slime.rloo_rewards

`policy_loss` is slime's own loss by slime's settings. An objective of `tether.objectives()` takes
its place by its name, as tether.slime.dapo, and a rule of groups of `tether.advantages()` by its
name and _rewards. Log-probabilities and means over samples are slime's. Nothing of slime is
imported before a loss is called.
"""

from __future__ import annotations

import functools
import importlib
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tether._catalogue import objectives
from tether._peer_batch import clips, clips_of
from tether._trainers import check_version
from tether.advantages import advantage, advantages
from tether.policy import policy_token_losses
from tether.terms import kl_terms

__all__ = ["compute_advantages", "policy_loss"]

_OBJECTIVES = objectives()
_GROUP_RULES = {f"{name}_rewards": name for name, row in advantages().items() if row.of_groups}
_Mean = Callable[[Tensor], Tensor]
_Loss = tuple[Tensor, dict[str, Tensor]]
_Batch = dict[str, Any]


def _slime() -> Any:
    return importlib.import_module("slime.backends.megatron_utils.loss")


def __getattr__(name: str) -> Callable:
    if name in _GROUP_RULES:
        return functools.partial(_rewards, _GROUP_RULES[name])
    if name in _OBJECTIVES:
        return functools.partial(_loss, functools.partial(_of_catalogue, name))
    raise AttributeError(f"module 'tether.slime' has no attribute '{name}'")


# ---- the tokens of a micro-batch -----------------------------------------------------------------


def _offsets(rows: Sequence[Tensor]) -> Tensor:
    """Of rows one after the other. As many rows as tokens could be read in two ways: one more."""
    offsets = torch.tensor([0, *(len(row) for row in rows)], device=rows[0].device).cumsum(0)
    return torch.cat([offsets, offsets[-1:]]) if offsets[-1] == len(rows) else offsets


class _Tokens(NamedTuple):
    """Of all answers, one after the other, [N]."""

    logps: Tensor
    old: Tensor
    advantages: Tensor
    mask: Tensor
    offsets: Tensor
    entropies: Tensor
    train: list[Tensor]  # rows under the trainer's policy before the step

    @classmethod
    def of(cls, args: Namespace, batch: _Batch, logits: Tensor) -> _Tokens:
        slime = _slime()
        names = ("unconcat_tokens", "total_lengths", "response_lengths")
        _, found = slime.get_log_probs_and_entropy(
            logits,
            args=args,
            with_entropy=True,
            **{name: batch[name] for name in names},
            **slime.get_rollout_top_p_logprob_kwargs(args, batch),
        )
        rows = found["log_probs"]
        slime._maybe_capture_log_probs(batch, rows)
        logps = torch.cat(rows)
        train = batch.get("log_probs") or [row.detach() for row in rows]
        mask = torch.ones_like(logps, dtype=torch.bool, requires_grad=False)
        if slime.mpu.get_context_parallel_world_size() == 1:  # else slime's means know the pieces
            mask = torch.cat(batch["loss_masks"]) != 0
        return cls(
            logps,
            torch.cat(batch["rollout_log_probs"] if args.use_rollout_logprobs else train),
            torch.cat(batch["advantages"]),
            mask,
            _offsets(rows),
            torch.cat(found["entropy"]),
            train,
        )

    def kept(self, values: Tensor) -> Tensor:
        """0 in masked slots, which may hold anything."""
        return torch.where(self.mask, values, 0)

    def losses(self, args: Namespace, batch: _Batch, settings: dict[str, Any]) -> Tensor:
        rollout = batch.get("rollout_log_probs")
        return policy_token_losses(
            self.logps,
            self.advantages,
            self.mask,
            old_logps=self.old,
            rollout_logps=torch.cat(rollout) if rollout else None,
            offsets=self.offsets,
            weights={"opsm": {"high": args.opsm_delta}} if args.use_opsm else None,
            **settings,
        )

    def sums_of_rows(self, values: Tensor) -> Tensor:
        """Over the tokens of its row, at each slot."""
        lengths = self.offsets.diff()
        ids = torch.repeat_interleave(lengths)
        zeros = torch.zeros(len(lengths), dtype=values.dtype, device=values.device)
        return zeros.index_add(0, ids, self.kept(values))[ids]

    @property
    def counts(self) -> Tensor:
        """Tokens of the row, at least 1, at each slot."""
        return self.sums_of_rows(torch.ones_like(self.old)).clamp_min(1)


# ---- losses --------------------------------------------------------------------------------------


def policy_loss(args: Namespace, batch: _Batch, logits: Tensor, sum_of_sample_mean: _Mean) -> _Loss:
    """slime's policy loss by its settings, and its metrics."""
    return _loss(_dialect, args, batch, logits, sum_of_sample_mean)


def _dialect(args: Namespace) -> dict[str, Any]:
    if args.advantage_estimator == "cispo":
        low, high = max(1 - args.eps_clip, 0.0), 1 + args.eps_clip_high
        return {"objective": "slime.cispo", "ratio_low": low, "ratio_high": high}
    name = "gspo" if args.advantage_estimator == "gspo" else "grpo"
    own = clips(args.eps_clip, args.eps_clip_high, args.eps_clip_c)
    return {"objective": f"slime.{name}", **own}


def _of_catalogue(name: str, args: Namespace) -> dict[str, Any]:
    """slime's clips where the objective has such and they are not off; all else is its own."""
    dual = args.eps_clip_c if name == "ppo_dual_clip" else None
    own = clips(args.eps_clip, args.eps_clip_high, dual)
    return {"objective": name, **clips_of(_OBJECTIVES[name], own)}


def _check_parallel(args: Namespace, settings: dict[str, Any]) -> None:
    """What looks at whole answers has none where each rank has pieces."""
    ranks = _slime().mpu.get_context_parallel_world_size()
    name = settings["objective"]
    row = _OBJECTIVES[name.removeprefix("slime.")]
    levels = {row.choices["level"].default, *row.weights.values()}
    if ranks > 1 and (levels != {"token"} or args.use_opsm):
        what = "use_opsm" if levels == {"token"} else name
        raise ValueError(
            f"tether.slime: context_parallel_size must be 1 for {what}, which looks at whole "
            f"answers, got {ranks}"
        )


def _loss(
    settings_of: Callable[[Namespace], dict[str, Any]],
    args: Namespace,
    batch: _Batch,
    logits: Tensor,
    sum_of_sample_mean: _Mean,
) -> _Loss:
    check_version("slime")
    settings = settings_of(args)
    _check_parallel(args, settings)
    tokens = _Tokens.of(args, batch, logits)
    terms = tokens.losses(args, batch, settings)
    mean, masks, corrections = sum_of_sample_mean, batch["loss_masks"], {}
    if args.use_tis or args.get_mismatch_metrics:
        terms, masks, corrections = _corrected(args, batch, tokens, terms)
        mean = _mean_over(args, batch, masks, mean)
    parts = {
        "pg_loss": _reducer(args, batch, masks, mean)(terms),
        "entropy_loss": mean(tokens.kept(tokens.entropies)),
    }
    loss = parts["pg_loss"] - args.entropy_coef * parts["entropy_loss"]
    shown = _shown(args, batch, tokens)
    parts |= {name: mean(tokens.kept(each)) for name, each in shown.items()}
    if args.use_kl_loss:
        parts["kl_loss"] = mean(_penalty(args, batch, tokens))
        loss = loss + args.kl_loss_coef * parts["kl_loss"]
    parts |= {name: sum_of_sample_mean(tokens.kept(each)) for name, each in corrections.items()}
    if args.use_opsm:
        parts["opsm_clipfrac"] = _masked_answers(args, tokens)
    if tokens.logps.numel() == 0:  # so that backward runs on every rank
        loss = loss + 0 * logits.sum()
    return loss, {name: each.detach() for name, each in {"loss": loss, **parts}.items()}


def _corrected(
    args: Namespace, batch: _Batch, tokens: _Tokens, terms: Tensor
) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """Terms with the weights of trainer to engine, by slime's rule or a function of the user, which
    may change masks; and what is shown of it."""
    masks, shown = batch["loss_masks"], {"ois": (-_kl(args, tokens)).exp()}
    if args.custom_tis_function_path is None:
        tis = (torch.cat(tokens.train) - torch.cat(batch["rollout_log_probs"])).exp()
        weights = tis.clamp(args.tis_clip_low, args.tis_clip)
        clipped = (weights != tis).to(tis.dtype)
        shown |= {"tis": tis, "tis_clipfrac": clipped, "tis_abs": (tis - 1).abs()}
        return tokens.kept(terms * weights), masks, shown
    function = _slime().load_function(args.custom_tis_function_path)
    terms, masks, more = function(
        args=args,
        pg_loss=terms,
        train_log_probs=tokens.train,
        rollout_log_probs=batch["rollout_log_probs"],
        loss_masks=masks,
        total_lengths=batch["total_lengths"],
        response_lengths=batch["response_lengths"],
    )
    return terms, masks, {**shown, **more}


def _mean_over(args: Namespace, batch: _Batch, masks: list[Tensor], mean: _Mean) -> _Mean:
    """Of other masks, over the old counts."""
    if masks is batch["loss_masks"]:
        return mean
    lengths = (batch["total_lengths"], batch["response_lengths"])
    counts = batch["rollout_mask_sums"]
    return _slime().get_sum_of_sample_mean(*lengths, masks, counts, args.calculate_per_token_loss)


def _reducer(args: Namespace, batch: _Batch, masks: list[Tensor], mean: _Mean) -> _Mean:
    path = getattr(args, "custom_pg_loss_reducer_function_path", None)
    if path is None:
        return mean
    lengths = (batch["total_lengths"], batch["response_lengths"])
    return _slime().load_function(path)(*lengths, masks, args.calculate_per_token_loss)


def _penalty(args: Namespace, batch: _Batch, tokens: _Tokens) -> Tensor:
    """The KL to the reference at each token."""
    bounded = args.kl_loss_type == "low_var_kl"  # by 10, the ratio's weight included
    terms = kl_terms(
        tokens.logps,
        torch.cat(batch["ref_log_probs"]),
        tokens.mask,
        kl_estimator="k3" if bounded else args.kl_loss_type,
        kl_correction="ratio" if args.use_unbiased_kl else "none",
        old_logps=tokens.old if args.use_unbiased_kl else None,
        offsets=tokens.offsets,
        allow_biased_gradient=True,
    )
    return terms.clamp(-10, 10) if bounded else terms


# ---- metrics -------------------------------------------------------------------------------------


def _kl(args: Namespace, tokens: _Tokens) -> Tensor:
    """slime's log-ratios of old to new, of gspo the mean of the answer."""
    kl = tokens.old - tokens.logps.detach()
    of_answers = args.advantage_estimator == "gspo"
    return tokens.sums_of_rows(kl) / tokens.counts if of_answers else kl


def _shown(args: Namespace, batch: _Batch, tokens: _Tokens) -> dict[str, Tensor]:
    kl = _kl(args, tokens)
    ratio = (-kl).exp()
    held = ratio.clamp(1 - args.eps_clip, 1 + args.eps_clip_high)
    clipped = held * tokens.advantages < ratio * tokens.advantages
    if args.advantage_estimator == "cispo":
        clipped = held != ratio
    out = {"pg_clipfrac": clipped.to(kl.dtype), "ppo_kl": kl}
    if batch.get("rollout_log_probs"):
        compared = tokens.logps.detach() if args.use_rollout_logprobs else tokens.old
        gap = (compared - torch.cat(batch["rollout_log_probs"])).abs()
        out["train_rollout_logprob_abs_diff"] = gap
    if batch.get("opd_reverse_kl"):
        out["opd_reverse_kl"] = torch.cat(batch["opd_reverse_kl"])
    return out


def _masked_answers(args: Namespace, tokens: _Tokens) -> Tensor:
    """opsm_clipfrac: of each answer its slots that opsm masks, over its tokens."""
    far = tokens.sums_of_rows(tokens.old - tokens.logps.detach()) / tokens.counts > args.opsm_delta
    return ((far & (tokens.advantages < 0)) / tokens.counts).sum()


# ---- advantages and rewards ----------------------------------------------------------------------


def compute_advantages(args: Namespace, rollout_data: _Batch) -> None:
    """slime's advantages and returns by `advantage_estimator`, put into rollout_data.

    In float64 inside. Whitening and distillation come after it, as in slime.
    """
    check_version("slime")
    kl, kind = rollout_data["kl"], args.advantage_estimator
    rewards = [torch.full_like(x, r) for x, r in zip(kl, rollout_data["rewards"], strict=True)]
    if kind in ("ppo", "reinforce_plus_plus"):
        ranks = _slime().mpu.get_context_parallel_world_size()
        if ranks > 1:
            raise ValueError(
                f"tether.slime: context_parallel_size must be 1 for {kind}, whose advantages look "
                f"at whole answers, got {ranks}"
            )
        found, returns = _of_returns(args, rollout_data, rewards)
    else:
        if kind == "reinforce_plus_plus_baseline":
            rewards = [r - args.kl_coef * x for r, x in zip(rewards, kl, strict=True)]
        elif kind not in ("grpo", "gspo", "cispo"):
            known = "cispo, grpo, gspo, ppo, reinforce_plus_plus or reinforce_plus_plus_baseline"
            raise ValueError(f'tether.slime: advantage_estimator must be {known}, got "{kind}"')
        found, returns = rewards, list(rewards)
    rollout_data["advantages"], rollout_data["returns"] = found, returns


def _of_returns(
    args: Namespace, rollout_data: _Batch, rewards: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The answer's reward at its end, the penalty at every token; masked slots are steps too."""
    kl, masks = rollout_data["kl"], rollout_data["loss_masks"]
    of_critic = args.advantage_estimator == "ppo"
    steps = []
    for x, mask, reward in zip(kl, masks, rewards, strict=True):
        kept = torch.ones_like(mask) if of_critic else mask
        step = torch.where(kept != 0, -args.kl_coef * x, 0)
        last = int(kept.nonzero()[-1])
        step[last] += reward[last]
        steps.append(step)
    lengths, offsets = [len(step) for step in steps], _offsets(steps)
    tokens = torch.cat(steps)
    batch = {"response_mask": torch.ones_like(tokens, dtype=torch.bool), "offsets": offsets}
    if of_critic:
        batch |= {"values": torch.cat(rollout_data["values"]), "lambda_": args.lambd}
    found = advantage("gae" if of_critic else "returns", tokens, gamma=args.gamma, **batch)
    return tuple(list(each.split(lengths)) for each in found)


def _rewards(rule: str, args: Namespace, samples: Sequence[Any]) -> tuple[list[float], list[float]]:
    """Rewards of answers, raw and compared with those of their group."""
    check_version("slime")
    raw = [sample.get_reward_value(args) for sample in samples]
    if any(sample.group_index is None for sample in samples):
        raise ValueError(f"tether.slime: group_index must be given for {rule}_rewards, got none")
    lengths = torch.tensor([sample.response_length for sample in samples])
    groups = torch.tensor([sample.group_index for sample in samples])
    rewards = torch.tensor(raw, dtype=torch.float64)
    out = advantage(
        rule, rewards, groups=groups, lengths=lengths if rule == "opo" else None
    ).advantages
    return raw, out.tolist()
