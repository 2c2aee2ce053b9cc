"""tether against Liger's own chunked losses, as recorded by tests/peers/record_liger.py.

Liger's luspo takes the mean over all slots of the batch, padding too. The two differ there: a test
has both numbers.
"""

import pytest
import tether
import torch
from recordings import (
    assert_equal,
    batch_of,
    has_empty_rows,
    named,
    policy_loss,
    recording,
    sides,
    tensor,
    token_counts,
)

GRPO = recording("liger_grpo")
PREFERENCE = recording("liger_preference")["cases"]
FUSED = recording("liger_fused")["cases"]
HEADS = [case for case in FUSED if case["settings"]["loss"] != "jsd"]


def is_padded(case):
    """Whether slots of padding enter the recorded loss: luspo, whose terms are not all of a row."""
    settings = case["settings"]
    of_tokens = settings["importance_sampling_level"] == "token" or settings["beta"] > 0
    return settings["loss_type"] == "luspo" and of_tokens


CASES = [case for case in GRPO["cases"] if not is_padded(case)]
PADDED = [case for case in GRPO["cases"] if is_padded(case)]

# ---- policies ------------------------------------------------------------------------------------

AGGREGATIONS = {
    "grpo": "sequence_mean_token_mean",
    "bnpo": "token_mean",
    "dr_grpo": "sequence_sum_over_constant",
    "dapo": "token_mean",
    "luspo": "sequence_mean_token_sum",
    "cispo": "token_mean",
    "sapo": "sequence_mean_token_mean",
    "vespo": "token_mean",
}


def surrogate(case):
    """Liger's vespo multiplies the engine's ratios into its own: as if the engine's policy were the
    old one. In the others they weigh the surrogate."""
    settings = case["settings"]
    loss = settings["loss_type"]
    weighed = case["engine_ratio"] is not None
    out = {}
    if weighed and loss != "vespo":
        ratio = tensor(case["engine_ratio"])
        out["token_weights"] = ratio.expand(len(ratio), len(case["logps"][0]))
    if loss == "vespo":
        names = ("k_pos", "lambda_pos", "k_neg", "lambda_neg")
        given = {name: settings.get(f"vespo_{name}") for name in names}
        weight = {name: each for name, each in given.items() if each is not None}
        if weighed:
            out["old_logps"] = tensor(case["old_logps"]) - tensor(case["engine_ratio"]).log()
        return out | {"objective": "vespo", "weights": {"vespo": weight}}
    if loss == "sapo":
        tau_pos = settings.get("sapo_temperature_pos", 1.0)
        tau_neg = settings.get("sapo_temperature_neg", 1.05)
        return out | {"objective": "sapo", "tau_pos": tau_pos, "tau_neg": tau_neg}
    if loss == "cispo":
        return out | {"objective": "cispo", "ratio_high": settings["epsilon_high"]}
    level = {"token": "token", "sequence": "sequence_mean"}[settings["importance_sampling_level"]]
    out |= {"dual_clip": settings["delta"]} if settings["delta"] else {}
    epsilons = {name: settings[name] for name in ("epsilon_low", "epsilon_high")}
    return out | {"objective": "ppo", "level": level} | epsilons


def settings_of(case):
    """Rows without tokens count as sequences; a step's tokens may be given."""
    settings, mask = case["settings"], torch.tensor(case["response_mask"])
    tokens = settings["num_items_in_batch"] or token_counts(mask)["policy"]
    correction = "ratio" if settings["importance_sampling_level"] == "token" else "level_ratio"
    return surrogate(case) | {
        "beta": settings["beta"],
        "aggregation": AGGREGATIONS[settings["loss_type"]],
        "constant": settings["max_completion_length"],
        "kl_estimator": "k3",
        "kl_gradient": "k3",
        "kl_correction": correction if settings["use_bias_correction_kl"] else "none",
        "normalizer": tether.Normalizer(policy=tokens, sequences=len(mask)),
    }


@named(CASES)
def test_the_policys_loss_equals_liger(case):
    assert_equal(case, *policy_loss(case, **settings_of(case)))


@named(PADDED)
def test_padding_enters_ligers_luspo_and_not_tethers(case):
    """Liger: mean over all slots of n_i times the term. tether: the mean over rows of the sum over
    the tokens."""
    settings = case["settings"]
    loss, gradient = policy_loss(case, **settings_of(case))
    batch = batch_of(case)
    mask = batch["response_mask"]
    terms = tether.policy_token_losses(
        **batch | {"response_mask": torch.ones_like(mask)},
        objective="ppo",
        epsilon_low=settings["epsilon_low"],
        epsilon_high=settings["epsilon_high"],
        beta=0.0,
    )
    if settings["importance_sampling_level"] == "sequence":
        log_ratio = batch["logps"] - batch["old_logps"]
        mean = (log_ratio * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        low, high = 1 - settings["epsilon_low"], 1 + settings["epsilon_high"]
        advantages = batch["advantages"][:, None]
        ratio = mean.exp()
        terms = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
        terms = terms.expand(mask.shape)
    d = batch["ref_logps"] - batch["logps"]
    terms = terms + settings["beta"] * (d.exp() - 1 - d)
    lengths = mask.sum(1, keepdim=True)
    assert case["loss"] == pytest.approx((terms * lengths).mean().item(), rel=1e-12)
    assert loss.item() == pytest.approx((terms * mask).sum(1).mean().item(), rel=1e-12)
    assert abs(loss.item() / case["loss"] - 1) > 1e-2
    assert (tensor(case["dlogps"])[(mask == 0) & (lengths > 0)] != 0).any()
    assert (gradient[mask == 0] == 0).all()


# ---- answers -------------------------------------------------------------------------------------


def compared_pairs(loss):
    """bco_pair and nca_pair are DPO of pairs with an answer that both policies find alike: of the
    chosen over none, of none over the chosen, of none over the rejected."""
    return {
        "bco_pair": [("chosen", None, 1.0), (None, "rejected", 1.0)],
        "nca_pair": [("chosen", None, 1.0), (None, "chosen", 0.5), (None, "rejected", 0.5)],
    }[loss]


def with_no_answer(case, logps):
    """Rows, reference, mask and weights of such pairs, all chosen ones first."""
    mask, ref_logps = torch.tensor(case["response_mask"]), tensor(case["ref_logps"])
    rows = {"chosen": slice(0, 3), "rejected": slice(3, 6)}
    none = {"logps": torch.zeros(3, 5, dtype=torch.float64), "mask": torch.ones(3, 5).long()}
    columns = {"logps": [], "ref_logps": [], "mask": [], "weights": []}
    plan = compared_pairs(case["settings"]["loss_type"])
    for side in (0, 1):
        for pair in plan:
            at = rows.get(pair[side])
            columns["logps"].append(none["logps"] if at is None else logps[at])
            columns["ref_logps"].append(none["logps"] if at is None else ref_logps[at])
            columns["mask"].append(none["mask"] if at is None else mask[at])
            columns["weights"].append(torch.full((3,), pair[2] if side == 0 else 1.0))
    return {name: torch.cat(each) for name, each in columns.items()}


OF_ANSWERS = {"sigmoid": "dpo", "hinge": "hinge", "bco_pair": "dpo", "nca_pair": "dpo",
              "apo_zero": "kto", "kto": "kto", "sppo_hard": "sppo"}  # fmt: skip


def answer_loss(case, logps):
    """apo_zero is KTO's with the means of both labels, sppo_hard SPPO with advantages of 1 and -1
    and the reference as the old policy."""
    loss, beta = case["settings"]["loss_type"], case["settings"]["beta"]
    objective, ref_logps = OF_ANSWERS[loss], tensor(case["ref_logps"])
    mask = torch.tensor(case["response_mask"])
    if objective == "sppo":
        signs, normalizer = tensor([1, 1, 1, -1, -1, -1]), tether.Normalizer(sequences=3)
        batch = {"old_logps": ref_logps, "normalizer": normalizer, "eta": 0.5 / beta}
        return tether.policy_loss(logps, signs, mask, objective=objective, **batch).loss
    settings = {"objective": objective, "beta": beta}
    if loss in ("bco_pair", "nca_pair"):
        rows = with_no_answer(case, logps)
        logps, ref_logps, mask = rows["logps"], rows["ref_logps"], rows["mask"]
        settings |= {"answer_weights": rows["weights"].double(), "pairs": 3}
    elif objective == "kto":
        labels = case.get("labels", [True] * 3 + [False] * 3)
        baselines = case.get("baselines")
        settings |= {"labels": torch.tensor(labels), "pairs": 3 if loss == "apo_zero" else None}
        settings |= {"baselines": None if baselines is None else tensor(baselines)}
    return tether.preference_loss(logps, ref_logps, mask, **settings).loss


@named(PREFERENCE)
def test_the_loss_of_answers_equals_liger(case):
    logps = tensor(case["logps"]).requires_grad_()
    loss = answer_loss(case, logps)
    loss.backward()
    assert_equal(case, loss.detach(), logps.grad)


# ---- from logits on ------------------------------------------------------------------------------


def of_head(case):
    loss, options = case["settings"]["loss"], case["settings"]["options"]
    if loss == "orpo":
        return {"objective": "orpo", "loss_weight": options["beta"]}
    if loss == "simpo":
        margin = options["gamma"] / options["beta"]
        baselines = torch.cat([torch.full((3,), margin), torch.zeros(3)])
        settings = {"objective": "dpo", "score": "mean", "reference": False}
        likelihood = 1 if options.get("compute_nll_loss", True) else 0
        return settings | {"beta": options["beta"], "baselines": baselines, "nll_coef": likelihood}
    return {
        "objective": "cdpo",
        "reference": False,
        "beta": options["beta"],
        "label_smoothing": options["label_smoothing"],
        "nll_coef": options["alpha"],
    }


@named(HEADS)
def test_the_loss_from_logits_equals_liger(case):
    logits = torch.tensor(case["logits"]).requires_grad_()
    logps = tether.token_logps(logits, torch.tensor(case["targets"])).logps
    mask = torch.tensor(case["response_mask"])
    loss = tether.preference_loss(logps, None, mask, **of_head(case)).loss
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-6)
    expected = torch.tensor(case["dlogits"])
    torch.testing.assert_close(logits.grad, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "case", [case for case in FUSED if case["settings"]["loss"] == "jsd"], ids=lambda c: c["name"]
)
def test_the_ends_of_ligers_jsd_are_the_two_divergences(case):
    logits = tensor(case["logits"]).requires_grad_()
    kl, reverse_kl, _ = tether.categorical_kl(logits, tensor(case["ref_logits"]))
    loss = (reverse_kl if case["settings"]["options"]["beta"] == 0 else kl).sum()
    loss.backward()
    assert_equal(case, loss.detach(), logits.grad, "logits")


# ---- what is recorded ----------------------------------------------------------------------------


def test_the_recording_covers_what_differs():
    assert GRPO["liger-kernel"] == "0.8.5"
    settings = [case["settings"] for case in GRPO["cases"]]
    assert {each["loss_type"] for each in settings} == set(AGGREGATIONS)
    assert len(PADDED) == 2
    levels = {(each["loss_type"], each["importance_sampling_level"]) for each in settings}
    assert {name for name, level in levels if level == "sequence"} == {
        "grpo", "bnpo", "dr_grpo", "dapo", "luspo"
    }  # fmt: skip
    weighed = [case for case in GRPO["cases"] if case["engine_ratio"]]
    assert {len(case["engine_ratio"][0]) for case in weighed} == {1, 6}
    assert len(sides(GRPO["cases"], 0.8, 1.28)) == 6 and has_empty_rows(GRPO["cases"])
