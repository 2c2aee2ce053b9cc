"""tether.policy_loss: the operator against tether.reference, and the promises about memory."""

import json
import math
import pathlib
import re

import pytest
import tether
import torch
from batches import (
    LEVELS,
    OBJECTIVES,
    assert_close,
    assert_same_bits,
    evaluated,
    packed,
    padded_batch,
    referenced,
)

AGGREGATIONS = (
    "token_mean",
    "sequence_mean_token_mean",
    "sequence_mean_token_sum",
    "sequence_sum_over_constant",
    "token_sum",
)
GOLDEN = json.loads(
    (pathlib.Path(__file__).parent.parent / "golden/policy_golden.json").read_text()
)


# ---- value, gradient and metrics -----------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("layout", [dict, packed])
@pytest.mark.parametrize("seed", range(3))
def test_equals_reference_in_float64(objective, layout, seed):
    batch = layout(padded_batch(seed))
    assert_close(
        evaluated(batch, objective=objective), referenced(batch, objective=objective), 1e-12
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_option_reaches_the_formula(objective):
    batch = padded_batch(spread=0.8)
    options = {
        "epsilon": 0.3,
        "power": 0.5,
        "epsilon_low": 0.11,
        "epsilon_high": 0.37,
        "dual_clip": 1.6,
        "ratio_low": 0.8,
        "ratio_high": 1.3,
        "tau_pos": 1.7,
        "tau_neg": 2.3,
        "tau": 0.4,
        "scale": 0.6,
        "eta": 1.3,
        "weight_pos": 0.7,
        "weight_neg": 1.2,
        "tv_mask.low": 0.03,
        "tv_mask.high": 0.05,
        "kl_mask.low": 0.01,
        "kl_mask.high": 0.02,
        "vespo.k_pos": 1.5,
        "vespo.lambda_pos": 2.5,
        "vespo.k_neg": 2.5,
        "vespo.lambda_neg": 1.5,
        "truncated_importance.low": 0.9,
        "truncated_importance.high": 1.2,
        "masked_ratio.low": 0.7,
        "masked_ratio.high": 1.4,
        "clip_mask.epsilon_low": 0.3,
        "clip_mask.epsilon_high": 0.4,
        "ring_mask.epsilon_low": 0.3,
        "ring_mask.epsilon_high": 0.25,
        "ring_mask.far_low": 0.5,
        "ring_mask.far_high": 0.6,
        "log_ratio_low": 0.21,
        "log_ratio_high": 0.33,
        "beta": 0.7,
        "kl_ratio_high": 1.1,
        "entropy_coef": 0.3,
        "constant": 6,
    }
    batch["entropies"] = torch.where(batch["response_mask"], -batch["logps"], math.nan)
    known = tether.objectives()[objective].options
    settings = {name: value for name, value in options.items() if name in known}
    assert len(settings) == len(known)
    for aggregation in AGGREGATIONS:
        actual = evaluated(batch, objective=objective, aggregation=aggregation, **settings)
        expected = referenced(batch, objective=objective, aggregation=aggregation, **settings)
        assert_close(actual, expected, 1e-12)


def with_weights(settings):
    """What stands on the wire, as policy_loss takes it."""
    weights = {name: {"level": settings[name]} for name in tether.weights() if name in settings}
    for name, value in settings.items():
        weight, _, option = name.partition(".")
        if weight in weights and option:
            weights[weight][option] = value
    plain = {name: value for name, value in settings.items() if name.split(".")[0] not in weights}
    return plain | {"weights": weights}


@pytest.mark.parametrize("golden", GOLDEN["batches"], ids=lambda golden: golden["name"])
@pytest.mark.parametrize("evaluate", [evaluated, referenced])
def test_equals_sixty_digit_arithmetic(golden, evaluate):
    def tokens(name, dtype=torch.float64):
        return torch.tensor(golden[name], dtype=dtype).reshape(golden["rows"], golden["columns"])

    arrays = ("logps", "old_logps", "ref_logps", "rollout_logps", "advantages", "token_weights",
              "kl_weights")  # fmt: skip
    batch = {name: tokens(name) for name in arrays if name in golden}
    batch["response_mask"] = tokens("response_mask", torch.bool)
    if "turn_ids" in golden:
        batch["turn_ids"] = tokens("turn_ids", torch.int64)
    settings = {name: golden[name] for name in ("objective", "beta", "constant")}
    settings |= golden["options"] | golden["choices"]
    out = evaluate(batch, **with_weights(settings) if evaluate is evaluated else settings)
    assert out.loss.item() == pytest.approx(golden["loss"], rel=1e-13)
    torch.testing.assert_close(out.dlogps, tokens("dlogps"), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)]
)
def test_narrow_types_are_computed_in_float32(objective, dtype, tolerance):
    batch = padded_batch(dtype=dtype, spread=0.2)
    out = evaluated(batch, objective=objective)
    wide = {
        name: each.double() if each.is_floating_point() else each for name, each in batch.items()
    }
    expected = evaluated(wide, objective=objective)
    assert out.loss.dtype == torch.float32
    assert out.dlogps.dtype == dtype
    torch.testing.assert_close(out.loss.double(), expected.loss, rtol=0, atol=2e-6)
    torch.testing.assert_close(out.dlogps.double(), expected.dlogps, rtol=tolerance, atol=1e-7)
    assert_close(out, referenced(batch, objective=objective), max(tolerance, 2e-6))


def test_types_and_layouts_may_be_mixed():
    batch = padded_batch(dtype=torch.float32)
    mixed = batch | {
        "old_logps": batch["old_logps"].bfloat16(),
        "advantages": batch["advantages"].half()[:, None],
        "response_mask": batch["response_mask"].to(torch.int64),
    }
    exact = mixed | {
        "old_logps": mixed["old_logps"].float(),
        "advantages": mixed["advantages"].float()[:, 0],
        "response_mask": batch["response_mask"],
    }
    assert_same_bits(evaluated(mixed), evaluated(exact))


def test_weights_between_0_and_1():
    batch = padded_batch()
    batch["response_mask"] = batch["response_mask"] * torch.linspace(0.1, 1, 9, dtype=torch.float64)
    for aggregation in AGGREGATIONS:
        actual = evaluated(batch, aggregation=aggregation, constant=5)
        assert_close(actual, referenced(batch, aggregation=aggregation, constant=5), 1e-12)


def test_without_old_logps_the_ratio_is_1_and_its_gradient_is_not_0():
    batch = padded_batch(poison=0.0)
    del batch["old_logps"], batch["ref_logps"]
    out = evaluated(batch, objective="ppo")
    mask = batch["response_mask"]
    weighted = torch.where(mask, -batch["advantages"][:, None] / mask.sum(), 0.0)
    torch.testing.assert_close(out.dlogps, weighted, rtol=1e-15, atol=0)
    assert out.loss.item() == pytest.approx(weighted.sum().item(), rel=1e-14)
    assert_close(out, referenced(batch, objective="ppo"), 1e-14)


def test_runaway_tokens_stay_finite_and_are_pulled_back():
    logps = torch.tensor([[0.0, -2000.0]], dtype=torch.float64)
    batch = {
        "logps": logps,
        "advantages": torch.tensor([-1e12], dtype=torch.float64),
        "response_mask": torch.ones(1, 2, dtype=torch.bool),
        "old_logps": torch.tensor([[-2000.0, -1.0]], dtype=torch.float64),
        "ref_logps": torch.zeros(1, 2, dtype=torch.float64),
    }
    out = evaluated(batch, beta=0.5)
    assert_close(out, referenced(batch, beta=0.5), 1e-12)
    assert torch.isfinite(out.dlogps).all()
    assert out.dlogps[0, 0] > 1e200 and out.dlogps[0, 1] < -1e200


def test_nan_at_an_active_slot_comes_out_and_is_counted():
    batch = padded_batch(poison=0.0)
    batch["logps"][0, 1] = math.nan
    loss, metrics = tether.policy_loss(**batch)
    assert math.isnan(loss.item())
    assert metrics.to_dict()["nonfinite"] == 1


@pytest.mark.parametrize("infinite", [math.inf, -math.inf])
@pytest.mark.parametrize("name", ["logps", "old_logps", "ref_logps", "advantages"])
def test_infinity_at_an_active_slot_is_nan_and_counted_like_in_the_reference(name, infinite):
    batch = padded_batch(poison=0.0)
    batch[name][0] = infinite
    for beta in (0.04, 0.0):
        out, expected = evaluated(batch, beta=beta), referenced(batch, beta=beta)
        seen = name != "ref_logps" or beta > 0
        assert math.isnan(out.loss) == math.isnan(expected.loss) == seen
        assert torch.equal(out.dlogps.isnan(), expected.dlogps.isnan())
        for each in (out, expected):
            metrics = tether.PolicyMetrics(each.sums, each.maxima).to_dict()
            assert metrics["nonfinite"] == 5 * seen
        assert torch.equal(out.maxima, expected.maxima)


def test_empty_batches_give_0():
    for lengths in ((), (0, 0)):
        out = evaluated(padded_batch(lengths=lengths))
        assert out.loss.item() == 0
        assert torch.equal(out.dlogps, torch.zeros(len(lengths), 9, dtype=torch.float64))


@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_packed_batch_of_nothing_is_not_read_in_two_ways(on_cpu, monkeypatch):
    if not on_cpu:
        monkeypatch.setattr(tether._ops, "KERNELS", frozenset())
    nothing = torch.zeros(0)
    for advantages in (nothing, nothing.view(0, 1)):
        logps = nothing.clone().requires_grad_()
        batch = (logps, advantages, nothing.bool())
        out = tether.policy_loss(*batch, offsets=torch.tensor([0]))
        out.loss.backward()
        assert out.loss == 0 and logps.grad.shape == (0,)
        assert tether.local_counts(*batch, offsets=torch.tensor([0])).policy == 0
        assert out.metrics.to_dict()["tokens"] == 0


def test_a_column_of_advantages_is_per_row_though_there_are_as_many_tokens():
    batch = {
        "logps": torch.tensor([-1.0, -2.0]),
        "advantages": torch.tensor([[1.0], [5.0]]),
        "response_mask": torch.ones(2),
        "offsets": torch.tensor([0, 2, 2]),  # both tokens are of row 0
    }
    assert evaluated(batch, objective="ppo").loss == -1
    assert referenced(batch, objective="ppo").loss == -1


def test_a_loss_scale_reaches_gradients_that_float16_would_flush():
    batch = {
        "logps": torch.full((1, 4096), -1.0, dtype=torch.float16),
        "advantages": torch.full((1,), 1e-4),
        "response_mask": torch.ones(1, 4096),
    }
    gradient = evaluated(batch, upstream=65536.0, objective="ppo").dlogps
    assert gradient.dtype == torch.float16
    assert gradient[0, 0].item() == pytest.approx(-16e-4, rel=1e-3)


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e38])
def test_masked_slots_may_hold_anything(objective, poison):
    clean = evaluated(padded_batch(poison=0.0), objective=objective)
    out = evaluated(padded_batch(poison=poison), objective=objective)
    assert_same_bits(out, clean)
    assert (out.dlogps[~padded_batch()["response_mask"]] == 0).all()


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_packed_equals_padded(index):
    batch = padded_batch()
    dense = packed(batch)
    out = evaluated(dense | {"offsets": dense["offsets"].to(index)})
    expected = evaluated(batch)
    expected = expected._replace(dlogps=expected.dlogps[batch["response_mask"]])
    assert_close(out, expected, 1e-14)


def test_any_strides_and_inputs_untouched():
    batch = padded_batch(poison=0.0)
    expected = evaluated(batch)
    wide = {name: each.repeat_interleave(2, dim=0) for name, each in batch.items()}
    strided = {
        name: each.t().contiguous().t() if each.dim() == 2 else each for name, each in batch.items()
    }
    sliced = {name: each[::2] for name, each in wide.items()}
    offsets = torch.stack([packed(batch)["offsets"]] * 2, 1)[:, 0]
    for each in (strided, sliced):
        before = {name: tensor.clone() for name, tensor in each.items()}
        assert_same_bits(evaluated(each), expected)
        assert all(torch.equal(each[name], before[name]) for name in each)
    assert_close(evaluated(packed(batch) | {"offsets": offsets}), evaluated(packed(batch)), 0)


def test_same_bits_for_any_number_of_threads():
    batch = padded_batch(lengths=[700] * 40, columns=700, dtype=torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = evaluated(batch)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert_same_bits(evaluated(batch), expected)
    finally:
        torch.set_num_threads(before)


# ---- the step's denominators ---------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_any_split_of_a_step_gives_the_same_loss_and_gradient(objective, aggregation):
    batch = padded_batch()
    settings = {"objective": objective, "aggregation": aggregation, "constant": 7}
    whole = evaluated(batch, **settings)
    for cuts in ([2, 3], [1, 1, 1, 2]):
        parts = split(batch, cuts)
        step = sum(tether.local_counts(**part, **settings) for part in parts)
        results = [evaluated(part, normalizer=step, **settings) for part in parts]
        joined = torch.cat([each.dlogps for each in results])
        loss = sum(each.loss for each in results)
        assert loss.item() == pytest.approx(whole.loss.item(), rel=1e-13)
        torch.testing.assert_close(joined, whole.dlogps, rtol=1e-13, atol=1e-16)
        torch.testing.assert_close(
            sum(each.sums for each in results), whole.sums, rtol=1e-13, atol=1e-13
        )


def split(batch, cuts):
    pieces = {name: each.split(cuts) for name, each in batch.items()}
    return [{name: each[i] for name, each in pieces.items()} for i in range(len(cuts))]


def test_normalizer_in_full():
    batch = padded_batch()
    normalizer = tether.Normalizer(policy=40, kl=50.0, sequences=torch.tensor(9), world_size=2)
    for objective in OBJECTIVES:
        settings = {"objective": objective, "normalizer": normalizer, "beta": 0.3}
        assert_close(evaluated(batch, **settings), referenced(batch, **settings), 1e-12)
    token_mean = {"aggregation": "token_mean", "beta": 0.3}
    both, policy = tether.Normalizer(policy=40, kl=40), tether.Normalizer(policy=40)
    for evaluate in (evaluated, referenced):
        expected = evaluate(batch, normalizer=both, **token_mean)
        assert_same_bits(evaluate(batch, normalizer=policy, **token_mean), expected)


def test_normalizers_add_up():
    a, b = tether.Normalizer(3, 4, 1, world_size=2), tether.Normalizer(5, 5, 2, world_size=2)
    assert a + b == tether.Normalizer(8, 9, 3, world_size=2)
    assert sum([a, a]) == tether.Normalizer(6, 8, 2, world_size=2)
    with pytest.raises(TypeError):
        a + 1


def test_counts_of_narrow_tensors_do_not_wrap():
    for dtype, count in (
        (torch.uint8, 200),
        (torch.float16, 60000),
        (torch.float32, 2**24 + 1 - 1),
    ):
        a = tether.Normalizer(torch.tensor(count, dtype=dtype))
        assert (a + tether.Normalizer(1) + a).policy == 2 * count + 1
    scaled = tether.Normalizer(torch.tensor(4.0), world_size=torch.tensor(200, dtype=torch.uint8))
    for evaluate in (evaluated, referenced):
        batch = padded_batch()
        out = evaluate(batch, aggregation="token_mean", normalizer=scaled)
        by_number = tether.Normalizer(4.0, world_size=200.0)
        assert out.loss == evaluate(batch, aggregation="token_mean", normalizer=by_number).loss
    with pytest.raises(TypeError) as caught:
        tether.Normalizer("a") + tether.Normalizer("b")
    assert str(caught.value) == "Normalizer: policy must be a number, got str"
    with pytest.raises(ValueError) as caught:
        tether.Normalizer(torch.ones(2)) + tether.Normalizer(1)
    assert str(caught.value) == "Normalizer: policy must be one number, got [2]"


@pytest.mark.parametrize("kernel", [True, False])
def test_a_normalizer_without_the_count_that_is_divided_by_is_refused(kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr("tether._ops.KERNELS", frozenset())
    batch = padded_batch()
    for objective, given, missing, aggregation in (
        ("grpo", {"policy": 40}, "sequences", "sequence_mean_token_mean"),
        ("trl.dr_grpo", {"policy": 40, "kl": 3}, "sequences", "sequence_sum_over_constant"),
        ("dapo", {"sequences": 3}, "policy", "token_mean"),
        ("ppo", {"kl": torch.tensor(3)}, "policy", "token_mean"),
    ):
        with pytest.raises(ValueError) as caught:
            tether.policy_loss(**batch, objective=objective, normalizer=tether.Normalizer(**given))
        assert str(caught.value) == (
            f"policy_loss: normalizer.{missing} must be given where other counts are, for "
            f"{aggregation}, got none"
        )
    values = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"value_loss: normalizer\.policy must be given where"):
        tether.value_loss(
            values, values, torch.ones(2, 3), normalizer=tether.Normalizer(sequences=2)
        )
    summed = {"aggregation": "token_sum", "normalizer": tether.Normalizer(policy=40)}
    assert tether.policy_loss(**batch, **summed).loss.isfinite()


@pytest.mark.parametrize("kernel", [True, False])
def test_options_of_narrow_tensors_are_not_calculated_with_in_their_dtype(kernel, monkeypatch):
    batch = padded_batch()
    if not kernel:
        monkeypatch.setattr("tether._ops.KERNELS", frozenset())
    for dtype in (torch.bfloat16, torch.float16):
        high = torch.tensor(0.3, dtype=dtype)
        expected = tether.policy_loss(**batch, objective="ppo", epsilon_high=high.item()).loss
        actual = tether.policy_loss(**batch, objective="ppo", epsilon_high=high).loss
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


def test_a_normalizer_without_counts_adds_nothing():
    a = tether.Normalizer(3, 4, 1, world_size=2, scale=0.5)
    empty = tether.Normalizer()
    assert empty + a == a == a + empty == sum([a], empty)
    assert empty + empty == empty
    assert tether.Normalizer(world_size=8) + tether.Normalizer(3) == tether.Normalizer(
        3, world_size=8
    )
    batch = padded_batch()
    step = sum([tether.local_counts(**batch)] * 2, tether.Normalizer())
    whole = evaluated(batch).loss
    torch.testing.assert_close(2 * evaluated(batch, normalizer=step).loss, whole)


@pytest.mark.parametrize(
    "a, b, message",
    [
        (
            tether.Normalizer(3, 4),
            tether.Normalizer(5),
            "kl must be given in both or in none of two that are added, got it in the first and "
            "none in the second",
        ),
        (
            tether.Normalizer(3),
            tether.Normalizer(sequences=5),
            "policy must be given in both or in none of two that are added, got it in the first "
            "and none in the second",
        ),
        (
            tether.Normalizer(3, scale=0.5),
            tether.Normalizer(3, scale=0.25),
            "scale must be the same in two that are added, got 0.5 and 0.25",
        ),
    ],
)
def test_counts_that_do_not_add_up_are_refused(a, b, message):
    with pytest.raises(ValueError) as caught:
        a + b
    assert str(caught.value) == f"Normalizer: {message}"


@pytest.mark.parametrize("evaluate", [evaluated, referenced])
def test_scale_multiplies_the_loss_and_not_the_metrics(evaluate):
    batch = padded_batch()
    plain = evaluate(batch, normalizer=tether.Normalizer(policy=40, sequences=9))
    scaled = evaluate(batch, normalizer=tether.Normalizer(40, None, 9, world_size=2, scale=0.25))
    torch.testing.assert_close(scaled.loss, plain.loss / 2)
    torch.testing.assert_close(scaled.dlogps, plain.dlogps / 2)
    assert torch.equal(scaled.sums, plain.sums)


@pytest.mark.parametrize("count", [0.0, -3.0, math.nan, math.inf])
def test_a_count_that_is_no_count_spoils_the_loss_of_other_devices(count):
    batch = padded_batch(spread=0.05)  # nothing is clipped
    for aggregation in set(AGGREGATIONS) - {"token_sum"}:
        counts = tether.Normalizer(count, count, torch.tensor(count))
        out = referenced(batch, aggregation=aggregation, normalizer=counts)
        assert out.loss.isnan() and out.dlogps[batch["response_mask"]].isnan().all()


def test_counts_on_other_devices_are_checked_where_they_are_numbers():
    meta = {name: each.to("meta") for name, each in padded_batch().items()}
    for name, value, rule in (
        ("policy", -1, "at least 0"),
        ("kl", math.nan, "at least 0"),
        ("sequences", math.inf, "at least 0"),
        ("scale", 0, "greater than 0"),
        ("world_size", -2.5, "greater than 0"),
    ):
        with pytest.raises(ValueError) as caught:
            tether.policy_loss(**meta, normalizer=tether.Normalizer(**{name: value}))
        assert str(caught.value) == (
            f"policy_loss: normalizer.{name} must be {rule} and finite, got {value:g}"
        )


def test_local_counts():
    batch = padded_batch()
    counts = tether.local_counts(**batch | {"logps": batch["logps"].requires_grad_()})
    assert [counts.policy.item(), counts.kl.item(), counts.sequences.item()] == [18, 18, 4]
    assert not counts.policy.requires_grad
    assert torch.equal(
        tether.reference.local_counts(**batch),
        torch.stack([counts.policy, counts.kl, counts.sequences]),
    )


# ---- autograd ------------------------------------------------------------------------------------


# The gradient is stopped or straight through, or a weight moves with the policy.
STOPPED = {"cispo", "gspo_token", "topr", "dppo_tv", "dppo_kl", "rollout_is", "vespo"}


@pytest.mark.parametrize("objective", sorted(set(OBJECTIVES) - STOPPED))
def test_gradient_is_the_derivative_of_the_value(objective):
    batch = padded_batch(poison=0.0, spread=0.1)

    def loss(logps):
        return tether.policy_loss(**batch | {"logps": logps}, objective=objective).loss

    assert torch.autograd.gradcheck(loss, batch["logps"].requires_grad_(), raise_exception=True)


def test_upstream_gradient_scales():
    batch = padded_batch()
    plain, scaled = evaluated(batch), evaluated(batch, upstream=-3.0)
    torch.testing.assert_close(scaled.dlogps, -3 * plain.dlogps, rtol=1e-15, atol=0)


def test_gradients_accumulate_over_repeated_backwards():
    batch = padded_batch(poison=0.0)
    logps = batch["logps"].requires_grad_()
    loss, _ = tether.policy_loss(**batch)
    for times in (1, 2, 3):
        loss.backward(retain_graph=True)
        torch.testing.assert_close(logps.grad, times * evaluated(batch).dlogps, rtol=1e-15, atol=0)


def test_batched_upstream_gradients():
    batch = padded_batch(poison=0.0)
    logps = batch["logps"].requires_grad_()
    loss, _ = tether.policy_loss(**batch)
    (gradients,) = torch.autograd.grad(
        loss, logps, torch.tensor([1.0, 2.0]).double(), is_grads_batched=True
    )
    expected = evaluated(batch).dlogps
    torch.testing.assert_close(gradients, torch.stack([expected, 2 * expected]), rtol=1e-15, atol=0)


def test_second_derivative_is_refused():
    batch = padded_batch()
    logps = batch["logps"].requires_grad_()
    loss, _ = tether.policy_loss(**batch)
    (gradient,) = torch.autograd.grad(loss, logps, create_graph=True)
    with pytest.raises(NotImplementedError) as caught:
        gradient.sum().backward()
    assert str(caught.value) == (
        "policy_loss: backward must run once, got a second derivative. The loss has none"
    )


def test_without_gradient():
    batch = padded_batch()
    expected = evaluated(batch)
    with torch.no_grad():
        loss, metrics = tether.policy_loss(**batch | {"logps": batch["logps"].requires_grad_()})
    assert not loss.requires_grad
    assert torch.equal(loss, expected.loss)
    assert torch.equal(metrics.sums, expected.sums)


def test_metrics_by_name():
    out = tether.policy_loss(**padded_batch(), objective="grpo", beta=0.5)
    assert not out.metrics.sums.requires_grad and not out.metrics.maxima.requires_grad
    metrics = out.metrics.to_dict()
    policy_loss, kl, *_ = (out.metrics.sums[:, 0] / out.metrics.sums[:, 1]).tolist()
    mean = {"policy_loss": policy_loss, "kl": kl}
    assert {name: metrics[name] for name in mean} == pytest.approx(mean, rel=1e-15)
    assert metrics["tokens"] == 18
    assert metrics["ratio_max"] == pytest.approx(math.exp(out.metrics.maxima[0].item()), rel=1e-15)


# ---- the catalogue -------------------------------------------------------------------------------


def test_catalogue_and_reference_have_the_same_rows():
    rows = tether.reference.OBJECTIVES
    assert tuple(rows) == OBJECTIVES
    for name, objective in tether.objectives().items():
        row = rows[name]
        shared = {"beta": row.beta, "kl_ratio_high": math.inf, "entropy_coef": 0, "constant": 1}
        defaults = dict.fromkeys(("log_ratio_low", "log_ratio_high"), row.log_ratio_clip)
        defaults |= row.surrogate_options | shared
        found = {each: option.default for each, option in objective.options.items()}
        stated = {k: v for k, v in (row.weights or {}).items() if "." in k}
        assert {each: v for each, v in found.items() if "." not in each} == defaults
        assert stated.items() <= found.items()
        assert objective.weights == {k: v for k, v in (row.weights or {}).items() if "." not in k}
        choices = {each: choice.default for each, choice in objective.choices.items()}
        assert choices == {
            "level": row.level,
            "aggregation": row.aggregation,
            "kl_estimator": "k3",
            "kl_gradient": "k3",
            "kl_correction": "none",
            "kl_reference": "reference",
            "allow_biased_gradient": "true" if row.kl else "false",
            **(row.kl or {}),
        }
        assert objective.formula and objective.paper


def test_ranges_in_words():
    options = tether.objectives()["ppo"].options
    assert {name: option.range for name, option in options.items()} == {
        "epsilon_low": "in [0, 1]",
        "epsilon_high": "at least 0",
        "dual_clip": "greater than 1",
        "log_ratio_low": "at least 0",
        "log_ratio_high": "at least 0",
        "beta": "in [0, 1e+12]",
        "kl_ratio_high": "greater than 0",
        "entropy_coef": "in [0, 1e+12]",
        "constant": "in (0, 1e+12]",
    }


KL_FORMS = tether.objectives()["grpo"].choices["kl_estimator"].legal


@pytest.mark.parametrize("estimator", KL_FORMS)
@pytest.mark.parametrize(
    "correction", ["none", "ratio", "detached_ratio", "on_policy", "rollout_ratio"]
)
@pytest.mark.parametrize("level", LEVELS)
def test_every_choice_equals_reference(estimator, correction, level):
    batch = padded_batch(spread=0.4)
    batch["ref_logps"] = batch["logps"] + 4 * (
        batch["ref_logps"] - batch["logps"]
    )  # beyond a bound
    for gradient in KL_FORMS:
        settings = {
            "objective": "grpo",
            "beta": 0.5,
            "level": level,
            "kl_estimator": estimator,
            "kl_gradient": gradient,
            "kl_correction": correction,
            "allow_biased_gradient": True,
        }
        plain = settings | {"allow_biased_gradient": "true"}
        assert_close(evaluated(batch, **settings), referenced(batch, **plain), 1e-12)


@pytest.mark.parametrize(
    "correction", ["ratio", "detached_ratio", "level_ratio", "detached_rollout_ratio"]
)
@pytest.mark.parametrize("level", LEVELS)
def test_a_bound_of_the_penaltys_ratio_equals_reference(correction, level):
    batch = padded_batch(spread=0.4)
    settings = {"objective": "grpo", "beta": 0.5, "level": level, "kl_correction": correction}
    unbounded = evaluated(batch, **settings).loss
    for high in (1.05, torch.tensor(1.05, dtype=torch.float64)):
        bounded = settings | {"kl_ratio_high": high}
        out = evaluated(batch, **bounded)
        assert_close(out, referenced(batch, **bounded), 1e-12)
        assert out.loss != unbounded
    each = tether.policy_token_losses(**batch, **settings, kl_ratio_high=1.05)
    assert each.isfinite().all()


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("level", ["token", "sequence_mean", "turn_sum"])
def test_what_is_not_finite_in_the_engines_ratio_is_seen(broken, level):
    settings = {"objective": "grpo", "beta": 0.5, "level": level}
    settings["kl_correction"] = "rollout_ratio"
    batch = padded_batch(spread=0.4)
    i, t = batch["response_mask"].nonzero()[1].tolist()
    batch["rollout_logps"][i, t] = broken
    for evaluate in (evaluated, referenced):
        out = evaluate(batch, **settings)
        assert out.loss.isnan() and out.dlogps[i, t].isnan()
        assert out.sums[10, 0] == 1  # nonfinite
        assert evaluate(batch, **settings | {"kl_correction": "ratio"}).loss.isfinite()


def test_entropies_get_a_gradient():
    batch = padded_batch()
    mask = batch["response_mask"]
    batch["entropies"] = torch.where(
        mask.double() > 0, 0.7 * mask.double(), math.nan
    ).requires_grad_()
    loss, metrics = tether.policy_loss(**batch, objective="dapo", entropy_coef=0.25)
    (3 * loss).backward()
    expected = -0.75 * mask.double() / mask.sum()
    torch.testing.assert_close(batch["entropies"].grad, expected, rtol=1e-15, atol=0)
    assert metrics.to_dict()["entropy"] == pytest.approx(0.7, rel=1e-15)


# ---- losses of tokens ----------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("layout", [dict, packed])
def test_token_losses_add_up_to_the_loss(objective, layout):
    batch = layout(padded_batch(spread=0.6))
    batch["entropies"] = torch.where(batch["response_mask"] != 0, -batch["logps"], math.nan)
    options = {"objective": objective, "entropy_coef": 0.1, "beta": 0.2}
    options |= {"aggregation": "token_mean"}

    def gradients(loss):
        return torch.autograd.grad(loss, (logps, entropies))

    logps, entropies = (batch[name].detach().requires_grad_() for name in ("logps", "entropies"))
    leaves = batch | {"logps": logps, "entropies": entropies}
    each = tether.policy_token_losses(**leaves, **options)
    mask = batch["response_mask"].double()
    assert (each[mask == 0] == 0).all()
    loss = (mask * each).sum() / mask.sum()
    expected = tether.policy_loss(**leaves, **options).loss
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    for a, b in zip(gradients(loss), gradients(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("level", LEVELS)
def test_token_losses_take_any_upstream_gradient(level):
    batch = padded_batch(poison=0.0, spread=0.2)
    upstream = torch.linspace(-1, 2, batch["logps"].numel(), dtype=torch.float64)
    values = []
    logps = batch["logps"].detach().requires_grad_()

    def loss(at):
        each = tether.policy_token_losses(
            **batch | {"logps": at}, objective="reinforce", level=level, beta=0.1
        )
        return (upstream.view_as(each) * each).sum()

    (gradient,) = torch.autograd.grad(loss(logps), logps)
    step = 1e-6
    if level in ("sequence_token", "turn_token"):  # its value does not follow its gradient
        return
    for i in range(0, logps.numel(), 5):
        up, down = (logps.detach().clone().view(-1) for _ in range(2))
        up[i] += step
        down[i] -= step
        slope = (loss(up.view_as(logps)) - loss(down.view_as(logps))) / (2 * step)
        values.append((gradient.view(-1)[i] - slope).abs().item())
    assert max(values) < 1e-7


# ---- lengths of rows -----------------------------------------------------------------------------


@pytest.mark.parametrize("evaluate", [evaluated, referenced])
@pytest.mark.parametrize("layout", [dict, packed])
@pytest.mark.parametrize("level", ["token", "turn_mean"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_a_row_in_two_pieces_is_one_row(evaluate, layout, level, dtype):
    """Cut between two turns, with the length of the whole row and the sequences of the step."""
    whole = padded_batch(lengths=(8, 6), columns=8, poison=0.0)
    whole["advantages"] = torch.randn(2, 8, dtype=torch.float64)
    whole["turn_ids"] = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 2], [5, 5, 5, 5, 7, 7, 7, 7]])
    settings = {"objective": "ppo", "level": level, "beta": 0.2}
    settings |= {"aggregation": "sequence_mean_token_mean"}
    expected = evaluate(layout(whole), **settings)
    pieces = {name: each.reshape(4, 4) for name, each in whole.items()}
    pieces["row_tokens"] = torch.tensor([8, 8, 6, 6], dtype=dtype)
    two = tether.Normalizer(sequences=2)
    actual = evaluate(layout(pieces), **settings, normalizer=two)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-13, atol=0)
    gradients = [each.dlogps.reshape(-1) for each in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-13, atol=1e-16)


def test_lengths_of_rows_are_looked_at_where_a_row_has_tokens():
    batch = padded_batch(poison=0.0)  # the second row has none
    settings = {"objective": "grpo", "aggregation": "sequence_mean_token_mean"}
    for lengths, got in (([5, math.nan, 1, 9, 0], "0 at [4]"), ([-1, 0, 1, 9, 3], "-1 at [0]")):
        batch["row_tokens"] = torch.tensor(lengths, dtype=torch.float64)
        message = re.escape(
            "policy_loss: row_tokens must be greater than 0 and finite where a row has tokens, got "
            + got
        )
        with pytest.raises(ValueError, match=f"^{message}$"):
            tether.policy_loss(**batch, **settings)
    batch["row_tokens"] = torch.tensor([5, math.nan, 1, 9, 3], dtype=torch.float64)
    plain = {name: each for name, each in batch.items() if name != "row_tokens"}
    torch.testing.assert_close(
        tether.policy_loss(**batch, **settings).loss, tether.policy_loss(**plain, **settings).loss
    )


@pytest.mark.parametrize("function", ["policy_loss", "policy_token_losses"])
def test_ids_of_turns_must_not_decrease(function):
    batch = padded_batch(poison=0.0)
    batch["turn_ids"][3, 4] = -100
    message = re.escape(
        f"{function}: turn_ids must not decrease along a row, got -100 after "
        f"{batch['turn_ids'][3, 3]} at [3, 4]"
    )
    with pytest.raises(ValueError, match=f"^{message}$"):
        getattr(tether, function)(**batch, objective="ppo", level="turn_mean")
    getattr(tether, function)(**batch, objective="ppo")


def test_a_weight_that_is_0_in_the_arithmetic_is_no_token_of_a_turn():
    batch = padded_batch(dtype=torch.float32, lengths=(4,), columns=4)
    batch["response_mask"] = torch.tensor([[1.0, 1e-50, 1.0, 1.0]], dtype=torch.float64)
    settings = {"objective": "ppo", "level": "turn_mean"}
    for ids in (None, torch.tensor([[0, 5, 1, 1]])):
        batch["turn_ids"] = ids
        assert_close(evaluated(batch, **settings), referenced(batch, **settings), 1e-6)


@pytest.mark.parametrize("level", ["token", "turn_mean"])
def test_linear_policy_loss_takes_turns_and_lengths_of_rows(level):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 7, (3, 5), generator=generator)
    old_logps = -torch.rand(3, 5, generator=generator, dtype=torch.float64) - 1
    batch = {
        "advantages": torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64),
        "response_mask": torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 1]]).bool(),
        "old_logps": old_logps,
        "turn_ids": torch.tensor([[0, 0, 9, 1, 1], [2, 3, 3, 0, 0], [7, 1, 1, 2, 2]]),
        "row_tokens": torch.tensor([9, 4, 8]),
        "objective": "ppo",
        "aggregation": "sequence_mean_token_mean",
        "level": level,
    }
    leaves = [each.clone().requires_grad_() for each in (hidden, weight)]
    logps = tether.linear_token_logps(*leaves, targets).logps
    expected = tether.policy_loss(logps, **batch).loss
    wanted = torch.autograd.grad(expected, leaves)
    out = tether.linear_policy_loss(*leaves, targets, **batch, rows_per_chunk=2)
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=0)
    for a, b in zip(torch.autograd.grad(out.loss, leaves), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-15)


def test_three_tensors_are_enough():
    logps = torch.tensor([[-0.5, -1.0], [-0.2, -0.7]], requires_grad=True)
    mask = torch.tensor([[1, 1], [1, 0]])
    out = tether.policy_loss(logps, torch.tensor([1.0, -2.0]), mask)  # grpo on-policy, beta 0
    (gradient,) = torch.autograd.grad(out.loss, logps)
    assert out.loss.item() == pytest.approx((-1 + 2) / 2)
    torch.testing.assert_close(gradient, torch.tensor([[-0.25, -0.25], [1.0, 0.0]]))
