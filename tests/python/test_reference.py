"""tether.reference by hand: the oracle is checked without the library."""

import json
import math
import pathlib

import pytest
import tether
import torch
from tether import reference

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def derivative(function, *values):
    x = doubles(*values).requires_grad_()
    (gradient,) = torch.autograd.grad(function(x).sum(), x)
    return gradient


# ---- numbers -------------------------------------------------------------------------------------


def test_ties_take_the_first():
    x = doubles(1.0).requires_grad_()
    for function in (reference.numbers.minimum, reference.numbers.maximum):
        (gradient,) = torch.autograd.grad(function(3 * x, 3 + 0 * x), x)
        assert gradient.item() == 3


def test_clamp_passes_the_gradient_on_the_closed_interval():
    gradient = derivative(lambda x: reference.numbers.clamp(x, -1, 2), -1.1, -1.0, 0.5, 2.0, 2.1)
    assert gradient.tolist() == [0, 1, 1, 1, 0]


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 60), (torch.float64, 600)])
def test_exp_saturates_with_the_derivative_of_the_bound(dtype, bound):
    x = torch.tensor([-1e30, -bound, 0, bound, 1e30], dtype=dtype, requires_grad=True)
    y = reference.numbers.exp(x)
    y.sum().backward()
    edge = torch.exp(torch.tensor(float(bound), dtype=dtype)).item()
    assert y.tolist() == pytest.approx([1 / edge, 1 / edge, 1, edge, edge], rel=1e-6)
    assert torch.equal(x.grad, y.detach())


# ---- KL estimators -------------------------------------------------------------------------------


def test_estimators_of_one_sample():
    d = math.log(2)  # other = 2 sampled
    estimates = [each(doubles(d)).item() for each in (reference.k1, reference.k2, reference.k3)]
    assert estimates == pytest.approx([-d, d * d / 2, 1 - d], rel=1e-15)


@pytest.mark.parametrize("d", [1e-300, 1e-8, 0.1, 0.4999, 0.5001, -0.5001, -3.0, 20.0])
def test_k3_without_cancellation(d):
    mp = pytest.importorskip("mpmath")
    mp.mp.dps = 400
    exact = mp.exp(mp.mpf(d)) - 1 - mp.mpf(d)
    assert reference.k3(doubles(d)).item() == pytest.approx(float(exact), rel=1e-15 * 4)
    assert derivative(reference.k3, d).item() == pytest.approx(math.expm1(d), rel=1e-15 * 4)


def test_k3_saturates_above_and_not_below():
    values = reference.k3(doubles(1e4, -1e4))
    assert values.tolist() == pytest.approx([math.exp(600) - 601, 1e4 - 1], rel=1e-14)
    assert derivative(reference.k3, 1e4, -1e4).tolist() == pytest.approx([math.exp(600), -1])


# ---- surrogates ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ratio, advantage, loss, gradient",
    [
        (1.1, +2, -2.2, -2.2),  # inside the region
        (1.5, +2, -2.6, +0.0),  # too likely and good: clipped
        (1.5, -2, +3.0, +3.0),  # too likely and bad: kept, pushes back
        (2.5, -2, +4.0, +0.0),  # far too likely and bad: dual clip
        (0.5, +2, -1.0, -1.0),  # too rare and good: kept
        (0.5, -2, +1.6, +0.0),  # too rare and bad: clipped
    ],
)
def test_ppo_clip_in_six_cases(ratio, advantage, loss, gradient):
    def surrogate(d):
        options = {"epsilon_low": 0.2, "epsilon_high": 0.3, "dual_clip": 2.0}
        return reference.objectives.ppo_clip(d, d, doubles(advantage), **options)[0]

    d = math.log(ratio)
    assert surrogate(doubles(d)).item() == pytest.approx(loss, rel=1e-15)
    assert derivative(surrogate, d).item() == pytest.approx(gradient, rel=1e-15)


def test_surrogates_equal_sixty_digit_arithmetic():
    golden = json.loads((GOLDEN / "policy_golden.json").read_text())
    for name, rows in golden["surrogates"].items():
        logp, old_logp, _, advantage, loss, slope = torch.tensor(rows, dtype=torch.float64).T
        row = reference.OBJECTIVES[name]
        x = logp.clone().requires_grad_()
        out, _ = row.surrogate(x, x - old_logp, advantage, **row.surrogate_options)
        out.sum().backward()
        torch.testing.assert_close(out.detach(), loss, rtol=1e-14, atol=1e-15)
        torch.testing.assert_close(x.grad, slope, rtol=1e-14, atol=1e-15)


def test_reinforce():
    assert reference.objectives.reinforce(doubles(-0.5), doubles(0), doubles(3))[0].item() == 1.5


# ---- aggregation ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "aggregation, expected",
    [
        ("token_mean", [1 / 6, 1 / 6, 1 / 6]),
        ("sequence_mean_token_mean", [1 / 4, 0, 1 / 8]),
        ("sequence_mean_token_sum", [1 / 2, 1 / 2, 1 / 2]),
        ("sequence_sum_over_constant", [1 / 20, 1 / 20, 1 / 20]),
        ("token_sum", [1, 1, 1]),
    ],
)
def test_row_factors(aggregation, expected):
    factors = reference.rows.row_factors(aggregation, doubles(2, 0, 4), constant=10)
    assert factors.tolist() == pytest.approx(expected, rel=1e-15)


def test_row_factors_of_nothing_are_0():
    for aggregation in ("token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum"):
        assert reference.rows.row_factors(aggregation, doubles(0, 0)).tolist() == [0, 0]


# ---- preference losses ---------------------------------------------------------------------------


LINKS = list(reference.LINKS)


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("objective", reference.PREFERENCES)
def test_an_infinite_upstream_gradient_makes_no_nan_of_preference_losses(objective, link):
    logps = torch.tensor([[-1.0, -2, -9], [-3, -0.5, -7], [-1.5, -2, -1], [-2, -0.7, -8]])
    mask = torch.tensor([[1.0, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1]])
    logps, ref_logps = logps.double().requires_grad_(), 1.1 * logps.double()
    options = {"objective": objective, "link": link, "reference": link != "log_odds"}
    out = reference.preference_loss(logps, mask, ref_logps, **options)
    finite, infinite = (
        torch.autograd.grad(out.loss, logps, doubles(upstream)[0], retain_graph=True)[0]
        for upstream in (1.0, math.inf)
    )
    assert torch.equal(infinite, torch.where(finite == 0, 0.0, finite.sign() * math.inf))


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("objective", reference.PREFERENCES)
@pytest.mark.parametrize("beta", [5e-324, 1e-300, 0.1, 1e12])
def test_preference_losses_are_nan_for_no_finite_input(objective, beta, link):
    for size in (1.0, 1e300, torch.finfo(torch.float64).max):
        logps = doubles(-size, size, size, -size)[:, None].requires_grad_()
        options = {"objective": objective, "link": link, "beta": beta}
        if link == "log_odds":
            logps = (-logps.detach().abs()).requires_grad_()
            options["reference"] = False
        out = reference.preference_loss(logps, torch.ones(4, 1), -logps.detach(), **options)
        out.loss.backward()
        for each in (out.loss, out.sums, logps.grad):
            assert not each.isnan().any()


# ---- advantages ----------------------------------------------------------------------------------


def test_group_advantage_by_hand():
    rewards, groups = doubles(1, 5, 3, 5, 2, 7), torch.tensor([0, 1, 0, 1, 0, 2])
    std = reference.group_advantage(rewards, groups, epsilon=0)
    assert std.tolist() == pytest.approx([-1, 0, 1, 0, 0, 0], abs=1e-15)
    none = reference.group_advantage(rewards, groups, scale="none")
    assert none.tolist() == [-1, 0, 1, 0, 0, 0]


def test_equal_rewards_give_exactly_0_and_missing_ones_are_left_out():
    thirds = torch.full((7,), 0.1, dtype=torch.float32)
    one_group = torch.zeros(7, dtype=torch.int64)
    assert reference.group_advantage(thirds, one_group).tolist() == [0] * 7
    missing = reference.group_advantage(doubles(math.nan, 1, 3), one_group[:3], scale="none")
    assert missing.tolist() == [0, -1, 1]


def test_discounted_returns_by_hand():
    rewards = doubles(1, math.nan, 2, 4)[None]
    mask = torch.tensor([[True, False, True, True]])
    carry = reference.discounted_returns(rewards, mask, gamma=0.5)
    assert carry.tolist() == [[1 + 0.5 * 4, 0, 2 + 0.5 * 4, 4]]
    decay = reference.discounted_returns(rewards, mask, gamma=0.5, gap="decay")
    assert decay.tolist() == [[1 + 0.25 * 4, 0, 4, 4]]
    bootstrapped = reference.discounted_returns(rewards, mask, gamma=0.5, bootstrap=doubles(8))
    assert bootstrapped.tolist() == [[4.0 / 2 + 1 + 1, 0, 2 + 0.5 * 8, 8]]
    padded = reference.discounted_returns(
        doubles(1, 2, 5)[None],
        torch.tensor([[True, True, False]]),
        gamma=0.5,
        gap="decay",
        bootstrap=doubles(8),
    )
    assert padded.tolist() == [[1 + 0.5 * 6, 2 + 0.5 * 8, 0]]


# ---- log-probabilities ---------------------------------------------------------------------------


def test_token_logps_by_hand():
    logits = doubles(math.log(1), math.log(3), -math.inf, math.log(4)).expand(3, 4)
    targets = torch.tensor([1, -100, 2])
    x = logits.clone().requires_grad_()
    logps, entropies = reference.token_logps(x, targets)
    assert logps.tolist() == pytest.approx([math.log(3 / 8), 0, -math.inf])
    p = [1 / 8, 3 / 8, 4 / 8]
    entropy = -sum(each * math.log(each) for each in p)
    assert entropies.tolist() == pytest.approx([entropy, 0, entropy])
    (logps[0] + entropies.sum()).backward()
    slope = [-each * (math.log(each) + entropy) for each in p]
    expected = [slope[0] - p[0], slope[1] + 1 - p[1], 0, slope[2] - p[2]]
    assert x.grad[0].tolist() == pytest.approx(expected, abs=1e-15)
    assert x.grad[1].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("largest", [1e30, 2e38])
def test_entropies_of_far_columns_have_no_slope_at_any_upstream_gradient(largest):
    logits = torch.tensor([[0.0, largest]], requires_grad=True)
    _, entropies = reference.token_logps(logits, torch.tensor([0]))
    (gradient,) = torch.autograd.grad(entropies, logits, torch.tensor([1e9]))
    assert gradient.tolist() == [[0, 0]]


def test_token_statistics_by_hand():
    logits = doubles(math.log(1), math.log(3), -math.inf, math.log(4)).expand(4, 4)
    squares, means, largest = reference.token_statistics(logits, torch.tensor([3, 1, -100, 2]))
    assert squares.tolist() == pytest.approx([26 / 64, 26 / 64, 1, 26 / 64], rel=1e-15)
    mean = math.log(12) / 3
    assert means.tolist() == pytest.approx([mean, mean, 0, mean], rel=1e-15)
    assert largest.tolist() == [True, False, True, False]


def test_temperature_divides_the_logits():
    logits, targets = torch.randn(4, 6).double(), torch.tensor([0, 5, 2, 2])
    hot = reference.token_logps(logits, targets, temperature=2)
    for actual, expected in zip(hot, reference.token_logps(logits / 2, targets), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-15, atol=0)


def test_the_reference_is_part_of_the_package():
    assert tether.reference is reference


@pytest.mark.parametrize("softcap", [0, 5.0])
def test_nothing_of_an_ignored_row_reaches_the_gradient(softcap):
    logits = torch.zeros(2, 4, dtype=torch.float64)
    logits[1] = math.nan
    logits.requires_grad_()
    logps, entropies = tether.reference.token_logps(
        logits, torch.tensor([1, -100]), softcap=softcap
    )
    (logps.sum() + entropies.sum()).backward()
    assert logits.grad.isfinite().all() and not logits.grad[1].any() and logits.grad[0].any()


@pytest.mark.parametrize("pairs", [0, 0.0, -1.0, math.nan, math.inf, torch.tensor(0.0)])
def test_pairs_that_are_no_count_spoil_the_loss(pairs):
    logps = -torch.arange(1.0, 5.0).view(4, 1).requires_grad_()
    mask = torch.ones(4, 1)
    out = tether.reference.preference_loss(logps, mask, 1.1 * logps.detach(), pairs=pairs)
    assert out.loss.isnan()
    empty = tether.reference.preference_loss(logps, 0 * mask, logps.detach(), pairs=pairs)
    assert empty.loss == 0 and not torch.autograd.grad(empty.loss, logps)[0].any()


def gradients_of_confident_rows(function, dtype, distance):
    """Of rows q and p whose column 2 stands above the others, and how much those have."""
    q, p = (
        torch.randn(9, generator=torch.manual_seed(seed), dtype=torch.float64) for seed in (1, 2)
    )
    q[2] = p[2] = distance
    leaves = [each.to(dtype).requires_grad_() for each in (q, p)]
    gradients = torch.autograd.grad(function(*leaves), leaves, allow_unused=True)
    exact = [each.detach().double().requires_grad_() for each in leaves]
    wanted = torch.autograd.grad(function(*exact), exact, allow_unused=True)
    mass = sum(torch.softmax(each, -1)[[0, 1, 3, 4, 5, 6, 7, 8]].sum().item() for each in exact)
    return [(a.double(), b) for a, b in zip(gradients, wanted, strict=True) if a is not None], mass


@pytest.mark.parametrize("distance", [5.0, 20.0, 30.0])
@pytest.mark.parametrize(
    "function",
    [
        lambda q, p: reference.categorical_kl(q, p)[0],
        lambda q, p: reference.categorical_kl(q, p)[1],
        lambda q, p: reference.categorical_kl(q, p)[2],
        lambda q, p: reference.token_logps(q, torch.tensor(2))[0],
        lambda q, p: reference.token_logps(q, torch.tensor(2))[1],
    ],
)
def test_gradients_of_confident_columns_keep_their_digits(function, distance):
    pairs, mass = gradients_of_confident_rows(function, torch.float32, distance)
    for got, _ in pairs:
        others = got.sum() - got[2]
        assert (got[2] + others).abs().item() <= 2.0**-22 * mass * (4 + distance)
    for _, want in pairs:
        others = want.sum() - want[2]
        assert (want[2] + others).abs().item() <= 2.0**-51 * mass * (4 + distance)


EXTREMES = {torch.float32: [1.0, 1e10, 1e30, 3e38], torch.float64: [1.0, 1e30, 1e300, 1.7e308]}


@pytest.mark.parametrize("temperature", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_divergences_are_nan_for_no_finite_logits(dtype, temperature):
    for size in EXTREMES[dtype]:
        q = (size * torch.tensor([1.0, -1, 0, 1, 0], dtype=dtype)).requires_grad_()
        p = (size * torch.tensor([-1.0, 1, 0, 1, 1], dtype=dtype)).requires_grad_()
        values = reference.categorical_kl(q, p, temperature=temperature)
        sum(values).backward()
        for each in (*values, q.grad, p.grad):
            assert not each.isnan().any(), size
        for tail in ("bucket", "k1", "k3"):
            for log_p in (0.0, -1.0, -1e4, -size):
                q.grad = None
                value = reference.top_k_kl(
                    q[None],
                    torch.tensor([[0, 3]]),
                    torch.tensor([[log_p, -1.0]], dtype=dtype),
                    torch.tensor([1]),
                    torch.tensor([log_p], dtype=dtype),
                    tail=tail,
                    temperature=temperature,
                )
                value.sum().backward()
                assert not value.isnan().any() and not q.grad.isnan().any(), (size, log_p, tail)


def test_a_kl_may_be_differentiated_twice():
    generator = torch.Generator().manual_seed(4)
    q, p = (torch.randn(2, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    q[0, 1] += 5  # most of the row
    q, p = q.requires_grad_(), p.requires_grad_()
    for i in range(3):

        def of(q, p, i=i):
            return reference.categorical_kl(q, p, temperature=0.7)[i]

        assert torch.autograd.gradcheck(of, (q, p)) and torch.autograd.gradgradcheck(of, (q, p))


def test_rows_of_logits_may_be_differentiated_twice():
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(3, 6, generator=generator, dtype=torch.float64).requires_grad_()
    y = torch.randn(3, 6, generator=generator, dtype=torch.float64).log_softmax(-1)
    ids = torch.tensor([0, 5, 2])
    kept = torch.tensor([[0, 1], [3, 5], [2, 4]])
    for of in (
        lambda x: reference.token_logps(x, ids)[0],
        lambda x: reference.token_logps(x, ids)[1],
        lambda x: reference.top_k_kl(x, kept, y.gather(1, kept), tail="bucket"),
    ):
        assert torch.autograd.gradcheck(of, (x,)) and torch.autograd.gradgradcheck(of, (x,))


def test_columns_at_minus_infinity_beside_almost_nothing_add_nothing():
    for dtype in (torch.float32, torch.float64):
        q = torch.tensor([0.0, 1, -200], dtype=dtype)
        p = torch.tensor([1.0, 0, -math.inf], dtype=dtype)
        with_column = reference.categorical_kl(q, p)
        without = reference.categorical_kl(q[:2], p[:2])
        torch.testing.assert_close(with_column, without)


def confident_head(distance):
    """log q [1, 9] with column 2 far above, the ids of a head with it, and what the others have."""
    x = torch.randn(9, generator=torch.manual_seed(3), dtype=torch.float64)
    x[2] = distance
    others = [0, 1, 3, 4, 5, 6, 7, 8]
    rest = (x[others] - distance).exp().sum()
    log_q = (x - distance) - torch.log1p(rest)
    return log_q[None], torch.tensor([[5, 2]]), log_q[[0, 1, 3, 4, 6, 7, 8]].exp().sum()


@pytest.mark.parametrize("distance", [10.0, 20.0, 30.0])
def test_tails_of_confident_heads_keep_their_digits(distance):
    log_q, ids, tail = confident_head(distance)
    mass = reference.logps.mass_beside(log_q.gather(-1, ids))
    torch.testing.assert_close(mass[0], tail, rtol=1e-14, atol=0)
    # Of uniform p: log(Q / P) of the sample, with all of the digits.
    uniform = torch.full((1, 2), -math.log(9), dtype=torch.float64)
    k1 = reference.top_k_kl(
        log_q, ids, uniform, torch.tensor([4]), uniform[:, 0], tail="k1", precision=2.0**-52
    )
    head = (log_q[0, ids[0]].exp() * (log_q[0, ids[0]] + math.log(9))).sum()
    gap = (tail / (7 / 9)).log()
    want = head + tail * gap + log_q[0, 4] + math.log(9) - gap
    torch.testing.assert_close(k1[0], want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("tail", ["bucket", "k1", "k3"])
@pytest.mark.parametrize("poison", [math.inf, math.nan])
def test_nan_and_plus_infinity_make_their_position_nan(poison, tail):
    q = torch.tensor([[0.0, 1, 2, -math.inf]] * 3)
    ids, targets = torch.tensor([[0, 3]] * 3), torch.tensor([1, 0, 1])
    for place in range(4):  # in the head, also where q is 0, at the sample, and in q
        x, head, sample = q.clone(), torch.full((3, 2), -1.5), torch.full((3,), -1.5)
        if place < 2:
            head[1, place] = poison
        elif place == 2:
            sample[1] = poison
        else:
            x[1, 2] = poison
        x.requires_grad_()
        kl = reference.top_k_kl(x, ids, head, targets, sample, tail=tail)
        kl.sum().backward()
        expected = place != 2 or tail != "bucket"
        assert kl.isnan().tolist() == [False, expected, False]
        assert x.grad[1, :3].isnan().all().item() == expected
        assert x.grad[[0, 2]].isfinite().all()
