"""Records Liger's own chunked losses on random ragged batches.

    build/peers/parts/bin/python tests/peers/record_liger.py

writes tests/golden/peers/liger_{grpo,preference,fused}.json. grpo and preference are of the
functions of log-probabilities, which take float64; fused of the losses from hidden states on, which
are float32: logits are given as hidden states of a head that is the identity.
"""

import recording
import torch
from liger_kernel.chunked_loss import (
    cpo_loss,
    dpo_loss,
    grpo_loss,
    jsd_loss,
    kto_loss,
    orpo_loss,
    simpo_loss,
)
from recording import grid, normal, policy_batch, ragged_mask, with_gradient

# ---- policies ------------------------------------------------------------------------------------

DEFAULTS = {
    "loss_type": "grpo",
    "importance_sampling_level": "token",
    "beta": 0.0,
    "epsilon_low": 0.2,
    "epsilon_high": 0.28,
    "delta": None,
    "max_completion_length": 16,
    "num_items_in_batch": None,
    "use_bias_correction_kl": False,
}
SEQUENCE = {"importance_sampling_level": "sequence", "epsilon_low": 0.1, "epsilon_high": 0.15}
CISPO = {"loss_type": "cispo", "epsilon_high": 1.25}
BETA = {"beta": 0.25}
VARIANTS = [
    *({"loss_type": each} for each in ("grpo", "bnpo", "dr_grpo", "dapo")),
    *({"loss_type": each} | BETA for each in ("grpo", "bnpo", "dr_grpo", "dapo", "sapo", "vespo")),
    *(SEQUENCE | {"loss_type": each} | BETA for each in ("grpo", "bnpo", "dr_grpo", "dapo")),
    SEQUENCE | {"loss_type": "luspo"},
    {"loss_type": "grpo", "delta": 1.5},
    SEQUENCE | {"loss_type": "dapo", "delta": 1.25},
    CISPO,
    CISPO | BETA | {"num_items_in_batch": 40},
    {"loss_type": "sapo", "sapo_temperature_pos": 1.5, "sapo_temperature_neg": 2.0},
    {"loss_type": "vespo"},
    {"loss_type": "vespo", "vespo_k_pos": 1.5, "vespo_lambda_pos": 2.0, "vespo_k_neg": 2.5,
     "vespo_lambda_neg": 1.5},
    {"loss_type": "dapo", "num_items_in_batch": 52},
    BETA | {"use_bias_correction_kl": True},
    SEQUENCE | BETA | {"use_bias_correction_kl": True},
]  # fmt: skip
WEIGHTED = [
    ({"loss_type": "grpo"} | BETA, "token"),
    ({"loss_type": "dapo"} | BETA, "sequence"),
    (SEQUENCE | {"loss_type": "grpo"}, "token"),
    (CISPO, "token"),
    ({"loss_type": "sapo"}, "sequence"),
    ({"loss_type": "vespo"}, "token"),
]
# Slots of padding enter the mean.
PADDED = [{"loss_type": "luspo"}, SEQUENCE | BETA | {"loss_type": "luspo"}]


def engine_ratio(batch, level):
    """What vllm_is_ratio is in TRL, 1 in masked slots."""
    mask = batch["response_mask"]
    gap = (batch["old_logps"] - batch["rollout_logps"]) * mask
    return (gap if level == "token" else gap.sum(1, keepdim=True)).exp().clamp(max=1.25)


def grpo(batch, settings, ratio):
    mask = batch["response_mask"]
    return grpo_loss.LigerFusedLinearGRPOFunction.ppo_loss_fn(
        batch["logps"],
        mask,
        batch["advantages"],
        mask,
        ref_per_token_logps=batch["ref_logps"],
        old_per_token_logps=batch["old_logps"],
        vllm_is_ratio=ratio,
        **settings,
    )[0]


def grpo_case(seed, changes, level=None):
    settings = DEFAULTS | changes
    batch = policy_batch(seed)
    ratio = None if level is None else engine_ratio(batch, level)
    out = with_gradient(batch, "logps", lambda live: grpo(live, settings, ratio))
    words = [each if isinstance(each, str) else f"{name} {each}" for name, each in changes.items()]
    words += [] if level is None else [f"engine, by {level}"]
    case = {"name": ", ".join(words), "settings": settings, "engine_ratio": ratio}
    return case | batch | out


# ---- answers -------------------------------------------------------------------------------------

DPO = [
    {"loss_type": "sigmoid", "beta": 0.1},
    {"loss_type": "hinge", "beta": 0.5},
    {"loss_type": "apo_zero", "beta": 0.4},
    {"loss_type": "bco_pair", "beta": 0.4},
    {"loss_type": "nca_pair", "beta": 0.4},
    {"loss_type": "sppo_hard", "beta": 0.5},
]


def answers_of(seed, rows=6, columns=5):
    generator = torch.Generator().manual_seed(seed)
    logps = -normal(generator, rows, columns).abs() - 0.25
    ref_logps = logps + grid(0.6 * normal(generator, rows, columns))
    mask = ragged_mask(generator, rows, columns, empty_row=False)
    return {"logps": logps, "ref_logps": ref_logps, "response_mask": mask}


def sums_of(live):
    mask = live["response_mask"]
    return ((live[each] * mask).sum(1) for each in ("logps", "ref_logps"))


def dpo_case(seed, options):
    batch = answers_of(seed)

    def evaluate(live):
        sums, refs = (
            (live[each] * live["response_mask"]).sum(1) for each in ("logps", "ref_logps")
        )
        answers = dict(zip(("ref_chosen_logps", "ref_rejected_logps"), refs.split(3), strict=True))
        loss = dpo_loss.LigerFusedLinearDPOFunction.preference_loss_fn
        return loss(*sums.split(3), live["logps"], **answers, **options)[0]

    out = with_gradient(batch, "logps", evaluate)
    return {"name": f"DPO {options['loss_type']}", "settings": options} | batch | out


def kto_case(seed, beta, kl):
    batch = answers_of(seed) | {"labels": torch.tensor([True, False, False, True, True, False])}
    batch["baselines"] = normal(torch.Generator().manual_seed(seed), 6).abs() if kl else None

    def evaluate(live):
        sums, refs = (
            (live[each] * live["response_mask"]).sum(1) for each in ("logps", "ref_logps")
        )
        loss = kto_loss.LigerFusedLinearKTOFunction.preference_loss_fn
        return loss(sums, live["labels"], live["logps"], refs, beta, live["baselines"])[0]

    settings = {"loss_type": "kto", "beta": beta}
    name = "KTO, baselines" if kl else "KTO"
    return {"name": name, "settings": settings} | batch | with_gradient(batch, "logps", evaluate)


# ---- from logits on, in float32 ------------------------------------------------------------------

SIMPO = {"beta": 2.0, "gamma": 0.5}
HEADS = [
    (orpo_loss.LigerFusedLinearORPOLoss, "orpo", {"beta": 0.3}),
    (cpo_loss.LigerFusedLinearCPOLoss, "cpo",
     {"beta": 0.4, "alpha": 0.5, "label_smoothing": 0.2}),
    (simpo_loss.LigerFusedLinearSimPOLoss, "simpo", SIMPO),  # with a likelihood, unless said
    (simpo_loss.LigerFusedLinearSimPOLoss, "simpo", SIMPO | {"compute_nll_loss": False}),
]  # fmt: skip
JSD = jsd_loss.LigerFusedLinearJSDFunction


def fused_case(seed, loss, name, options):
    generator = torch.Generator().manual_seed(seed)
    logits = normal(generator, 6, 4, 5).float()
    targets = torch.randint(0, 5, (6, 4), generator=generator)
    mask = ragged_mask(generator, 6, 4, empty_row=False)
    batch = {"logits": logits, "targets": targets, "response_mask": mask}

    def evaluate(live):
        labels = torch.where(mask > 0, targets, -100)
        module = loss(**options, compiled=False)
        return module(torch.eye(5, requires_grad=True), live["logits"], labels)[0]

    out = with_gradient(batch, "logits", evaluate)
    settings = {"loss": name, "options": options}
    return {"name": f"{name} {options}", "settings": settings} | batch | out


def divergence_case(seed, beta):
    """JSD at its ends is a KL divergence; in float64."""
    generator = torch.Generator().manual_seed(seed)
    batch = {each: normal(generator, 6, 5) for each in ("logits", "ref_logits")}

    def evaluate(live):
        return JSD.distillation_loss_fn(live["logits"], live["ref_logits"], beta)

    settings = {"loss": "jsd", "options": {"beta": beta}}
    return (
        {"name": f"jsd {beta}", "settings": settings}
        | batch
        | with_gradient(batch, "logits", evaluate)
    )


def main():
    cases = [grpo_case(seed, changes) for seed, changes in enumerate(VARIANTS + PADDED)]
    cases += [grpo_case(100 + seed, *plan) for seed, plan in enumerate(WEIGHTED)]
    function = grpo_loss.LigerFusedLinearGRPOFunction.ppo_loss_fn
    recording.write("liger_grpo.json", "liger-kernel", [function], cases)
    cases = [dpo_case(seed, options) for seed, options in enumerate(DPO)]
    cases += [kto_case(20, 0.3, False), kto_case(21, 0.5, True)]
    functions = [dpo_loss.LigerFusedLinearDPOFunction, kto_loss.LigerFusedLinearKTOFunction]
    functions = [each.preference_loss_fn for each in functions]
    recording.write("liger_preference.json", "liger-kernel", functions, cases)
    cases = [fused_case(seed, *head) for seed, head in enumerate(HEADS)]
    cases += [divergence_case(10 + beta, beta) for beta in (0, 1)]
    functions = [*dict.fromkeys(loss for loss, *_ in HEADS), JSD.distillation_loss_fn]
    recording.write("liger_fused.json", "liger-kernel", functions, cases)


if __name__ == "__main__":
    main()
