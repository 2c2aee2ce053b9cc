"""tether.value_loss, advantages, whitening and KL estimates against tether.reference."""

import math

import numpy as np
import pytest
import tether
import torch

SHAPE = (5, 17)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def mask_of(shape=SHAPE, seed=9):
    mask = torch.rand(shape, generator=generator(seed)) > 0.3
    mask[2] = False
    return mask


def packed(mask, *tensors):
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    return offsets, *(each[mask] for each in tensors)


# ---- value_loss ----------------------------------------------------------------------------------


def value_results(function, values, *arguments, **options):
    leaf = values.detach().requires_grad_()
    out = function(leaf, *arguments, **options)
    sums = out.metrics.sums if hasattr(out, "metrics") else out.sums
    (gradient,) = torch.autograd.grad(1.7 * out.loss, leaf)
    return out.loss.detach(), gradient, sums


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "aggregation",
    [
        "token_mean",
        "sequence_mean_token_mean",
        "sequence_mean_token_sum",
        "sequence_sum_over_constant",
        "token_sum",
    ],
)
def test_value_loss_equals_reference(dtype, aggregation):
    mask = mask_of()
    values, returns, old_values = (normal(*SHAPE, seed=s, dtype=dtype) for s in (1, 2, 3))
    options = {"aggregation": aggregation, "constant": 9.0, "clip_range": 0.5}
    for normalizer in (None, tether.Normalizer(policy=70, sequences=8, world_size=2)):
        expected = value_results(
            tether.reference.value_loss,
            *(each.double() for each in (values, returns)),
            mask,
            old_values=old_values.double(),
            normalizer=normalizer,
            **options,
        )
        poisoned = [
            torch.where(mask, each.double(), math.nan).to(dtype)
            for each in (values, returns, old_values)
        ]
        actual = value_results(
            tether.value_loss,
            poisoned[0],
            poisoned[1],
            mask,
            old_values=poisoned[2],
            normalizer=normalizer,
            **options,
        )
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-2)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


def test_packed_value_loss_is_the_padded_one():
    mask = mask_of()
    values, returns = normal(*SHAPE, seed=1), normal(*SHAPE, seed=2)
    want = value_results(
        tether.value_loss, values, returns, mask, aggregation="sequence_mean_token_mean"
    )
    offsets, v, r, m = packed(mask, values, returns, mask)
    got = value_results(
        tether.value_loss, v, r, m, offsets=offsets, aggregation="sequence_mean_token_mean"
    )
    torch.testing.assert_close(got[0], want[0], rtol=1e-14, atol=0)
    torch.testing.assert_close(got[1], want[1][mask], rtol=1e-14, atol=0)


def test_value_loss_gradcheck_metrics_and_second_derivative():
    mask, returns = mask_of(), normal(*SHAPE, seed=2)
    values = normal(*SHAPE, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: tether.value_loss(v, returns, mask).loss, values)
    loss, metrics = tether.value_loss(values, returns, mask, old_values=returns)
    assert metrics.to_dict()["value_loss"] == pytest.approx(loss.item())
    (first,) = torch.autograd.grad(loss, values, create_graph=True)
    with pytest.raises(NotImplementedError, match="value_loss: backward must run once"):
        first.sum().backward()


# ---- advantages ----------------------------------------------------------------------------------


RECURSIONS = [name for name, row in tether.advantages().items() if not row.of_groups]
GROUP_RULES = [name for name, row in tether.advantages().items() if row.of_groups]


def test_the_reference_has_the_rows_of_the_catalogue():
    assert list(tether.reference.RECURSIONS) == RECURSIONS
    assert list(tether.reference.GROUP_RULES) == GROUP_RULES


@pytest.mark.parametrize("estimator", RECURSIONS)
@pytest.mark.parametrize("gap", ["carry", "decay"])
@pytest.mark.parametrize("lambdas", [None, (5,), SHAPE])
def test_recursions_equal_reference(estimator, gap, lambdas):
    mask, ends = mask_of(), torch.rand(SHAPE, generator=generator(4))
    tokens = {
        "rewards": normal(*SHAPE, seed=1),
        "values": normal(*SHAPE, seed=2),
        "truncation_values": normal(*SHAPE, seed=5),
        "log_ratios": normal(*SHAPE, seed=7),
    }
    others = {
        "bootstrap": normal(5, seed=3),
        "done": ends < 0.1,
        "truncated": (ends > 0.1) & (ends < 0.2),
    }
    if lambdas is not None:
        others["lambdas"] = torch.rand(lambdas, generator=generator(6), dtype=torch.float64)
    options = {"gamma": 0.98, "gap": gap}
    row = tether.advantages()[estimator]
    for i, (name, option) in enumerate(row.options.items()):
        if name != "gamma":
            options[name + "_" * (name == "lambda")] = min(option.high, 1.3) * (0.9 - 0.1 * i)
    want = tether.reference.advantage(estimator, response_mask=mask, **tokens, **others, **options)
    poisoned = {name: torch.where(mask, each, math.nan) for name, each in tokens.items()}
    got = tether.advantage(estimator, response_mask=mask, **poisoned, **others, **options)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    narrow = {name: each.to(torch.bfloat16) for name, each in tokens.items()}
    wide = {name: each.double() for name, each in narrow.items()}
    got = tether.advantage(estimator, response_mask=mask, **narrow, **others, **options)
    want = tether.advantage(estimator, response_mask=mask, **wide, **others, **options)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b.to(torch.bfloat16))


@pytest.mark.parametrize("estimator", GROUP_RULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rules_of_groups_equal_reference(estimator, dtype):
    rewards = normal(24, dtype=dtype)
    rewards[8:16], rewards[20] = 0.7, math.nan
    ids = (torch.arange(24) // 8)[torch.randperm(24, generator=generator(3))]
    lengths = torch.randint(1, 90, (24,), generator=generator(4))
    row = tether.advantages()[estimator]
    choices = {name: each.legal for name, each in row.choices.items() if name != "nan_reward"}
    pairs = [(name, value) for name, legal in choices.items() for value in legal]
    for name, value in [(None, None), *pairs]:
        options = {name: value} if name else {}
        want = tether.reference.group_advantage(
            rewards, ids, estimator=estimator, lengths=lengths, **options
        )
        for counts in (lengths, lengths.to(torch.int32), lengths.float()):
            got = tether.advantage(
                estimator, rewards, groups=ids, lengths=counts, nan_reward="missing", **options
            )
            torch.testing.assert_close(got.advantages, want, rtol=1e-6, atol=1e-7)
            assert got.returns is rewards


def test_advantage_by_name_refuses_what_it_does_not_know():
    rewards, mask = torch.zeros(2, 3), torch.ones(2, 3)

    def said(*arguments, **options):
        with pytest.raises(ValueError) as error:
            tether.advantage(*arguments, **options)
        return str(error.value)

    known = ", ".join((*RECURSIONS, *GROUP_RULES))
    assert said("gea", rewards, mask) == (f'advantage: estimator must be one of {known}, got "gea"')
    assert said("gae", rewards, mask) == "advantage: values must be given, got none"
    assert said("gae", rewards, mask, values=rewards, groups=2) == (
        "advantage: groups must not be given for gae, a recursion"
    )
    assert said("grpo", rewards[0], mask[0], groups=3) == (
        "advantage: response_mask must not be given for grpo, a rule of groups"
    )
    assert said("returns", rewards, mask, lambda_=0.5) == (
        'advantage: option must be one of gamma, got "lambda_"'
    )
    assert said("gae", rewards, mask, values=rewards, lamda=1.0) == (
        'advantage: option must be one of gamma, lambda_, got "lamda". Did you mean lambda_?'
    )
    assert said("opo", rewards[0], groups=3, lengths=mask[0], epsilon=1.0) == (
        'advantage: option must not be given, got "epsilon"'
    )
    assert said("opo", rewards[0]) == "advantage: groups must be given, got none"
    assert said("opo", None) == "advantage: rewards must be given, got none"
    assert said("returns", rewards, 2 * mask) == (
        "advantage: response_mask must be in [0, 1], got 2 at [0, 0]"
    )
    assert said("grpo", torch.tensor([0.0, math.nan]), groups=2) == (
        "advantage: rewards must be finite, got nan at [1]. Pass nan_reward = missing to leave it "
        "out of its group"
    )


@pytest.mark.parametrize("gap", ["carry", "decay"])
@pytest.mark.parametrize("extras", [False, True])
def test_gae_equals_reference(gap, extras):
    mask = mask_of()
    rewards, values = normal(*SHAPE, seed=1), normal(*SHAPE, seed=2)
    options = {"gamma": 0.98, "lambda_": 0.9, "gap": gap}
    if extras:
        ends = torch.rand(SHAPE, generator=generator(4))
        options |= {
            "bootstrap": normal(5, seed=3),
            "done": ends < 0.1,
            "truncated": (ends > 0.1) & (ends < 0.2),
            "truncation_values": normal(*SHAPE, seed=5),
            "lambdas": torch.rand(5, generator=generator(6), dtype=torch.float64),
        }
    want = tether.reference.generalized_advantage_estimation(rewards, values, mask, **options)
    poisoned = [torch.where(mask, each, math.nan) for each in (rewards, values)]
    got = tether.generalized_advantage_estimation(*poisoned, mask, **options)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    if not extras:
        offsets, r, v, m = packed(mask, rewards, values, mask)
        options["gap"] = "carry"
        whole = tether.generalized_advantage_estimation(rewards, values, mask, **options)
        rows = tether.generalized_advantage_estimation(r, v, m, offsets=offsets, **options)
        torch.testing.assert_close(rows.advantages, whole.advantages[mask], rtol=1e-13, atol=0)


@pytest.mark.parametrize("gap", ["carry", "decay"])
def test_discounted_returns_equal_reference(gap):
    mask, rewards = mask_of(), normal(*SHAPE, seed=1)
    options = {"gamma": 0.9, "gap": gap, "bootstrap": normal(5, seed=3)}
    want = tether.reference.discounted_returns(rewards, mask, **options)
    poisoned = torch.where(mask, rewards, math.nan)
    got = tether.discounted_returns(poisoned, mask, **options)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", ["group_std", "none"])
def test_group_advantage_equals_reference(dtype, scale):
    rewards = normal(24, dtype=dtype)
    rewards[8:16] = 0.7
    ids = torch.arange(24) // 8
    want = tether.reference.group_advantage(rewards, ids, scale=scale)
    for groups in (8, ids, ids.to(torch.int32)):
        got = tether.group_advantage(rewards, groups, scale=scale)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
        assert (got[8:16] == 0).all()
    order = torch.randperm(24, generator=generator(3))
    shuffled = tether.group_advantage(rewards[order], ids[order], scale=scale)
    torch.testing.assert_close(shuffled, want[order], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("weight", [0.2, 0.5])
def test_whitening_of_no_more_than_one_token_gives_the_mean(weight):
    values, mask = torch.tensor([[1.0, 2.0, 6.0]]), torch.full((1, 3), weight)
    for step in (tether.whiten, tether.reference.whiten):
        centred = step(values, mask)
        assert (centred == 0).all() == (3 * weight <= 1)
        assert torch.isfinite(centred).all() and centred.abs().max() < 10


def test_a_size_may_be_numpys():
    rewards = torch.tensor([1.0, 2.0, 4.0, 8.0])
    sized = tether.group_advantage(rewards, np.int64(2))
    assert torch.equal(sized, tether.group_advantage(rewards, 2))


def test_groups_by_label():
    rewards = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    expected = tether.group_advantage(rewards, torch.tensor([0, 1, 0, 1, 2]))
    for labels in (list("ababc"), ("a", 7, "a", 7, None), np.array(list("ababc"))):
        assert torch.equal(tether.group_advantage(rewards, labels), expected)
        by_name = tether.advantage("grpo", rewards, groups=labels).advantages
        assert torch.equal(by_name, expected)
    by_number = tether.group_advantage(rewards, list(torch.tensor([4, 2, 4, 2, 9])))
    assert torch.equal(by_number, expected)
    assert tether.group_advantage(torch.zeros(0), []).shape == (0,)
    for unordered in ({"a", "b"}, {"a": 1, "b": 2}, b"ab"):
        with pytest.raises(TypeError, match="groups must be a size, a tensor of ids or labels"):
            tether.group_advantage(rewards[:2], unordered)


def test_group_advantage_baselines():
    rewards = torch.tensor([1.0, 2.0, 6.0, 0.0], dtype=torch.float64)
    options = {"scale": "none"}
    got = tether.group_advantage(rewards, 2, baseline="leave_one_out", **options)
    assert got.tolist() == [-1.0, 1.0, 6.0, -6.0]
    assert tether.group_advantage(rewards, 4, baseline="none", **options).tolist() == [1, 2, 6, 0]
    rewards[1] = math.nan
    got = tether.group_advantage(rewards, 4, nan_reward="missing", **options)
    torch.testing.assert_close(got, torch.tensor([-4 / 3, 0, 11 / 3, -7 / 3]).double())


# ---- whitening and KL estimates ------------------------------------------------------------------


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_equals_reference(shift_mean):
    mask, values = mask_of(), 3 + normal(*SHAPE, seed=1)
    want = tether.reference.whiten(values, mask, shift_mean=shift_mean)
    poisoned = torch.where(mask, values, math.nan)
    got = tether.whiten(poisoned, mask, shift_mean=shift_mean)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    halves = [(values[:3], mask[:3]), (values[3:], mask[3:])]
    step = tether.moments(*halves[0]).merge(tether.moments(*halves[1]))
    parts = [tether.whiten(*half, step=step, shift_mean=shift_mean) for half in halves]
    torch.testing.assert_close(torch.cat(parts), want, rtol=1e-12, atol=1e-13)
    flat = tether.whiten(values.flatten(), mask.flatten(), shift_mean=shift_mean)
    torch.testing.assert_close(flat, want.flatten(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([1e200, 0.0, 1.0], [2 / 3**0.5, -1 / 3**0.5, -1 / 3**0.5]),
        ([1.7e308, -1.7e308, 0.0], [1.0, -1.0, 0.0]),
    ],
)
def test_values_whose_squares_overflow_are_whitened(values, wanted, kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr(tether._ops, "KERNELS", frozenset())
    out = tether.whiten(torch.tensor(values, dtype=torch.float64), torch.ones(3))
    assert out.tolist() == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_report_is_the_mean_of_the_estimator(estimator):
    mask, log_ratios = mask_of(), 0.3 * normal(*SHAPE, seed=1)
    mean, error = tether.reference.kl_report(log_ratios, mask, estimator=estimator)[:2]
    report = tether.kl_report(torch.where(mask, log_ratios, math.nan), mask, estimator=estimator)
    assert report.mean == pytest.approx(mean.item(), rel=1e-12)
    assert report.standard_error == pytest.approx(error.item(), rel=1e-12)
    assert report.tokens == mask.sum() and report.sequences == 4
    assert report.ratio_excess == pytest.approx(log_ratios[mask].exp().mean().item() - 1)
    offsets, packed_ratios, active = packed(mask, log_ratios, mask)
    rows = tether.kl_report(packed_ratios, active, estimator=estimator, offsets=offsets)
    assert rows.mean == pytest.approx(mean.item(), rel=1e-12)


def test_kl_report_with_a_fitted_lambda():
    mask, log_ratios = mask_of(), 0.3 * normal(*SHAPE, seed=1)
    fitted = tether.kl_report(log_ratios, mask, estimator="k_lambda")
    d, r = log_ratios[mask], log_ratios[mask].exp()
    covariance = ((d - d.mean()) * (r - r.mean())).sum() / (r - r.mean()).square().sum()
    assert fitted.lambda_ == pytest.approx(covariance.item(), rel=1e-9)
    given = tether.kl_report(log_ratios, mask, estimator="k_lambda", lambda_=1.0)
    assert given.mean == pytest.approx(tether.kl_report(log_ratios, mask).mean, rel=1e-12)


# ---- errors --------------------------------------------------------------------------------------

ROWS, MASK = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)


LEAF = torch.zeros(2, 3, requires_grad=True)


@pytest.mark.parametrize(
    "call",
    [
        lambda: tether.generalized_advantage_estimation(LEAF, ROWS, MASK),
        lambda: tether.generalized_advantage_estimation(ROWS, LEAF, MASK),
        lambda: tether.generalized_advantage_estimation(ROWS, ROWS, MASK, bootstrap=LEAF[:, 0]),
        lambda: tether.discounted_returns(LEAF, MASK),
        lambda: tether.group_advantage(LEAF[:, 0], 2),
        lambda: tether.whiten(LEAF, MASK),
        lambda: tether.kl_report(LEAF, MASK),
    ],
)
def test_gradients_are_not_dropped_in_silence(call):
    with pytest.raises(ValueError, match="must not require grad, got a tensor that does"):
        call()


@pytest.mark.parametrize("stride", [1, 2])
def test_strided_inputs_give_the_same_bits(stride):
    mask = mask_of((5, 34))[:, ::stride][:, :17]
    rewards = normal(5, 34, seed=1)[:, ::stride][:, :17]
    values = normal(34, 5, seed=2).t()[:, ::stride][:, :17]
    for call in (
        lambda r, v, m: tether.generalized_advantage_estimation(r, v, m, gamma=0.9)[0],
        lambda r, v, m: tether.discounted_returns(r, m, gamma=0.9),
        lambda r, v, m: tether.whiten(v, m),
        lambda r, v, m: tether.value_loss(v, r, m).loss,
    ):
        strided = call(rewards, values, mask)
        plain = call(rewards.contiguous(), values.contiguous(), mask.contiguous())
        assert torch.equal(strided, plain)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: tether.value_loss(ROWS, ROWS[:, 1:], MASK),
            ValueError,
            "value_loss: returns must be [2, 3] like values, got [2, 2]",
        ),
        (
            lambda: tether.value_loss(ROWS, ROWS, MASK, clip_range=-1),
            ValueError,
            "value_loss: clip_range must be at least 0, got -1",
        ),
        (
            lambda: tether.value_loss(ROWS, ROWS, MASK, aggregation="mean"),
            ValueError,
            "value_loss: aggregation must be one of token_mean, sequence_mean_token_mean, "
            'sequence_mean_token_sum, sequence_sum_over_constant, token_sum, got "mean"',
        ),
        (
            lambda: tether.value_loss(ROWS, ROWS.clone().requires_grad_(), MASK),
            ValueError,
            "value_loss: returns must not require grad, got a tensor that does. It is a constant "
            "of the loss: pass returns.detach()",
        ),
        (
            lambda: tether.generalized_advantage_estimation(ROWS, ROWS, MASK, gamma=2),
            ValueError,
            "generalized_advantage_estimation: gamma must be in [0, 1], got 2",
        ),
        (
            lambda: tether.generalized_advantage_estimation(ROWS, ROWS, MASK, gap="no"),
            ValueError,
            'generalized_advantage_estimation: gap must be one of carry, decay, got "no"',
        ),
        (
            lambda: tether.generalized_advantage_estimation(
                ROWS, ROWS, MASK, bootstrap=torch.zeros(3)
            ),
            ValueError,
            "generalized_advantage_estimation: bootstrap must be [2], got [3]",
        ),
        (
            lambda: tether.generalized_advantage_estimation(ROWS, ROWS, MASK, done=ROWS),
            TypeError,
            "generalized_advantage_estimation: done must be bool, got float32",
        ),
        (
            lambda: tether.discounted_returns(ROWS[0], MASK[0]),
            ValueError,
            "discounted_returns: rewards must be [B, T], or [N] with offsets, got [3]",
        ),
        (
            lambda: tether.group_advantage(torch.zeros(6), 4),
            ValueError,
            "group_advantage: rewards must divide into groups of 4, got 6. Pass group ids for "
            "ragged groups",
        ),
        (
            lambda: tether.group_advantage(torch.zeros(6), torch.zeros(5, dtype=torch.int64)),
            ValueError,
            "group_advantage: groups must be [6] like rewards, got [5]",
        ),
        (
            lambda: tether.whiten(ROWS.long(), MASK),
            TypeError,
            "whiten: values must be float32, float64, bfloat16 or float16, got int64",
        ),
        (
            lambda: tether.kl_report(ROWS, MASK, estimator="k_lambda", lambda_=-0.5),
            ValueError,
            "kl_report: lambda_ must be at least 0 and finite, got -0.5",
        ),
        (
            lambda: tether.kl_report(ROWS, MASK, estimator="k3", lambda_=0.5),
            ValueError,
            "kl_report: lambda_ must not be given for k3, got one",
        ),
        (
            lambda: tether.whiten(ROWS, 2 * MASK),
            ValueError,
            "whiten: response_mask must be in [0, 1], got 2 at [0, 0]",
        ),
        (
            lambda: tether.whiten(ROWS, MASK, step=(1, 2)),
            TypeError,
            "whiten: step must be Moments, got tuple",
        ),
        (
            lambda: tether.group_advantage(torch.zeros(6), 0),
            ValueError,
            "group_advantage: groups must be at least 1, got 0",
        ),
        (
            lambda: tether.group_advantage(torch.zeros(6), 2.0),
            TypeError,
            "group_advantage: groups must be a size, a tensor of ids or labels, got float",
        ),
        (
            lambda: tether.group_advantage(torch.zeros(6), "prompt"),
            TypeError,
            "group_advantage: groups must be a size, a tensor of ids or labels, got str",
        ),
        (
            lambda: tether.group_advantage(torch.zeros(1), np.array("prompt")),
            TypeError,
            "group_advantage: groups must be a size, a tensor of ids or labels, got numpy.ndarray",
        ),
        (
            lambda: tether.group_advantage(torch.zeros(2), [["a"], ["b"]]),
            TypeError,
            "group_advantage: groups must be a size, a tensor of ids or labels, got one "
            "without a hash",
        ),
        (
            lambda: tether.group_advantage(torch.zeros(2), np.array([np.nan, np.nan])),
            ValueError,
            "group_advantage: groups must be a size, a tensor of ids or labels, got NaN as one",
        ),
        (
            lambda: tether.group_advantage(np.array([1j, 2.0]), 2),
            TypeError,
            "group_advantage: rewards must be float32, float64, bfloat16 or float16, got "
            "complex128",
        ),
        (
            lambda: tether.group_advantage(torch.zeros(2), (torch.tensor([0, 1]),)),
            TypeError,
            "group_advantage: groups must be a size, a tensor of ids or labels, got one that is a "
            "tensor [2]",
        ),
        (
            lambda: tether.group_advantage(torch.zeros(2), ["a", "b", "c"]),
            ValueError,
            "group_advantage: groups must be [2] like rewards, got [3]",
        ),
        (
            lambda: tether.discounted_returns(ROWS, MASK, gap=1),
            TypeError,
            "discounted_returns: gap must be a string, got int",
        ),
        (
            lambda: tether.discounted_returns(ROWS[0], MASK[0], offsets=torch.tensor([0, 2])),
            ValueError,
            "discounted_returns: offsets must run from 0 to 3, the size of rewards, got 0 to 2",
        ),
        (
            lambda: tether.generalized_advantage_estimation(
                ROWS, ROWS, MASK, lambdas=torch.ones(2, 3, dtype=torch.int64)
            ),
            TypeError,
            "generalized_advantage_estimation: lambdas must be float32, float64, bfloat16 or "
            "float16, got int64",
        ),
        (
            lambda: tether.value_loss(ROWS, ROWS, MASK, normalizer=3),
            TypeError,
            "value_loss: normalizer must be a tether.Normalizer, got int",
        ),
        (
            lambda: tether.kl_report(ROWS, MASK, estimator="k9"),
            ValueError,
            'kl_report: estimator must be one of k1, k2, k3, k_lambda, got "k9"',
        ),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value) == message


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_whitening_of_what_is_not_finite_is_nan(broken):
    values = torch.tensor([[broken, 1.0, 2.0, 3.0]])
    out = tether.whiten(values, torch.tensor([[1, 1, 0, 1]]))
    assert out[0, [0, 1, 3]].isnan().all() and out[0, 2] == 0


def test_metrics_of_values_on_other_devices_are_summed_in_float64(monkeypatch):
    values, mask = torch.tensor([[0.786, 0.947, -1.114]]), torch.tensor([[0.4288, 0.8661, 0.8694]])
    for returns in (torch.full((1, 3), -0.1467951), 100 + 0.01 * values):
        expected = tether.value_loss(values, returns, mask).metrics.to_dict()
        with monkeypatch.context() as patch:
            patch.setattr(tether._ops, "KERNELS", frozenset())
            actual = tether.value_loss(values, returns, mask).metrics.to_dict()
        assert actual == pytest.approx(expected, rel=1e-5)
