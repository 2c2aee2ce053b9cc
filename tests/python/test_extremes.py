"""Options at the ends of their ranges and numbers of any size: the CPU's kernels and the path of
other devices give the same, and what is finite gives what is finite."""

import math

import pytest
import tether
import torch
from paths import on_both_paths

INFINITY, NAN = math.inf, math.nan
SIZES = (1.0, -1.0, 0.5, -2.0)


def assert_alike(one, other, rtol=1e-5, where=""):
    for a, b in zip(one, other, strict=True):
        a, b = (torch.as_tensor(each).double() for each in (a, b))
        assert torch.allclose(a, b, rtol=rtol, atol=1e-36, equal_nan=True), (where, a, b)


def loss_of(objective, dtype=torch.float32, advantages=SIZES, **arrays_and_options):
    """Loss, gradients by logps and entropies, sums of metrics."""
    logps = torch.tensor([[-0.5, -0.8, -0.1, -0.3]], dtype=dtype)
    arrays = {
        "logps": logps,
        "old_logps": logps + torch.tensor([[0.1, -0.2, 0.05, -0.1]], dtype=dtype),
        "ref_logps": logps + torch.tensor([[-0.1, 0.3, 0.2, -0.4]], dtype=dtype),
        "rollout_logps": logps + torch.tensor([[0.2, 0.1, -0.1, 0.3]], dtype=dtype),
        "advantages": torch.tensor([advantages], dtype=dtype),
        "response_mask": torch.ones(1, 4, dtype=torch.bool),
    }
    options = {}
    for name, each in arrays_and_options.items():
        is_array = isinstance(each, (list, tuple))
        (arrays if is_array else options)[name] = (
            torch.tensor([each], dtype=dtype) if is_array else each
        )
    leaves = [arrays[k].requires_grad_() for k in ("logps", "entropies") if k in arrays]
    out = tether.policy_loss(**arrays, objective=objective, **options)
    return out.loss.detach(), *torch.autograd.grad(out.loss, leaves), out.metrics.sums


# ---- options -------------------------------------------------------------------------------------


def every_option():
    for family in ("policy", "preference", "value"):
        for name, row in tether.objectives(family).items():
            yield from ((name, option, each) for option, each in row.options.items())
    for name, row in tether.weights().items():
        yield from ((name, option, each) for option, each in row.options.items())


def test_an_option_is_infinite_or_small_enough_for_every_dtype():
    for name, option, each in every_option():
        assert each.high == INFINITY or each.high <= 1e12, (name, option)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("objective", tuple(tether.objectives()))
def test_options_at_their_ends_give_the_same_finite_loss(objective, dtype, monkeypatch):
    for name, each in tether.objectives()[objective].options.items():
        if "." in name:
            continue
        ends = [each.low] if each.low > -INFINITY and not each.above else []
        for value in (*ends, each.high, 1e300 if each.high == INFINITY else each.high):

            def run(name=name, value=value):
                more = {"beta": 0.1, "kl_correction": "ratio"} if "kl" in name else {}
                more |= {"entropies": [0.5, 0.2, 0.1, 0.4]} if name == "entropy_coef" else {}
                more |= {"ratio_high": INFINITY} if name == "ratio_low" else {}
                level = {"level": "sequence_mean"} if name.startswith("log_ratio") else {}
                return loss_of(objective, dtype, **more | level | {name: value})

            one, other = on_both_paths(run, monkeypatch)
            assert_alike(one, other, 1e-4, (name, value))
            assert all(torch.as_tensor(each).isfinite().all() for each in one), (name, value)


@pytest.mark.parametrize(
    ("objective", "options", "message"),
    [
        ("topr", {"weight_neg": 1e300}, "weight_neg must be in [0, 1e+12], got 1e+300"),
        ("sppo", {"scale": 1e30}, "scale must be in [0, 1e+12], got 1e+30"),
        ("dr_grpo", {"constant": 1.7e308}, "constant must be in (0, 1e+12], got 1.7e+308"),
        ("grpo", {"beta": 1e39}, "beta must be in [0, 1e+12], got 1e+39"),
        ("cispo", {"ratio_low": INFINITY}, "ratio_low must be in [0, 1e+12], got inf"),
    ],
)
def test_larger_options_are_refused(objective, options, message, monkeypatch):
    def run():
        with pytest.raises(ValueError) as error:
            loss_of(objective, **options)
        return str(error.value)

    assert on_both_paths(run, monkeypatch) == [f"policy_loss: {message}"] * 2


# ---- large inputs --------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["ppo", "reinforce", "cispo", "sapo", "topr", "linear"])
@pytest.mark.parametrize("size", [1e12, 1e13, 1e15, 1e17])
def test_large_advantages_count_in_full_where_nothing_overflows(objective, size, monkeypatch):
    advantages = [size, -size, 1.0, -3 * size]
    one, other = on_both_paths(lambda: loss_of(objective, advantages=advantages), monkeypatch)
    assert_alike(one, other)
    small = loss_of(objective, advantages=[1.0, -1.0, 1 / size, -3.0])
    torch.testing.assert_close(other[1], small[1] * size, rtol=1e-5, atol=0)


@pytest.mark.parametrize("objective", ["reinforce", "dro", "sppo", "gpg"])
@pytest.mark.parametrize("size", [1e14, 1e15, 1e17])
def test_far_logps_count_in_full_where_nothing_overflows(objective, size, monkeypatch):
    far = [-size, -0.8, -0.1, -3 * size]
    one, other = on_both_paths(lambda: loss_of(objective, logps=far, entropies=far), monkeypatch)
    assert_alike(one, other)


@pytest.mark.parametrize("objective", tuple(tether.objectives()))
@pytest.mark.parametrize("kl", ["k1", "k2", "k3", "abs", "low_var_kl"])
def test_what_overflows_keeps_its_gradient(objective, kl, monkeypatch):
    kind = {"kl_estimator": kl, "kl_gradient": kl, "allow_biased_gradient": True, "beta": 0.1}
    for far, sizes in (
        ([3e15, 1e15, -0.1, 1e17], [1e17, -1e16, 1e15, -1e14]),
        ([-1e30, -3e38, -0.1, 3e38], [3e38, -1e30, 1e15, -2e38]),
    ):

        def run(far=far, sizes=sizes):
            return loss_of(objective, advantages=sizes, old_logps=far, **kind)[:2]

        one, other = on_both_paths(run, monkeypatch)
        assert all(each.isfinite().all() for each in (*one, *other))
        assert torch.equal(one[1] == 0, other[1] == 0)
        if max(sizes) < 1e18:  # a larger one counts as this, on the CPU where something overflows
            assert_alike(one, other, 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("objective", ["ipo", "sppo_hard"])
def test_overflowing_losses_of_pairs_have_finite_gradients(objective, dtype, monkeypatch):
    far = torch.finfo(dtype).max

    def run():
        logps = torch.tensor([[-far, -1.0], [-0.5, -0.2]], dtype=dtype, requires_grad=True)
        ref = torch.full((2, 2), -1.0, dtype=dtype)
        out = tether.preference_loss(logps, ref, torch.ones(2, 2), objective=objective, score="sum")
        return out.loss.detach(), torch.autograd.grad(out.loss, logps)[0], out.metrics.sums

    for result in on_both_paths(run, monkeypatch):
        assert all(each.isfinite().all() for each in result)


# ---- what is not finite --------------------------------------------------------------------------


@pytest.mark.parametrize("ref", [-INFINITY, INFINITY, NAN])
@pytest.mark.parametrize("kl", ["k1", "k2", "k3", "abs", "low_var_kl"])
def test_the_penalty_of_an_infinite_reference_is_alike(ref, kl, monkeypatch):
    def run():
        return loss_of("grpo", ref_logps=[-1.0, ref, -1.0, -0.5], beta=0.1, kl_estimator=kl)

    one, other = on_both_paths(run, monkeypatch)
    assert one[0].isnan() and one[1][0, 1].isnan()
    assert_alike(one, other)


def test_entropies_that_nothing_uses_have_a_gradient_of_zero(monkeypatch):
    for dtype in (torch.float32, torch.float64):
        for odd in (0.3, NAN, INFINITY):
            entropies = [0.5, odd, 0.1, 0.4]

            def run(dtype=dtype, entropies=entropies):
                return loss_of("ppo", dtype, entropies=entropies)[:3]

            one, other = on_both_paths(run, monkeypatch)
            assert_alike(one, other)
            assert (other[2] == 0).all() and other[0].isfinite()


@pytest.mark.parametrize("dtype, largest", [(torch.float32, 3e38), (torch.float64, 1e300)])
@pytest.mark.parametrize("coefficient", [0.0, 0.01])
@pytest.mark.parametrize("normalizer", [None, tether.Normalizer(1e-30, 1e-30, 1e-30)])
def test_weighed_entropies_of_any_size(dtype, largest, coefficient, normalizer, monkeypatch):
    weights = [1e12, 1.0, 0.0, 1e12] if dtype == torch.float32 else [1e40, 1.0, 0.0, 1e40]

    def run():
        return loss_of(
            "ppo",
            dtype,
            advantages=[1.0, -1.0, 0.5, 2.0],
            entropies=[largest, 0.3, 1e3, -1e2],
            entropy_weights=weights,
            entropy_coef=coefficient,
            normalizer=normalizer,
        )

    one, other = on_both_paths(run, monkeypatch)
    assert all(each.isfinite().all() for each in one)
    assert_alike(one, other, rtol=5e-3)  # the largest number of bfloat16, and of float32


ROWS = {
    "only -inf": [-INFINITY] * 4,
    "an inf": [INFINITY, 0.0, 1.0, -INFINITY],
    "a NaN": [NAN, 0.0, -INFINITY, 1.0],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{"temperature": 0.5}, {"scale": 4.0}])
def test_logits_that_overflow_over_the_temperature_keep_their_gradient(dtype, options, monkeypatch):
    logits = torch.tensor([[3e38, 1, 3e38], [-3e38, -3e38, -3e38]]).to(dtype)
    weights = torch.tensor([1.0, -0.5])
    slope = options.get("scale", 1) / options.get("temperature", 1)

    def run():
        leaf = logits.clone().requires_grad_()
        out = tether.token_logps(leaf, torch.tensor([0, 1]), entropies=True, **options)
        (weights * out.logps).sum().backward()
        return out.logps.detach(), out.entropies.detach(), leaf.grad

    sizes = torch.tensor([2.0, 3.0]).log()
    rows = torch.tensor([[0.5, 0, -0.5], [1 / 6, -1 / 3, 1 / 6]])
    for logps, entropies, gradient in on_both_paths(run, monkeypatch):
        torch.testing.assert_close(logps, -sizes)
        torch.testing.assert_close(entropies, sizes)
        torch.testing.assert_close(gradient, (slope * rows).to(dtype))


@pytest.mark.parametrize("row", ROWS)
def test_broken_rows_of_logits_are_nan_and_so_is_their_gradient(row, monkeypatch):
    broken, sound = ROWS[row], [0.0, -INFINITY, 1.0, 2.0]
    ids = torch.tensor([[0, 1], [0, 2]])
    head = torch.tensor([[-1.0, -2.0], [-1.0, -2.0]])

    def results(call):
        logits = torch.tensor([broken, sound], requires_grad=True)
        values = call(logits)
        dlogits = torch.autograd.grad(sum(each.sum() for each in values), logits)[0]
        return *(each.detach() for each in values), dlogits

    def of_logps(y):
        return lambda logits: tether.token_logps(logits, torch.tensor([y, 0]), entropies=True)[:2]

    def of_kl(logits):
        return tether.categorical_kl(logits, torch.tensor([[0.1, 0.2, 0.3, 0.4]] * 2))[::2]

    def of_head(tail):
        y, log_p = torch.tensor([2, 3]), torch.tensor([-2.0, -2.0])
        return lambda logits: (tether.top_k_kl(logits, ids, head, y, log_p, tail=tail),)

    for call in (of_logps(0), of_logps(1), of_kl, *map(of_head, ("bucket", "k1", "k3"))):
        one, other = on_both_paths(lambda call=call: results(call), monkeypatch)
        for values in (one, other):
            assert all(each[0].isnan().all() for each in values)
            assert all(each[1].isfinite().all() for each in values)
        assert_alike(one, other)

    def constants():
        logits = torch.tensor([broken, sound])
        found = tether.token_logps(logits, torch.tensor([0, 0]), statistics=True)
        return found.mean_logits, tether.head_logps(logits, ids)

    assert_alike(*on_both_paths(constants, monkeypatch))


@pytest.mark.parametrize("tail", ["k1", "k3"])
def test_a_sample_that_the_policy_cannot_have_drawn_makes_nan(tail, monkeypatch):
    head = torch.tensor([[0, 1]]), torch.tensor([[-1.0, -1.5]])

    def run(y, log_p):
        logits = torch.tensor([[1.0, 0.5, -INFINITY, 0.2]], requires_grad=True)
        out = tether.top_k_kl(logits, *head, torch.tensor([y]), torch.tensor([log_p]), tail=tail)
        return out.detach(), torch.autograd.grad(out.sum(), logits)[0]

    for log_p in (-2.0, -INFINITY):
        for kl, dlogits in on_both_paths(lambda log_p=log_p: run(2, log_p), monkeypatch):
            assert kl.isnan() and dlogits[0, [0, 1, 3]].isnan().all()
    for kl, dlogits in on_both_paths(lambda: run(3, -2.0), monkeypatch):
        assert kl.isfinite() and dlogits.isfinite().all() and dlogits[0, 2] == 0
    for kl, _ in on_both_paths(lambda: run(3, -INFINITY), monkeypatch):
        assert kl == INFINITY  # a mass that the reference does not have


# A step whose slopes are beyond float32, and whose gradients, by these masks, are not.
SMALL_MASKS = torch.tensor([[1e-6, 1e-8, 1e-5, 0, 1e-10], [1e-3, 1e-4, 0, 1e-6, 1e-9]])


def assert_as_in_float64(run, monkeypatch):
    """run(dtype) gives a gradient; what is beyond float32 counts as its largest result."""
    largest = torch.finfo(torch.bfloat16).max
    want = run(torch.float64).clamp(-largest, largest)
    assert want.abs().max() > 1e30
    for got in on_both_paths(lambda: run(torch.float32), monkeypatch):
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)


def far_batch(rows):
    generator = torch.Generator().manual_seed(0)
    logps = -torch.rand(rows, 5, generator=generator) - 0.1
    return logps, logps + 0.1 * torch.randn(logps.shape, generator=generator)


@pytest.mark.parametrize("level", ["sequence_mean", "sequence_sum", "turn_mean", "turn_sum"])
@pytest.mark.parametrize("objective", ["reinforce", "ppo", "gmpo"])
@pytest.mark.parametrize("beta", [0.0, 1e3])
def test_a_shared_slope_beyond_the_type_meets_the_mask_first(level, objective, beta, monkeypatch):
    logps, old = far_batch(2)
    advantages = torch.tensor([1e18, -1e18])

    def run(dtype):
        x = logps.to(dtype).requires_grad_()
        loss = tether.policy_loss(
            x,
            advantages.to(dtype),
            SMALL_MASKS.to(dtype),
            objective=objective,
            level=level,
            old_logps=old.to(dtype),
            ref_logps=old.flip(0).to(dtype),
            beta=beta,
            normalizer=tether.Normalizer(policy=1, kl=1, sequences=1, world_size=1e25),
        ).loss
        return torch.autograd.grad(loss, x)[0]

    assert_as_in_float64(run, monkeypatch)


@pytest.mark.parametrize("options", [{}, {"ld_alpha": 0.5}, {"nll_coef": 0.3}])
@pytest.mark.parametrize("objective", ["dpo", "ipo", "hinge"])
def test_slopes_of_answers_beyond_the_type_meet_their_masks_first(objective, options, monkeypatch):
    logps, ref = far_batch(4)
    mask = torch.cat([SMALL_MASKS, SMALL_MASKS.flip(0)])
    mask[3, 2:] = 0

    def run(dtype):
        x = logps.to(dtype).requires_grad_()
        loss = tether.preference_loss(
            x, ref.to(dtype), mask.to(dtype), objective=objective, loss_scale=1e42, **options
        ).loss
        return torch.autograd.grad(loss, x)[0]

    assert_as_in_float64(run, monkeypatch)


@pytest.mark.parametrize("beta", [0.0, 1e10])
@pytest.mark.parametrize("level", ["token", "sequence_mean", "turn_sum", "sequence_token"])
def test_terms_that_overflow_are_within_the_largest_result(level, beta, monkeypatch):
    # And the same on both paths where there is one term alone.
    largest = torch.finfo(torch.bfloat16).max
    generator = torch.Generator().manual_seed(7)
    logps = -torch.rand(40, 4, generator=generator)
    old, ref = (logps + torch.randn(logps.shape, generator=generator) for _ in range(2))
    advantages = torch.randn(40, 4, generator=generator).clamp(-1, 1) * 1e18
    mask = torch.rand(40, 4, generator=generator) * 10.0 ** -torch.arange(0, 40)[:, None].remainder(
        9
    )
    options = {"objective": "reinforce", "level": level, "beta": beta}

    def gradient(world_size):
        x = logps.clone().requires_grad_()
        step = tether.Normalizer(policy=1, kl=1, sequences=1, world_size=world_size)
        arrays = {"old_logps": old, "ref_logps": ref, "normalizer": step}
        loss = tether.policy_loss(x, advantages, mask, **arrays, **options).loss
        return torch.autograd.grad(loss, x)[0]

    for world_size in (1e23, 1e30, 1e50):
        with monkeypatch.context() as patch:
            one, other = on_both_paths(lambda each=world_size: gradient(each), patch)
        for each in (one, other):
            assert each.isfinite().all() and each.abs().max() <= largest
        assert one.abs().max() == largest
        if beta == 0:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=0)
