"""Terms of a policy loss alone, and a mean over terms, against the loss that they are parts of."""

import math

import pytest
import tether
import torch
from batches import packed, padded_batch

AGGREGATIONS = tether.objectives()["ppo"].choices["aggregation"].legal
FORMS = tether.objectives()["ppo"].choices["kl_estimator"].legal


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_mean_of_a_losses_terms_is_the_loss(aggregation, packs):
    batch = padded_batch()
    batch = packed(batch) if packs else batch
    batch["response_mask"] = batch["response_mask"] * 0.5
    settings = {"objective": "ppo", "beta": 0.1}
    step = {"aggregation": aggregation, "constant": 3.0}
    step["normalizer"] = tether.Normalizer(policy=11, sequences=7, world_size=2)
    slopes = []
    for mean in (False, True):
        logps = batch["logps"].clone().requires_grad_()
        given = batch | {"logps": logps}
        if mean:
            terms = tether.policy_token_losses(**given, **settings)
            where = {"offsets": batch["offsets"]} if packs else {}
            loss = tether.aggregate(terms, batch["response_mask"], **step, **where)
        else:
            loss = tether.policy_loss(**given, **settings, **step).loss
        (1.7 * loss).backward()
        slopes.append((loss.detach(), logps.grad))
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-12, atol=1e-15)


def test_by_hand():
    terms = torch.tensor([[1.0, 2.0, math.nan], [4.0, 8.0, 16.0]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    mean = tether.aggregate(terms, mask)
    assert mean == 31 / 5
    mean.backward()
    assert torch.equal(terms.grad, mask / 5)
    rows = {"aggregation": "sequence_mean_token_mean"}
    assert tether.aggregate(terms, mask, **rows).item() == pytest.approx((1.5 + 28 / 3) / 2)
    lengths = torch.tensor([10.0, 20.0])
    assert tether.aggregate(terms, mask, **rows, row_tokens=lengths).item() == pytest.approx(0.85)
    assert tether.aggregate(terms, mask[:, [0, 2, 1]]).isnan()


@pytest.mark.parametrize("estimator", FORMS)
def test_terms_of_the_kl_are_the_reference_form(estimator):
    batch = padded_batch(spread=3)
    k3 = tether.reference.k3
    others = {"abs": torch.abs, "low_var_kl": lambda d: k3(d).clamp(max=10)}
    form = others.get(estimator) or getattr(tether.reference, estimator)
    arrays = {name: batch[name] for name in ("logps", "ref_logps", "response_mask")}
    mask = batch["response_mask"]
    expected = torch.where(mask, form(batch["ref_logps"] - batch["logps"]), 0.0)
    torch.testing.assert_close(tether.kl_terms(**arrays, kl_estimator=estimator), expected)


def test_the_gradient_of_the_kl_is_another_forms():
    batch = padded_batch()
    mask = batch["response_mask"]
    logps = batch["logps"].clone().requires_grad_()
    terms = tether.kl_terms(logps, batch["ref_logps"], mask, kl_estimator="k3", kl_gradient="k2")
    (slope,) = torch.autograd.grad(terms.sum(), logps)
    d = batch["ref_logps"] - batch["logps"]
    torch.testing.assert_close(slope[mask], -d[mask])
    ratio = (batch["logps"] - batch["old_logps"]).exp()
    terms = tether.kl_terms(
        logps, batch["ref_logps"], mask, old_logps=batch["old_logps"], kl_correction="ratio"
    )
    torch.testing.assert_close(terms[mask].detach(), (ratio * tether.reference.k3(d))[mask])


@pytest.mark.parametrize("correction, is_unbiased", [("rollout_ratio", True), ("ratio", False)])
def test_the_ratio_to_the_engine_makes_a_penalty_of_its_samples_unbiased(correction, is_unbiased):
    """Exactly, over all ids that the engine may sample."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(4, 7, generator=generator, dtype=torch.float64).log_softmax(-1)
    policy, old, ref, engine = rows[:, None]
    policy = policy.clone().requires_grad_()
    exact = (policy.exp() * (policy - ref)).sum()
    for form in ("k1", "k3"):
        terms = tether.kl_terms(
            *(policy, ref, torch.ones_like(ref)),
            kl_estimator=form,
            kl_correction=correction,
            old_logps=old,
            rollout_logps=engine,
        )
        expected = (engine.exp() * terms).sum()
        ours, theirs = (
            torch.autograd.grad(x, policy, retain_graph=True)[0] for x in (expected, exact)
        )
        # Of log-probabilities that add up to 1: but for a direction that none of them has.
        gap = (ours - theirs) / policy.detach().exp()
        assert torch.allclose(expected, exact) == is_unbiased
        assert torch.allclose(gap, gap.mean(), atol=1e-12) == is_unbiased


def test_the_ratio_to_the_engine_needs_its_log_probabilities():
    terms, mask = torch.ones(2, 3), torch.ones(2, 3)
    for name in ("rollout_ratio", "detached_rollout_ratio"):
        with pytest.raises(ValueError) as caught:
            tether.kl_terms(terms, terms, mask, kl_correction=name)
        assert str(caught.value) == (
            "kl_terms: rollout_logps must be given when beta is greater than 0 and kl_reference is "
            "rollout or kl_correction a rollout_ratio, got none"
        )


def test_errors_speak_of_their_own_arguments():
    terms, mask = torch.ones(2, 3), torch.ones(2, 3)
    for wrong, message in (
        ({"terms": torch.ones(6)}, "terms must be [B, T], or [N] with offsets, got [6]"),
        ({"terms": None}, "terms must be given, got none"),
        (
            {"response_mask": torch.ones(2, 4)},
            "response_mask must be [2, 3] like terms, got [2, 4]",
        ),
        ({"normalizer": 3}, "normalizer must be a tether.Normalizer, got int"),
    ):
        with pytest.raises((ValueError, TypeError)) as caught:
            tether.aggregate(**{"terms": terms, "response_mask": mask} | wrong)
        assert str(caught.value) == f"aggregate: {message}"
    logps = terms.clone().requires_grad_()
    with pytest.raises(ValueError, match="kl_terms: kl_gradient must be k2 or k3 or low_var_kl"):
        tether.kl_terms(logps, terms, mask, kl_estimator="k1")
    assert tether.kl_terms(terms, terms, mask, kl_estimator="k1").sum() == 0
    assert tether.kl_terms(
        logps, terms, mask, kl_estimator="k1", allow_biased_gradient=True
    ).requires_grad


@pytest.mark.parametrize("function", ["aggregate", "kl_terms"])
def test_a_second_derivative_is_refused(function):
    terms = torch.tensor([[0.5, 1.0, 2.0]], requires_grad=True)
    mask, ref_logps = torch.ones(1, 3), torch.zeros(1, 3)
    if function == "aggregate":
        out = tether.aggregate(terms, mask)
    else:
        out = tether.kl_terms(terms, ref_logps, mask).sum()
    (gradient,) = torch.autograd.grad(out, terms, create_graph=True)
    with pytest.raises(NotImplementedError) as caught:
        gradient.sum().backward()
    assert str(caught.value) == (
        f"{function}: backward must run once, got a second derivative. The loss has none"
    )


def test_as_many_packed_rows_as_tokens():
    terms, offsets = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0, 0, 2, 3])
    assert tether.aggregate(terms, torch.ones(3), offsets=offsets) == 3
    rows = {"offsets": offsets, "aggregation": "sequence_mean_token_mean"}
    assert tether.aggregate(terms, torch.ones(3), **rows) == 3.75
    d = torch.tensor([0.5, -1.0, 2.0])
    expected = tether.reference.k3(d)
    zeros, ones = torch.zeros(3), torch.ones(3)
    torch.testing.assert_close(tether.kl_terms(zeros, d, ones, offsets=offsets), expected)


def test_what_is_no_number_is_refused():
    mask = torch.ones(1, 2)
    with pytest.raises(TypeError, match=r"^aggregate: terms must be float32, .*, got bool$"):
        tether.aggregate(mask.bool(), mask)
    with pytest.raises(ValueError, match=r"^kl_terms: ref_logps must be given, got none$"):
        tether.kl_terms(mask, None, mask)
    with pytest.raises(TypeError, match=r"^kl_terms: allow_biased_gradient must be a bool"):
        logps = mask.clone().requires_grad_()
        tether.kl_terms(logps, mask, mask, allow_biased_gradient=None)
