"""What is no finite number comes out alike by the kernels and on the path of other devices."""

import math

import pytest
import tether
import torch
from paths import on_both_paths

BROKEN = pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
NAN, INF = math.nan, math.inf


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


# ---- estimators ----------------------------------------------------------------------------------


@BROKEN
@pytest.mark.parametrize("place", [0, 4])
@pytest.mark.parametrize(
    "options", [("k1", None), ("k3", None), ("k_lambda", None), ("k_lambda", 0.5)]
)
def test_a_log_ratio_makes_all_of_a_report_nan(broken, place, options, monkeypatch):
    log_ratios = torch.tensor([[0.1, -0.3, 7.0], [0.2, 0.4, -0.1]], dtype=torch.float64)
    log_ratios.view(-1)[place] = broken
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    estimator, lambda_ = options

    def run():
        report = tether.kl_report(log_ratios, mask, estimator=estimator, lambda_=lambda_)
        return torch.tensor(report, dtype=torch.float64)

    first, second = on_both_paths(run, monkeypatch)
    fitted = estimator == "k_lambda" and lambda_ is None
    known = {"k_lambda": NAN if fitted else 0.5}.get(estimator, 0.0)
    wanted = torch.tensor([NAN, NAN, known, NAN, NAN, 5, 2], dtype=torch.float64)
    assert_same((first, second), (wanted, wanted))


@BROKEN
@pytest.mark.parametrize("estimator", ["gae", "returns", "vtrace"])
@pytest.mark.parametrize("gap", ["carry", "decay"])
@pytest.mark.parametrize("nothing", ["gamma", "lambda_", "lambdas", "c_bar", "none"])
@pytest.mark.parametrize("name", ["rewards", "values", "log_ratios", "bootstrap"])
def test_a_token_makes_those_before_it_nan(broken, estimator, gap, nothing, name, monkeypatch):
    row = tether.advantages()[estimator]
    tokens = {
        each: torch.arange(1.0, 8.0)[None] / 8 for each in ("rewards", "values", "log_ratios")
    }
    tokens["bootstrap"] = torch.tensor([0.5])
    tokens[name][..., -1] = broken  # the last token, and what is behind it
    tokens["done"] = torch.arange(7)[None] == 1
    options = {"gamma": 0.9, "gap": gap}
    if nothing == "lambdas":
        tokens["lambdas"] = torch.zeros(1, 7)
    elif nothing == "gamma" or nothing in row.options:
        options[nothing] = 0.0
    mask = torch.tensor([[1, 1, 1, 0, 1, 0, 1]])

    def run():
        return tether.advantage(estimator, response_mask=mask, **tokens, **options)

    first, second = on_both_paths(run, monkeypatch)
    read = {"gae": {"values"}, "returns": set(), "vtrace": {"values", "log_ratios"}}[estimator]
    spoils = name in read | {"rewards", "bootstrap"}
    wanted = [spoils and place in (2, 4, 6) for place in range(7)]
    for each in (*first, *second):
        assert each[0].isnan().tolist() == wanted
    assert_same(second, first)


# ---- the loss of a value head --------------------------------------------------------------------


@BROKEN
@pytest.mark.parametrize("place", [0, 4])
@pytest.mark.parametrize("name", ["values", "returns", "old_values"])
def test_a_token_makes_the_metrics_of_values_nan(broken, place, name, monkeypatch):
    arrays = {
        "values": torch.tensor([[0.1, 0.7, 9.0], [0.3, -0.2, 0.4]]),
        "returns": torch.tensor([[0.2, 0.4, 9.0], [0.9, -0.1, 0.3]]),
        "old_values": torch.tensor([[0.1, 0.2, 9.0], [0.9, -0.1, 0.3]]),
    }
    arrays[name].view(-1)[place] = broken
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])

    def run():
        out = tether.value_loss(**arrays, response_mask=mask)
        return out.loss, out.metrics.sums, out.metrics.to_dict()

    first, second = on_both_paths(run, monkeypatch)
    assert_same(second[:2], first[:2])
    assert second[2] == pytest.approx(first[2], nan_ok=True, rel=1e-6)
    loss, sums, metrics = first
    of_returns, of_errors = name == "returns", name != "old_values"
    assert loss.isnan() and math.isnan(metrics["value_loss"])
    assert sums.isnan().tolist() == [
        *(False, True, False, of_returns, of_returns, of_errors, of_errors, of_returns, of_errors)
    ]
    assert math.isnan(metrics["explained_variance"]) == of_errors


# ---- pairs, and answers with labels --------------------------------------------------------------


@BROKEN
@pytest.mark.parametrize("objective", tether.objectives("preference"))
@pytest.mark.parametrize("name", ["logps", "ref_logps", "baselines"])
@pytest.mark.parametrize("ld_alpha", [1, 0])
@pytest.mark.parametrize("link", ["reverse_kl", "js"])
def test_every_slope_of_a_broken_answer_is_nan(
    broken, objective, name, ld_alpha, link, monkeypatch
):
    labelled = objective == "kto"
    if (name == "ref_logps" and objective == "orpo") or (labelled and ld_alpha == 0):
        return
    if name == "logps" and objective == "orpo" and broken == INF:
        return  # refused
    generator = torch.Generator().manual_seed(3)
    mask = torch.arange(4) < torch.tensor([[4], [2], [3], [3]])
    batch = {each: -torch.rand(4, 4, generator=generator) - 0.1 for each in ("logps", "ref_logps")}
    batch["baselines"] = torch.tensor([0.0, 0, 100, 0])  # far beyond the hinge
    batch["link"] = "log_odds" if objective == "orpo" else link
    batch[name][:1].view(-1)[0] = broken  # of the first answer
    if labelled:
        batch["labels"] = torch.tensor([False, True, True, False])
    elif ld_alpha == 0:
        batch["ld_alpha"] = 0

    def run():
        logps = batch["logps"].clone().requires_grad_()
        given = batch | {"logps": logps, "nll_coef": 0.3 * ld_alpha}
        loss, metrics = tether.preference_loss(response_mask=mask, objective=objective, **given)
        loss.backward()
        return logps.grad, metrics.sums[7], loss.detach()  # of the likelihood

    wanted = torch.zeros(4, 4, dtype=torch.bool)
    wanted[0] = mask[0]
    wanted[0, 3] = ld_alpha != 0  # behind the end of the other answer
    if not labelled:
        wanted[2] = mask[2]
    for slopes, likelihood, loss in on_both_paths(run, monkeypatch):
        assert loss.isnan()
        assert torch.equal(slopes.isnan(), wanted)
        assert (slopes[~mask] == 0).all() and (slopes[mask & ~wanted] != 0).any()
        # A bad answer has no likelihood to break.
        assert likelihood[0].isnan() == (not labelled and ld_alpha != 0)


# ---- rows of logits ------------------------------------------------------------------------------


@BROKEN
@pytest.mark.parametrize("columns", [2, 9, 40])
@pytest.mark.parametrize("kept", [False, True])
def test_no_target_is_the_largest_of_a_broken_row(broken, columns, kept, monkeypatch):
    logits = torch.zeros(columns, columns)  # of each row another column
    logits.fill_diagonal_(broken)
    targets = torch.arange(columns).roll(1)
    ids = torch.arange(columns).expand(columns, columns)
    nothing = torch.full((1, columns), -INF)
    support = {"support": tether.support(targets, ids)} if kept else {}

    def run():
        out = tether.token_logps(logits, targets, statistics=True, **support)
        first = tether.support(targets[:1], ids[:1]) if kept else None
        last = tether.token_logps(nothing, targets[:1], statistics=True, support=first)
        assert last.logps.isnan() and not last.target_is_largest
        return out.target_is_largest, out.logps

    for largest, logps in on_both_paths(run, monkeypatch):
        assert logps.isnan().all() == (broken != -INF)
        assert (largest == (broken == -INF)).all()


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("place", [0, 40, 2050])
@pytest.mark.parametrize("others", [0.0, -INF])
def test_an_infinite_logit_is_no_number_whatever_the_cap(softcap, place, others, monkeypatch):
    logits = torch.full((2, 2100), others)
    logits[:, 1], logits[0, place] = 1.0, INF
    logits.requires_grad_()

    def run():
        options = {"softcap": softcap, "entropies": True, "statistics": True}
        out = tether.token_logps(logits, torch.tensor([1, 1]), **options)
        (gradient,) = torch.autograd.grad((out.logps + 2 * out.entropies).sum(), logits)
        return *out[:3], gradient

    first, second = on_both_paths(run, monkeypatch)
    assert_same(second, first)
    assert all(each[0].isnan().all() and each[1].isfinite().all() for each in first)


def kl_gradients(q, p, upstream):
    q, p = (each.clone().requires_grad_() for each in (q, p))
    out = tether.categorical_kl(q, p)
    loss = sum((each * x).sum() for each, x in zip(out, upstream, strict=True) if x is not None)
    return torch.autograd.grad(loss, (q, p), materialize_grads=True)


@pytest.mark.parametrize("entropy", [None, 2.0])
def test_an_infinite_upstream_gradient_of_a_kl_leaves_zeros_alone(entropy, monkeypatch):
    generator = torch.Generator().manual_seed(3)
    q, p = (torch.randn(3, 40, generator=generator) for _ in range(2))
    q[:, 5] = p[:, 5] = -INF  # there in neither row
    q[:, 6] = p[:, 6] = -900.0  # of probability 0 in both
    other = None if entropy is None else torch.tensor([entropy, 1, 0])
    sign = None if entropy is None else torch.tensor([0.0, 1, 0])
    upstream = torch.tensor([INF, 0.5, -INF]), None, other
    signs = torch.tensor([1.0, 0.5, -1]), None, sign

    first, second = on_both_paths(lambda: kl_gradients(q, p, upstream), monkeypatch)
    for each, finite in zip(second, kl_gradients(q, p, signs), strict=True):
        large = torch.where(finite == 0, 0.0, finite.sign() * INF)
        torch.testing.assert_close(each, torch.stack([large[0], finite[1], large[2]]))
        assert (each[:, 5:7] == 0).all()
    assert_same(second, first)


@pytest.mark.parametrize("swapped", [False, True])
def test_the_gradients_of_an_infinite_kl(swapped, monkeypatch):
    q, p = torch.tensor([[0.0, 1, 2], [1, 2, 0]]), torch.tensor([[1.0, -INF, 0], [2, 0, 1]])
    q, p = (p, q) if swapped else (q, p)
    for upstream in ([1, None, None], [None, 1, None], [None, None, 1], [1, 1, 1], [0, 1, 1]):
        given = [None if each is None else torch.full((2,), float(each)) for each in upstream]
        with monkeypatch.context() as patch:
            first, second = on_both_paths(lambda each=given: kl_gradients(q, p, each), patch)
        assert_same(second, first)


# A row, one that lacks a column of it, and the columns without a gradient of the infinite
# divergence: those of a probability that counts as more than 0.
INFINITE = [
    ([0.0, 1, 2], [1.0, -INF, 0], [1, 1, 1]),
    ([49.0, -28, -INF], [-INF, 9, -INF], [1, 0, 0]),
    ([30.0, -12, -45], [-INF, 0, 1], [1, 1, 0]),
    ([0.0, -INF], [-INF, 0], [1, 0]),
]


@pytest.mark.parametrize("temperature", [1e-6, 0.5, 1, 2])
@pytest.mark.parametrize(("own", "other", "spoiled"), INFINITE)
def test_an_infinite_kl_has_no_gradient_where_there_is_a_probability(
    own, other, spoiled, temperature, monkeypatch
):
    own, other = (torch.tensor([each]) * temperature for each in (own, other))

    def gradients(swapped):
        x, y = (each.clone().requires_grad_() for each in (own, other))
        pair = (y, x) if swapped else (x, y)
        out = tether.categorical_kl(*pair, temperature=temperature)
        kl = out.reverse_kl if swapped else out.kl
        assert kl.item() == INF
        return torch.autograd.grad(kl.sum(), (x, y))

    for swapped in (False, True):
        with monkeypatch.context() as patch:
            both = on_both_paths(lambda swapped=swapped: gradients(swapped), patch)
        for by_own, by_other in both:
            assert by_own.isnan().tolist() == [[bool(each) for each in spoiled]]
            assert by_own.nan_to_num().abs().max() == 0 and by_other.isfinite().all()


@pytest.mark.parametrize("row", [[-INF, -INF, -INF], [NAN, 0, 1], [INF, 0, 1]])
@pytest.mark.parametrize("of_q", [True, False])
def test_a_broken_row_of_a_kl_spoils_the_gradients_of_both(row, of_q, monkeypatch):
    rows = torch.tensor([row, [0, 1, 2]]), torch.tensor([[1.0, 2, 3], [2, 0, 1]])
    q, p = rows if of_q else rows[::-1]
    for upstream in ([1, None, None], [None, 1, None], [None, None, 1]):
        given = [None if each is None else torch.full((2,), float(each)) for each in upstream]
        with monkeypatch.context() as patch:
            both = on_both_paths(lambda each=given: kl_gradients(q, p, each), patch)
        for each in (*both[0], *both[1]):
            assert each[0].isnan().all() and each[1].isfinite().all()


def test_logits_far_beyond_a_small_temperature_keep_their_order(monkeypatch):
    q, p = torch.tensor([[9e29, 7e29, -2e29]]), torch.tensor([[1e29, 2e29, 8e29]])

    def results():
        out = tether.categorical_kl(q, p, temperature=1e-6)
        x = q.clone().requires_grad_()
        (slopes,) = torch.autograd.grad(tether.categorical_kl(x, p, temperature=1e-6).kl, x)
        return out.entropies, slopes, out.kl > 1e33

    first, second = on_both_paths(results, monkeypatch)
    assert_same(second, first)
    assert second[0] == 0 and second[2]


def logits_results(function, upstreams):
    """The gradient of rows under the upstream gradients of each result of a function."""
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(4))
    logits[:, 5] = -INF
    logits[:, 6] = -900.0  # of probability 0
    logits.requires_grad_()
    given = [torch.tensor(each) for each in upstreams]
    return torch.autograd.grad(function(logits), logits, given)


@pytest.mark.parametrize("softcap", [0.0, 8.0])
@pytest.mark.parametrize("of_entropies", [0.5, -INF])
def test_an_infinite_upstream_gradient_of_rows_leaves_zeros_alone(
    softcap, of_entropies, monkeypatch
):
    def results(logits):
        options = {"softcap": softcap, "entropies": True}
        return tether.token_logps(logits, torch.tensor([3, -100, 7]), **options)[:2]

    upstreams = [INF, INF, 0.5], [of_entropies] * 3
    sign = math.copysign(1.0, of_entropies) if math.isinf(of_entropies) else 0.0
    # Infinite, and times the sign of the slope: what is finite beside it is nothing.
    signs = [1.0, 1, 0.0 if sign else 0.5], [sign, sign, sign or 0.5]
    paths = on_both_paths(lambda: logits_results(results, upstreams)[0], monkeypatch)
    slopes = logits_results(results, signs)[0]
    grown = slopes.isfinite() & (slopes != 0)
    for each in paths:
        assert (each[1] == 0).all() and (each[:, 5] == 0).all()
        assert torch.equal(each[0], torch.where(grown[0], slopes[0] * INF, 0.0))
        assert each[2].isinf().any() == bool(sign)


@pytest.mark.parametrize("tail", ["bucket", "k1", "k3", "reverse_bucket"])
def test_an_infinite_upstream_gradient_of_top_k_kl_leaves_zeros_alone(tail, monkeypatch):
    ids, y = torch.tensor([[0, 1, 2]] * 3), torch.tensor([1, -100, 7])
    p = -torch.rand(3, 4, generator=torch.Generator().manual_seed(5)) - 2

    def results(logits):
        return (tether.top_k_kl(logits, ids, p[:, :3], y, p[:, 3], tail=tail),)

    paths = on_both_paths(lambda: logits_results(results, [[INF, INF, 0.5]])[0], monkeypatch)
    slopes = logits_results(results, [[1.0, 1, 0.5]])[0]
    for each in paths:
        assert torch.equal(each[0], torch.where(slopes[0] == 0, 0.0, slopes[0] * INF))
        assert (each[1] == 0).all() and each[2].isfinite().all()


@BROKEN
@pytest.mark.parametrize("objective", tether.objectives())
def test_a_broken_token_of_a_policy_spoils_the_same_on_both_paths(broken, objective, monkeypatch):
    generator = torch.Generator().manual_seed(5)
    logps = -torch.rand(3, 5, generator=generator) - 0.2
    around = {
        name: logps + torch.rand(3, 5, generator=generator) - 0.5
        for name in ("old_logps", "ref_logps", "rollout_logps")
    }
    batch = around | {
        "logps": logps,
        "entropies": torch.rand(3, 5, generator=generator),
        "advantages": torch.randn(3, 5, generator=generator),
        "response_mask": torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]),
    }
    for name in (*around, "logps", "entropies", "advantages"):
        given = batch | {name: batch[name].clone()}
        given[name][0, 3] = given[name][1, 2] = broken

        def run(given=given):
            leaves = {key: given[key].clone().requires_grad_() for key in ("logps", "entropies")}
            out = tether.policy_loss(
                objective=objective, beta=0.1, entropy_coef=0.01, **given | leaves
            )
            return out.loss.detach(), *torch.autograd.grad(out.loss, leaves.values())

        for a, b in zip(*on_both_paths(run, monkeypatch), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6, equal_nan=True, msg=name)
            assert a.dim() == 0 or a[0].isfinite().all(), name
