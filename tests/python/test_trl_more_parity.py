"""tether against more of TRL's own losses, as recorded by tests/peers/record_trl_more.py."""

import tether
import torch
from recordings import FLOAT32, assert_equal, batch_of, named, policy_loss, recording, tensor

ANSWERS = recording("trl_answers")
PAIRS = recording("trl_pairs")


def answers(settings):
    epsilons = {
        name: settings[name] for name in ("epsilon_low", "epsilon_high") if name in settings
    }
    if settings["loss"] == "rloo":
        return {"objective": "rloo"} | epsilons
    if settings["loss"] == "gmpo":
        bounds = {f"log_ratio_{side}": epsilons[f"epsilon_{side}"] for side in ("low", "high")}
        penalty = {"beta": settings["beta"], "kl_estimator": "k3", "kl_gradient": "k3"}
        return {"objective": "gmpo"} | bounds | penalty
    return {"objective": "a2po", "scale": settings["beta2"]}


@named(ANSWERS["cases"])
def test_the_loss_of_answers_equals_trl(case):
    """Rows without tokens count. A*-PO's old policy is the reference; its loss of such a row, which
    tether does not have, is a constant."""
    settings, batch = case["settings"], batch_of(case)
    rows, steps = len(batch["logps"]), settings.get("accumulation_steps", 1)
    changes = {"normalizer": tether.Normalizer(sequences=rows * steps)}
    empty = batch["response_mask"].sum(1) == 0
    of_empty = torch.zeros((), dtype=torch.float64)
    if settings["loss"] == "a2po":
        changes["old_logps"] = batch["ref_logps"]
        of_empty = batch["advantages"][empty].square().sum() / rows
    elif settings["loss"] == "rloo":
        of_empty = -batch["advantages"][empty].sum() / rows  # of a ratio of 1
    else:
        of_empty = -batch["advantages"][empty].sum() / rows / steps
    loss, gradient = policy_loss(case, **changes | answers(settings))
    assert empty.any() and of_empty != 0
    assert_equal(case, loss + of_empty, gradient)


# ---- pairs ---------------------------------------------------------------------------------------


def pairs(settings):
    """CPO has no reference; AlphaPO's reward is the link of that name."""
    loss, beta = settings["loss_type"], settings["beta"]
    if loss == "orpo":
        return {"objective": "orpo", "loss_weight": beta, "nll_coef": 0}
    out = {"objective": "cdpo", "beta": beta, "reference": False}
    if loss in ("hinge", "ipo"):
        return out | {"objective": loss, "score": "sum"}
    if loss == "sigmoid":
        return out | {"label_smoothing": settings.get("label_smoothing", 0.0)}
    margin = settings["simpo_gamma"] / beta
    baselines = tensor([margin] * 3 + [0.0] * 3)
    out |= {"objective": "dpo", "score": "mean", "baselines": baselines}
    if "alpha" in settings:
        out |= {"link": "alphapo", "link_alpha": settings["alpha"]}
    return out


@named(PAIRS["cases"])
def test_the_loss_of_pairs_equals_trl(case):
    logps = tensor(case["logps"]).requires_grad_()
    mask = torch.tensor(case["response_mask"])
    loss, _ = tether.preference_loss(logps, None, mask, **pairs(case["settings"]))
    loss.backward()
    exact = FLOAT32 if case["settings"]["loss_type"] == "orpo" else {}
    assert_equal(case, loss.detach(), logps.grad, **exact)


def test_the_recordings_cover_what_differs():
    assert ANSWERS["trl"] == PAIRS["trl"] == "1.16.0"
    assert {case["settings"]["loss"] for case in ANSWERS["cases"]} == {"rloo", "a2po", "gmpo"}
    kinds = {case["settings"]["loss_type"] for case in PAIRS["cases"]}
    assert kinds == {"sigmoid", "hinge", "ipo", "simpo", "orpo"}
    assert sum("alpha" in case["settings"] for case in PAIRS["cases"]) == 2
