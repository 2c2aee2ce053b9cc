"""tether.testing for losses of pairs, of labelled answers and of value heads."""

import dataclasses
import functools

import pytest
import tether
import torch
import torch.nn.functional as F
from tether.testing import ClipRange, Traits, check_loss

BETA, CLIP = 0.1, 0.3
QUIET = {"batches": 3, "skip": ["threads"]}


# ---- losses in plain torch, in parts that a fault can replace ------------------------------------


def scores(logps, ref_logps, mask):
    keep = mask != 0
    wide = torch.promote_types(logps.dtype, torch.float32)
    logps, ref_logps = (torch.where(keep, each, 0).to(wide) for each in (logps, ref_logps))
    return ((logps - ref_logps) * mask).sum(1)


def mean_of_pairs(terms, mask, pairs=None, world_size=1):
    present = (mask != 0).any(1).view(2, -1).any(0)
    count = present.sum().clamp(min=1) if pairs is None else pairs
    return world_size * (terms * present).sum() / count


def sigmoid(margin):
    return -F.logsigmoid(BETA * margin)


def dpo(logps, ref_logps, response_mask, pairs=None, world_size=1, *, link=sigmoid, scored=scores):
    chosen, rejected = scored(logps, ref_logps, response_mask).chunk(2)
    return mean_of_pairs(link(chosen - rejected), response_mask, pairs, world_size)


def mean_of_all(logps, ref_logps, response_mask):
    """As trainers write it: pairs that only fill the batch up count."""
    chosen, rejected = scores(logps, ref_logps, response_mask).chunk(2)
    return sigmoid(chosen - rejected).mean()


def masked_after(logps, ref_logps, mask):
    wide = torch.promote_types(logps.dtype, torch.float32)
    return ((logps.to(wide) - ref_logps.to(wide)) * mask).sum(1)


def of_policy_alone(logps, ref_logps, mask):
    return scores(logps, 0 * mask, mask)


def of_labels(logps, ref_logps, labels, response_mask, pairs=None, world_size=1, sign=1.0):
    toward = torch.where(labels, 1.0, -sign)
    terms = sigmoid(toward * scores(logps, ref_logps, response_mask))
    present = (response_mask != 0).any(1)
    count = present.sum().clamp(min=1) if pairs is None else pairs
    return world_size * (terms * present).sum() / count


def squared(
    values, old_values, returns, response_mask, normalizer=None, *, high=CLIP, of=torch.maximum
):
    keep, wide = response_mask != 0, torch.promote_types(values.dtype, torch.float32)
    values, old_values, returns = (
        torch.where(keep, each, 0).to(wide) for each in (values, old_values, returns)
    )
    inside = torch.minimum(torch.maximum(values, old_values - CLIP), old_values + high)
    terms = 0.5 * of((values - returns) ** 2, (inside - returns) ** 2)
    total = (terms * response_mask).sum()
    if normalizer is None:
        return total / response_mask.sum().clamp(min=1e-9)
    return total / normalizer.policy * normalizer.factor


# ---- right ones ----------------------------------------------------------------------------------

PAIRS = {"family": "preference"}
VALUES = {"family": "value", "traits": Traits(clip=ClipRange(CLIP, CLIP), survives_runaways=False)}
RIGHT = {
    "dpo": (dpo, {"objective": "dpo"}),
    "pairs without an objective": (dpo, PAIRS),
    "labelled": (of_labels, PAIRS),
    "clipped squared": (squared, {"objective": "clipped_squared", "clip_range": CLIP}),
    "values without an objective": (squared, VALUES),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_losses_raise_no_alarm(name):
    loss, settings = RIGHT[name]
    if "objective" in settings and name != "dpo":
        settings = settings | {"traits": VALUES["traits"]}
    report = check_loss(loss, **settings, **QUIET)
    report.assert_ok()
    asked = {each.id for each in report.properties if each.outcome == "holds"}
    assert {"split", "ranks", "empty", "poison", "shift", "finite_difference"} <= asked
    assert ("pull_back" in asked) == (loss is not squared)
    assert ("clip" in asked) == (loss is squared)
    assert ("reference_gradient" in asked) == ("objective" in settings)


@pytest.mark.parametrize("objective", tether.objectives("preference"))
def test_every_objective_of_answers_keeps_its_promises(objective):
    loss = functools.partial(tether.preference_loss, objective=objective)
    batches = 2 if objective in ("dpo", "kto") else 0
    traits = Traits(bitwise=True)
    check_loss(loss, objective, traits=traits, batches=batches, skip=["threads"]).assert_ok()


@pytest.mark.parametrize("objective", tether.objectives("value"))
def test_every_objective_of_values_keeps_its_promises(objective):
    loss = functools.partial(tether.value_loss, objective=objective, clip_range=CLIP)
    if objective != "clipped_squared":
        loss = functools.partial(tether.value_loss, objective=objective)
    options = {"clip_range": CLIP} if objective == "clipped_squared" else {}
    report = check_loss(loss, objective, traits=Traits(bitwise=True), **options, **QUIET)
    report.assert_ok()
    assert report["packed"].outcome == report["reference_value"].outcome == "holds"


def test_typed_objectives_say_the_family():
    objective = tether.objective.Ipo(beta=0.2)
    loss = functools.partial(tether.preference_loss, objective=objective)
    report = check_loss(loss, objective, batches=0, skip=["threads"])
    report.assert_ok()
    assert report["reference_value"].outcome == "holds"
    wrong = check_loss(loss, tether.objective.Ipo(beta=0.1), batches=0, skip=["threads"])
    assert {"reference_value", "reference_gradient"} <= set(wrong.failed)


# ---- faults --------------------------------------------------------------------------------------

FAULTS = {
    "the mean over all pairs": (mean_of_all, {"padding_rows", "empty"}),
    "masked after the arithmetic": (functools.partial(dpo, scored=masked_after), {"poison"}),
    "the wrong way": (
        functools.partial(dpo, link=lambda margin: sigmoid(-margin)),
        {"pull_back", "reference_gradient"},
    ),
    "no reference": (functools.partial(dpo, scored=of_policy_alone), {"shift", "reference_value"}),
    "log of a sigmoid": (
        functools.partial(dpo, link=lambda margin: -torch.sigmoid(BETA * margin).log()),
        {"finite", "pull_back"},
    ),
    "a detached margin": (
        functools.partial(dpo, link=lambda margin: sigmoid(margin) + sigmoid(margin).detach()),
        {"reference_value", "finite_difference"},
    ),
    "its own pairs": (
        lambda logps, ref_logps, response_mask, pairs=None: dpo(logps, ref_logps, response_mask),
        {"split"},
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_pairs_are_caught(name):
    loss, wanted = FAULTS[name]
    report = check_loss(loss, "dpo", **QUIET)
    assert wanted <= set(report.failed), report
    for each in wanted:
        assert report[each].batch and report[each].rows * report[each].columns <= 8, report[each]


def test_faults_of_labelled_answers_are_caught():
    report = check_loss(functools.partial(of_labels, sign=-1.0), **PAIRS, **QUIET)
    assert report.failed == ("pull_back",)
    assert "rejected, log-ratio 2, and a gradient of -" in report["pull_back"].detail
    assert "labels = torch.tensor([" in report["pull_back"].batch


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"of": torch.minimum}, {"clip", "reference_value"}),
        ({"high": 0.2}, {"clip", "reference_value"}),
        ({"of": lambda a, b: a}, {"clip", "reference_value"}),
    ],
)
def test_faults_of_values_are_caught(change, wanted):
    loss = functools.partial(squared, **change)
    report = check_loss(loss, "clipped_squared", clip_range=CLIP, traits=VALUES["traits"], **QUIET)
    assert wanted <= set(report.failed), report
    assert "values = torch.tensor([[" in report["clip"].batch


def test_the_size_of_returns_is_seen():
    def of_returns(values, returns, response_mask):
        values, returns = (torch.where(response_mask != 0, each, 0) for each in (values, returns))
        return ((values - returns) ** 2 * (1 + returns**2) * response_mask).sum()

    traits = dataclasses.replace(VALUES["traits"], clip=None, takes_half_precision=False)
    assert check_loss(of_returns, family="value", traits=traits, **QUIET).failed == ("shift",)


# ---- doors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: check_loss(dpo, family="pairs"),
            'check_loss: family must be one of policy, preference, value, got "pairs"',
        ),
        (
            lambda: check_loss(squared),
            "check_loss: arguments of a policy loss must be logps and any of old_logps, ref_logps, "
            "rollout_logps, entropies, turn_ids, advantages, response_mask, normalizer, offsets, "
            'got "values" without a default',
        ),
        (
            lambda: check_loss(lambda logps, labels: logps, "dpo"),
            "check_loss: arguments of a preference loss must be logps and any of ref_logps, "
            "baselines, answer_weights, response_mask, pairs, tokens, world_size, offsets, got "
            '"labels" without a default',
        ),
        (
            lambda: check_loss(dpo, "dpo", clip=0.2),
            "check_loss: option must be one of label_smoothing, beta, loss_weight, nll_coef, "
            'ld_alpha, link_alpha, got "clip"',
        ),
        (
            lambda: check_loss(dpo, "dpo", weights={"tv_mask": {}}),
            "check_loss: weights must be None for a preference loss, got some",
        ),
    ],
)
def test_bad_input_gets_one_sentence(call, text):
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value) == text
