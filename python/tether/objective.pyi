# Written by tools/typed_stubs.py.
"""Objectives with their options as frozen dataclasses, which editors complete and mypy checks."""

from dataclasses import dataclass
from math import inf
from typing import Literal, TypeAlias

from tether._checks import Number as Number
from tether._typed import Chosen as Chosen

Level: TypeAlias = Literal[
    "token",
    "sequence_mean",
    "sequence_token",
    "sequence_sum",
    "turn_mean",
    "turn_token",
    "turn_sum",
]
Aggregation: TypeAlias = Literal[
    "token_mean",
    "sequence_mean_token_mean",
    "sequence_mean_token_sum",
    "sequence_sum_over_constant",
    "token_sum",
]
KlEstimator: TypeAlias = Literal[
    "k1",
    "k2",
    "k3",
    "low_var_kl",
    "abs",
]
KlGradient: TypeAlias = Literal[
    "k1",
    "k2",
    "k3",
    "low_var_kl",
    "abs",
]
KlCorrection: TypeAlias = Literal[
    "none",
    "ratio",
    "detached_ratio",
    "level_ratio",
    "detached_level_ratio",
    "on_policy",
    "rollout_ratio",
    "detached_rollout_ratio",
]
KlReference: TypeAlias = Literal[
    "reference",
    "old",
    "rollout",
]
Score: TypeAlias = Literal[
    "sum",
    "mean",
]
Link: TypeAlias = Literal[
    "reverse_kl",
    "forward_kl",
    "js",
    "alphapo",
    "log_odds",
]
NllMean: TypeAlias = Literal[
    "token",
    "sequence_mean",
    "sequence_sum",
]

@dataclass(frozen=True, kw_only=True)
class PolicyObjective(Chosen):
    """What all policy objectives have."""

    log_ratio_low: Number = inf
    log_ratio_high: Number = inf
    beta: Number = 0
    kl_ratio_high: Number = inf
    entropy_coef: Number = 0
    constant: Number = 1
    level: Level = "token"
    aggregation: Aggregation = "token_mean"
    kl_estimator: KlEstimator = "k3"
    kl_gradient: KlGradient = "k3"
    kl_correction: KlCorrection = "none"
    kl_reference: KlReference = "reference"
    allow_biased_gradient: bool = False

@dataclass(frozen=True, kw_only=True)
class PreferenceObjective(Chosen):
    """What all preference objectives have."""

    beta: Number = 0.1
    loss_weight: Number = 1
    nll_coef: Number = 0
    ld_alpha: Number = 1
    link_alpha: Number = 0.25
    score: Score = "sum"
    reference: bool = True
    link: Link = "reverse_kl"
    nll_mean: NllMean = "token"

@dataclass(frozen=True, kw_only=True)
class ValueObjective(Chosen):
    """What all value objectives have."""

    constant: Number = 1
    aggregation: Aggregation = "token_mean"

@dataclass(frozen=True, kw_only=True)
class Ppo(PolicyObjective):
    """token mean of -min(ratio A, clip(ratio, 1 - epsilon_low, 1 + epsilon_high) A).
    arXiv:1707.06347, eq. 7.
    """

    epsilon_low: Number = 0.2
    epsilon_high: Number = 0.2
    dual_clip: Number = inf

@dataclass(frozen=True, kw_only=True)
class PpoDualClip(PolicyObjective):
    """ppo; where A < 0 at most -dual_clip A, dual_clip 3. arXiv:1912.09729, eq. 5."""

    epsilon_low: Number = 0.2
    epsilon_high: Number = 0.2
    dual_clip: Number = 3

@dataclass(frozen=True, kw_only=True)
class Grpo(PolicyObjective):
    """sequence mean, then batch mean of the clipped surrogate + beta k3. arXiv:2402.03300, eq.
    3.
    """

    aggregation: Aggregation = "sequence_mean_token_mean"
    epsilon_low: Number = 0.2
    epsilon_high: Number = 0.2
    dual_clip: Number = inf

@dataclass(frozen=True, kw_only=True)
class Dapo(PolicyObjective):
    """token mean of the clipped surrogate, epsilon_high 0.28. arXiv:2503.14476, eq. 10."""

    epsilon_low: Number = 0.2
    epsilon_high: Number = 0.28
    dual_clip: Number = inf

@dataclass(frozen=True, kw_only=True)
class Bnpo(PolicyObjective):
    """mean of the clipped surrogate over the tokens of the batch. TRL, loss_type bnpo."""

    epsilon_low: Number = 0.2
    epsilon_high: Number = 0.2
    dual_clip: Number = inf

@dataclass(frozen=True, kw_only=True)
class DrGrpo(PolicyObjective):
    """mean over answers of the clipped surrogate's sum over a constant. arXiv:2503.20783,
    section 3.2.
    """

    aggregation: Aggregation = "sequence_sum_over_constant"
    epsilon_low: Number = 0.2
    epsilon_high: Number = 0.2
    dual_clip: Number = inf

@dataclass(frozen=True, kw_only=True)
class Gspo(PolicyObjective):
    """mean over answers of the clipped surrogate of exp(mean log-ratio). arXiv:2507.18071, eq.
    5.
    """

    level: Level = "sequence_mean"
    aggregation: Aggregation = "sequence_mean_token_mean"
    epsilon_low: Number = 0.0003
    epsilon_high: Number = 0.0004
    dual_clip: Number = inf

@dataclass(frozen=True, kw_only=True)
class GspoToken(PolicyObjective):
    """gspo, with the gradient through each token's own log-ratio. arXiv:2507.18071, eq. 13."""

    level: Level = "sequence_token"
    aggregation: Aggregation = "sequence_mean_token_mean"
    epsilon_low: Number = 0.0003
    epsilon_high: Number = 0.0004
    dual_clip: Number = inf

@dataclass(frozen=True, kw_only=True)
class Gmpo(PolicyObjective):
    """mean over answers of -exp(mean of clipped log-ratios) A. arXiv:2507.20673, eq. 4."""

    log_ratio_low: Number = 0.4
    log_ratio_high: Number = 0.4
    level: Level = "sequence_mean"
    aggregation: Aggregation = "sequence_mean_token_mean"
    epsilon_low: Number = 1
    epsilon_high: Number = inf
    dual_clip: Number = inf

@dataclass(frozen=True, kw_only=True)
class Cispo(PolicyObjective):
    """token mean of -sg(clip(ratio, ratio_low, ratio_high)) A logp. arXiv:2506.13585, eq. 4."""

    ratio_low: Number = 0
    ratio_high: Number = 5

@dataclass(frozen=True, kw_only=True)
class Rloo(PolicyObjective):
    """mean over answers of the clipped surrogate of exp(sum of log-ratios). arXiv:2402.14740,
    eq. 6.
    """

    level: Level = "sequence_sum"
    aggregation: Aggregation = "sequence_mean_token_mean"
    epsilon_low: Number = 0.2
    epsilon_high: Number = 0.2
    dual_clip: Number = inf

@dataclass(frozen=True, kw_only=True)
class Reinforce(PolicyObjective):
    """token mean of -A logp. Williams 1992, eq. 4."""

@dataclass(frozen=True, kw_only=True)
class Sapo(PolicyObjective):
    """sequence mean of -(4 / tau) sigmoid(tau (ratio - 1)) A, tau by the sign of A.
    arXiv:2511.20347, eq. 5.
    """

    aggregation: Aggregation = "sequence_mean_token_mean"
    tau_pos: Number = 1
    tau_neg: Number = 1.05

@dataclass(frozen=True, kw_only=True)
class Cfpo(PolicyObjective):
    """sequence mean of -ratio A + |A| (ratio - 1)^2 / (2 epsilon). arXiv:2601.22801, eq. 7."""

    aggregation: Aggregation = "sequence_mean_token_mean"
    epsilon: Number = 0.2
    power: Number = 0

@dataclass(frozen=True, kw_only=True)
class Drpo(PolicyObjective):
    """token mean of -ratio A + |A| e^old_logp (ratio - 1)^2 / (2 epsilon). arXiv:2606.09821,
    eq. 8.
    """

    epsilon: Number = 12.5
    power: Number = 1

@dataclass(frozen=True, kw_only=True)
class Luspo(PolicyObjective):
    """mean over answers of their length times the loss of gspo. arXiv:2602.05261, eq. 7."""

    level: Level = "sequence_mean"
    aggregation: Aggregation = "sequence_mean_token_sum"
    epsilon_low: Number = 0.0003
    epsilon_high: Number = 0.0004
    dual_clip: Number = inf

@dataclass(frozen=True, kw_only=True)
class Gpg(PolicyObjective):
    """token mean of -A logp. arXiv:2504.02546."""

@dataclass(frozen=True, kw_only=True)
class Linear(PolicyObjective):
    """token mean of -ratio A. arXiv:1707.06347, eq. 6."""

@dataclass(frozen=True, kw_only=True)
class Band(PolicyObjective):
    """token mean of -clip(ratio, 1 - epsilon_low, 1 + epsilon_high) A. torchrl, CISPOLoss."""

    epsilon_low: Number = 0.2
    epsilon_high: Number = 0.2

@dataclass(frozen=True, kw_only=True)
class Dro(PolicyObjective):
    """token mean of -(A logp - tau/2 u^2), u = logp - old_logp. arXiv:2405.19107, eq. 8."""

    tau: Number = 0.1

@dataclass(frozen=True, kw_only=True)
class Kimi(PolicyObjective):
    """mean over answers of -(A L - tau/2 U^2), L and U sums of logp and u. arXiv:2501.12599,
    eq. 3.
    """

    level: Level = "sequence_sum"
    aggregation: Aggregation = "sequence_mean_token_mean"
    tau: Number = 0.1

@dataclass(frozen=True, kw_only=True)
class Sppo(PolicyObjective):
    """mean over answers of (U - eta A)^2, U the sum of logp - old_logp. arXiv:2405.00675, eq.
    4.6.
    """

    level: Level = "sequence_sum"
    aggregation: Aggregation = "sequence_mean_token_mean"
    scale: Number = 1
    eta: Number = 1

@dataclass(frozen=True, kw_only=True)
class A2po(PolicyObjective):
    """mean over answers of (scale U - A)^2, old_logps the reference's. arXiv:2505.20686."""

    level: Level = "sequence_sum"
    aggregation: Aggregation = "sequence_mean_token_mean"
    scale: Number = 0.001
    eta: Number = 1

@dataclass(frozen=True, kw_only=True)
class Topr(PolicyObjective):
    """mean over answers of -A L, for A < 0 of -sg(min(ratio, ratio_high)) A L. arXiv:2503.14286."""

    level: Level = "sequence_sum"
    aggregation: Aggregation = "sequence_mean_token_mean"
    weight_pos: Number = 1
    weight_neg: Number = 1
    ratio_high: Number = 1

@dataclass(frozen=True, kw_only=True)
class DppoTv(PolicyObjective):
    """token mean of -M sg(min(ratio, ratio_high)) A logp, M of tv_mask. arXiv:2602.04879, eq.
    12.
    """

    ratio_low: Number = 0
    ratio_high: Number = 20

@dataclass(frozen=True, kw_only=True)
class DppoKl(PolicyObjective):
    """token mean of -M sg(min(ratio, ratio_high)) A logp, M of kl_mask. arXiv:2602.04879, eq.
    12.
    """

    ratio_low: Number = 0
    ratio_high: Number = 20

@dataclass(frozen=True, kw_only=True)
class Vespo(PolicyObjective):
    """token mean of -W A logp, W = rho^k e^(lambda (1 - rho)) of the answer. arXiv:2602.10693,
    eq. 20.
    """

@dataclass(frozen=True, kw_only=True)
class DecoupledPpo(PolicyObjective):
    """ppo to a proximal policy, weighed by proximal / behaviour. arXiv:2110.00641."""

    epsilon_low: Number = 0.2
    epsilon_high: Number = 0.2
    dual_clip: Number = inf

@dataclass(frozen=True, kw_only=True)
class RolloutIs(PolicyObjective):
    """token mean of -W A logp, W of masked_ratio. SkyRL, rollout_is."""

@dataclass(frozen=True, kw_only=True)
class KlCov(PolicyObjective):
    """token mean of -ratio A + beta v |log ratio|, v of kl_weights. arXiv:2505.22617, eq. 14."""

    beta: Number = 1
    kl_estimator: KlEstimator = "abs"
    kl_gradient: KlGradient = "abs"
    kl_reference: KlReference = "old"
    allow_biased_gradient: bool = True

@dataclass(frozen=True, kw_only=True)
class RecOneSide(PolicyObjective):
    """token mean of -M A logp, M of clip_mask. arXiv:2509.24203."""

@dataclass(frozen=True, kw_only=True)
class RecTwoSide(PolicyObjective):
    """token mean of -A logp where the ratio is near 1. arXiv:2509.24203."""

@dataclass(frozen=True, kw_only=True)
class RecRing(PolicyObjective):
    """token mean of -M A logp, M of ring_mask. arXiv:2509.24203."""

@dataclass(frozen=True, kw_only=True)
class Dpo(PreferenceObjective):
    """-log sigmoid(x), x = beta (log-ratio of chosen - of rejected). arXiv:2305.18290, eq. 7."""

    label_smoothing: Number = 0

@dataclass(frozen=True, kw_only=True)
class Cdpo(PreferenceObjective):
    """-log sigmoid(x) + label_smoothing x. ericmitchell.ai/cdpo.pdf."""

    label_smoothing: Number = 0.1

@dataclass(frozen=True, kw_only=True)
class Ipo(PreferenceObjective):
    """(h - 1 / (2 beta))^2, h the gap of the mean log-ratios. arXiv:2310.12036, eq. 17."""

    score: Score = "mean"

@dataclass(frozen=True, kw_only=True)
class Hinge(PreferenceObjective):
    """max(0, 1 - x). arXiv:2309.06657, eq. 9."""

@dataclass(frozen=True, kw_only=True)
class Robust(PreferenceObjective):
    """-log sigmoid(x) - e / (1 - 2 e) x, e = label_smoothing. arXiv:2403.00409."""

    label_smoothing: Number = 0.1

@dataclass(frozen=True, kw_only=True)
class ExoPair(PreferenceObjective):
    """KL(Bernoulli(sigmoid(x)) || Bernoulli(1 - label_smoothing)). arXiv:2402.00856, eq. 16."""

    label_smoothing: Number = 0.001

@dataclass(frozen=True, kw_only=True)
class NcaPair(PreferenceObjective):
    """-log sigmoid(u_c) - 1/2 log sigmoid(-u_c) - 1/2 log sigmoid(-u_r), u = beta S.
    arXiv:2402.05369.
    """

@dataclass(frozen=True, kw_only=True)
class BcoPair(PreferenceObjective):
    """-log sigmoid(u_c) - log sigmoid(-u_r). arXiv:2404.04656."""

@dataclass(frozen=True, kw_only=True)
class SppoHard(PreferenceObjective):
    """(h_c - 1 / (2 beta))^2 + (h_r + 1 / (2 beta))^2. arXiv:2405.00675, eq. 4.7."""

@dataclass(frozen=True, kw_only=True)
class ApoZero(PreferenceObjective):
    """1 - sigmoid(u_c) + sigmoid(u_r). arXiv:2408.06266, eq. 7."""

@dataclass(frozen=True, kw_only=True)
class ApoDown(PreferenceObjective):
    """sigmoid(u_c) + 1 - sigmoid(x). arXiv:2408.06266, eq. 8."""

@dataclass(frozen=True, kw_only=True)
class Discopop(PreferenceObjective):
    """(1 - m) -log sigmoid(x) + m e^-x, m = sigmoid(x / tau). arXiv:2406.08414, eq. 5."""

    tau: Number = 0.05

@dataclass(frozen=True, kw_only=True)
class Orpo(PreferenceObjective):
    """NLL of the chosen - loss_weight log sigmoid(x), x the gap of log-odds. arXiv:2403.07691,
    eq. 6.
    """

    beta: Number = 1
    loss_weight: Number = 0.1
    nll_coef: Number = 1
    score: Score = "mean"
    reference: bool = False
    link: Link = "log_odds"
    label_smoothing: Number = 0

@dataclass(frozen=True, kw_only=True)
class Kto(PreferenceObjective):
    """1 - sigmoid(u), u = +-beta (S - baseline) by the label of the answer. arXiv:2402.01306,
    eq. 8.
    """

    desirable_weight: Number = 1
    undesirable_weight: Number = 1

@dataclass(frozen=True, kw_only=True)
class ClippedSquared(ValueObjective):
    """1/2 max((V - R)^2, (clip(V, V_old -+ clip_range) - R)^2). OpenAI baselines, ppo2."""

    clip_range: Number = 0.2

@dataclass(frozen=True, kw_only=True)
class Huber(ValueObjective):
    """1/2 e^2, beyond delta linear, e = V - R. Huber 1964."""

    delta: Number = 1

@dataclass(frozen=True, kw_only=True)
class TrlGrpo(Grpo):
    """grpo with the defaults of a trainer: trl.grpo."""

@dataclass(frozen=True, kw_only=True)
class TrlBnpo(Bnpo):
    """bnpo with the defaults of a trainer: trl.bnpo."""

@dataclass(frozen=True, kw_only=True)
class TrlDrGrpo(DrGrpo):
    """dr_grpo with the defaults of a trainer: trl.dr_grpo."""

@dataclass(frozen=True, kw_only=True)
class TrlDapo(Dapo):
    """dapo with the defaults of a trainer: trl.dapo."""

    epsilon_high: Number = 0.2

@dataclass(frozen=True, kw_only=True)
class TrlCispo(Cispo):
    """cispo with the defaults of a trainer: trl.cispo."""

@dataclass(frozen=True, kw_only=True)
class TrlSapo(Sapo):
    """sapo with the defaults of a trainer: trl.sapo."""

@dataclass(frozen=True, kw_only=True)
class TrlVespo(Vespo):
    """vespo with the defaults of a trainer: trl.vespo."""

@dataclass(frozen=True, kw_only=True)
class TrlLuspo(Grpo):
    """grpo with the defaults of a trainer: trl.luspo."""

    aggregation: Aggregation = "sequence_mean_token_sum"

@dataclass(frozen=True, kw_only=True)
class TrlRloo(Rloo):
    """rloo with the defaults of a trainer: trl.rloo."""

@dataclass(frozen=True, kw_only=True)
class TrlGmpo(Gmpo):
    """gmpo with the defaults of a trainer: trl.gmpo."""

@dataclass(frozen=True, kw_only=True)
class TrlA2po(A2po):
    """a2po with the defaults of a trainer: trl.a2po."""

@dataclass(frozen=True, kw_only=True)
class VerlVanilla(PpoDualClip):
    """ppo_dual_clip with the defaults of a trainer: verl.vanilla."""

    kl_estimator: KlEstimator = "low_var_kl"
    kl_gradient: KlGradient = "low_var_kl"

@dataclass(frozen=True, kw_only=True)
class VerlGspo(GspoToken):
    """gspo_token with the defaults of a trainer: verl.gspo."""

    aggregation: Aggregation = "token_mean"
    kl_estimator: KlEstimator = "low_var_kl"
    kl_gradient: KlGradient = "low_var_kl"
    epsilon_low: Number = 0.2
    epsilon_high: Number = 0.2

@dataclass(frozen=True, kw_only=True)
class VerlSapo(Sapo):
    """sapo with the defaults of a trainer: verl.sapo."""

    kl_estimator: KlEstimator = "low_var_kl"
    kl_gradient: KlGradient = "low_var_kl"

@dataclass(frozen=True, kw_only=True)
class VerlGpg(Gpg):
    """gpg with the defaults of a trainer: verl.gpg."""

    kl_estimator: KlEstimator = "low_var_kl"
    kl_gradient: KlGradient = "low_var_kl"

@dataclass(frozen=True, kw_only=True)
class VerlGeoMean(Gmpo):
    """gmpo with the defaults of a trainer: verl.geo_mean."""

    log_ratio_low: Number = 0.2
    log_ratio_high: Number = 0.2
    kl_estimator: KlEstimator = "low_var_kl"
    kl_gradient: KlGradient = "low_var_kl"

@dataclass(frozen=True, kw_only=True)
class VerlDro(Dro):
    """dro with the defaults of a trainer: verl.dro."""

    kl_estimator: KlEstimator = "low_var_kl"
    kl_gradient: KlGradient = "low_var_kl"

@dataclass(frozen=True, kw_only=True)
class VerlCispo(Cispo):
    """cispo with the defaults of a trainer: verl.cispo."""

    kl_estimator: KlEstimator = "low_var_kl"
    kl_gradient: KlGradient = "low_var_kl"
    ratio_low: Number = 0.8
    ratio_high: Number = 1.2

@dataclass(frozen=True, kw_only=True)
class VerlDppoTv(DppoTv):
    """dppo_tv with the defaults of a trainer: verl.dppo_tv."""

    kl_estimator: KlEstimator = "low_var_kl"
    kl_gradient: KlGradient = "low_var_kl"
    ratio_low: Number = 2.061153622438558e-09
    ratio_high: Number = 3.0

@dataclass(frozen=True, kw_only=True)
class VerlDppoKl(DppoKl):
    """dppo_kl with the defaults of a trainer: verl.dppo_kl."""

    kl_estimator: KlEstimator = "low_var_kl"
    kl_gradient: KlGradient = "low_var_kl"
    ratio_low: Number = 2.061153622438558e-09
    ratio_high: Number = 3.0

@dataclass(frozen=True, kw_only=True)
class VerlClipCov(Ppo):
    """ppo with the defaults of a trainer: verl.clip_cov."""

    kl_estimator: KlEstimator = "low_var_kl"
    kl_gradient: KlGradient = "low_var_kl"

@dataclass(frozen=True, kw_only=True)
class VerlKlCov(KlCov):
    """kl_cov with the defaults of a trainer: verl.kl_cov."""

    beta: Number = 0.1

@dataclass(frozen=True, kw_only=True)
class VerlBypassMode(PpoDualClip):
    """ppo_dual_clip with the defaults of a trainer: verl.bypass_mode."""

    kl_estimator: KlEstimator = "low_var_kl"
    kl_gradient: KlGradient = "low_var_kl"

@dataclass(frozen=True, kw_only=True)
class OpenrlhfPpo(Ppo):
    """ppo with the defaults of a trainer: openrlhf.ppo."""

@dataclass(frozen=True, kw_only=True)
class OpenrlhfGspo(Gspo):
    """gspo with the defaults of a trainer: openrlhf.gspo."""

    epsilon_low: Number = 0.2
    epsilon_high: Number = 0.2

@dataclass(frozen=True, kw_only=True)
class SlimeGrpo(Grpo):
    """grpo with the defaults of a trainer: slime.grpo."""

@dataclass(frozen=True, kw_only=True)
class SlimePpo(Grpo):
    """grpo with the defaults of a trainer: slime.ppo."""

@dataclass(frozen=True, kw_only=True)
class SlimeReinforcePlusPlus(Grpo):
    """grpo with the defaults of a trainer: slime.reinforce_plus_plus."""

@dataclass(frozen=True, kw_only=True)
class SlimeReinforcePlusPlusBaseline(Grpo):
    """grpo with the defaults of a trainer: slime.reinforce_plus_plus_baseline."""

@dataclass(frozen=True, kw_only=True)
class SlimeGspo(Gspo):
    """gspo with the defaults of a trainer: slime.gspo."""

    epsilon_low: Number = 0.2
    epsilon_high: Number = 0.2

@dataclass(frozen=True, kw_only=True)
class SlimeCispo(Cispo):
    """cispo with the defaults of a trainer: slime.cispo."""

    aggregation: Aggregation = "sequence_mean_token_mean"
    ratio_low: Number = 0.8
    ratio_high: Number = 1.2

@dataclass(frozen=True, kw_only=True)
class PrimeRlDefault(Linear):
    """linear with the defaults of a trainer: prime_rl.default."""

    beta: Number = 0.002
    kl_estimator: KlEstimator = "k2"
    kl_gradient: KlGradient = "k2"
    kl_reference: KlReference = "old"

@dataclass(frozen=True, kw_only=True)
class PrimeRlIpo(Linear):
    """linear with the defaults of a trainer: prime_rl.ipo."""

    beta: Number = 0.002
    kl_estimator: KlEstimator = "k2"
    kl_gradient: KlGradient = "k2"
    kl_reference: KlReference = "old"

@dataclass(frozen=True, kw_only=True)
class NemoRlGrpo(Ppo):
    """ppo with the defaults of a trainer: nemo_rl.grpo."""

    beta: Number = 0.01
    kl_correction: KlCorrection = "on_policy"

@dataclass(frozen=True, kw_only=True)
class NemoRlGspo(Gspo):
    """gspo with the defaults of a trainer: nemo_rl.gspo."""

    epsilon_low: Number = 0.2
    epsilon_high: Number = 0.2

@dataclass(frozen=True, kw_only=True)
class NemoRlCispo(Cispo):
    """cispo with the defaults of a trainer: nemo_rl.cispo."""

    ratio_low: Number = 0.8
    ratio_high: Number = 1.2

@dataclass(frozen=True, kw_only=True)
class NemoRlReinforce(Reinforce):
    """reinforce with the defaults of a trainer: nemo_rl.reinforce."""

@dataclass(frozen=True, kw_only=True)
class TorchrlClipPpo(Ppo):
    """ppo with the defaults of a trainer: torchrl.clip_ppo."""

@dataclass(frozen=True, kw_only=True)
class TorchrlPpo(Linear):
    """linear with the defaults of a trainer: torchrl.ppo."""

@dataclass(frozen=True, kw_only=True)
class TorchrlA2c(Reinforce):
    """reinforce with the defaults of a trainer: torchrl.a2c."""

@dataclass(frozen=True, kw_only=True)
class TorchrlReinforce(Reinforce):
    """reinforce with the defaults of a trainer: torchrl.reinforce."""

@dataclass(frozen=True, kw_only=True)
class TorchrlGrpo(Ppo):
    """ppo with the defaults of a trainer: torchrl.grpo."""

@dataclass(frozen=True, kw_only=True)
class TorchrlCispo(Band):
    """band with the defaults of a trainer: torchrl.cispo."""

@dataclass(frozen=True, kw_only=True)
class SkyrlRolloutIs(RolloutIs):
    """rollout_is with the defaults of a trainer: skyrl.rollout_is."""

@dataclass(frozen=True, kw_only=True)
class RollTopr(Topr):
    """topr with the defaults of a trainer: roll.topr."""

    level: Level = "token"
    aggregation: Aggregation = "token_mean"

@dataclass(frozen=True, kw_only=True)
class RollTis(Cispo):
    """cispo with the defaults of a trainer: roll.tis."""

    ratio_high: Number = 1.0
