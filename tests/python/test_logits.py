"""tether.token_logps, linear_token_logps and categorical_kl against tether.reference."""

import math

import pytest
import tether
import torch
from batches import words
from paths import on_both_paths
from torch.utils._python_dispatch import TorchDispatchMode

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def random_logits(*shape, dtype=torch.float64, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def random_targets(logits, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(logits.shape[-1], logits.shape[:-1], generator=generator)


def weights_of(like, low=-0.5):
    return torch.linspace(low, 2, like.numel(), dtype=torch.float64).view(like.shape)


def token_results(function, logits, targets, **options):
    """logps, entropies, and the gradient of a mixture of both."""
    leaf = logits.detach().requires_grad_()
    logps, entropies = function(leaf, targets, **options)[:2]
    a = weights_of(logps)
    (gradient,) = torch.autograd.grad((a * logps + (1.7 - a) * entropies).sum(), leaf)
    return logps.detach(), entropies.detach(), gradient


def assert_same(actual, expected, tolerance):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.0, 12.0])
def test_token_logps_equals_reference(dtype, softcap):
    logits = random_logits(2, 3, 777, dtype=dtype)
    logits[0, 1, 5] = -math.inf
    targets = random_targets(logits)
    targets[1, 2] = -100
    options = {"temperature": 0.8, "scale": 1.5, "softcap": softcap}
    actual = token_results(tether.token_logps, logits, targets, entropies=True, **options)
    expected = token_results(tether.reference.token_logps, logits.double(), targets, **options)
    wide = dtype == torch.float64
    assert actual[0].dtype == (torch.float64 if wide else torch.float32)
    assert actual[2].dtype == dtype
    assert_same(actual[:2], expected[:2], 1e-12 if wide else 1e-5)
    rounding = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(dtype, 0)
    assert_same(actual[2:], expected[2:], rounding + (1e-12 if wide else 1e-5))


def test_layouts_give_the_same_bits():
    whole = random_logits(3, 5, 40, dtype=torch.float32)
    for logits in (whole[:, :-1], whole.transpose(0, 1), whole[..., ::3], whole[0, 0]):
        targets = random_targets(logits)
        want = token_results(tether.token_logps, logits.contiguous(), targets, entropies=True)
        got = token_results(tether.token_logps, logits, targets.to(torch.int32), entropies=True)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_gradient_buffer():
    logits = random_logits(4, 50, dtype=torch.float32)
    targets = random_targets(logits)
    want = token_results(tether.token_logps, logits, targets, entropies=True)[2]
    buffer = torch.empty_like(logits)
    version = buffer._version
    got = token_results(
        tether.token_logps, logits, targets, entropies=True, gradient_buffer=buffer
    )[2]
    assert torch.equal(got, want) and got.data_ptr() == buffer.data_ptr()
    assert buffer._version > version  # autograd is to notice
    owner = logits.clone().requires_grad_()
    in_place = owner * 1
    out = tether.token_logps(in_place, targets, entropies=True, gradient_buffer=in_place)
    a = weights_of(out.logps)
    loss = (a * out.logps + (1.7 - a) * out.entropies).sum()
    loss.backward(retain_graph=True)
    assert torch.equal(owner.grad, want) and torch.equal(in_place.detach(), want)
    with pytest.raises(RuntimeError):  # the logits are gone
        loss.backward()


def test_gradcheck_and_second_derivative():
    logits = random_logits(3, 7).requires_grad_()
    targets = random_targets(logits)
    assert torch.autograd.gradcheck(
        lambda x: tether.token_logps(x, targets, temperature=0.7, softcap=4.0, entropies=True)[:2],
        logits,
    )
    (first,) = torch.autograd.grad(
        tether.token_logps(logits, targets).logps.square().sum(), logits, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="token_logps: the gradient must not be"):
        first.square().sum().backward()


def test_opcheck_and_compile():
    logits, targets = random_logits(3, 40, dtype=torch.float32), torch.tensor([1, 2, 39])
    arguments = (logits.requires_grad_(), targets)
    forward = torch.ops.tether.token_logps_forward.default
    for entropies, statistics in ((False, False), (True, False), (False, True), (True, True)):
        asked = words({"temperature": 0.5}, entropies=entropies, statistics=statistics)
        torch.library.opcheck(forward, (*arguments, None, *asked))
    rows = forward(*arguments, None, *words(statistics=True))[2]
    torch.library.opcheck(
        torch.ops.tether.token_statistics.default, (rows, logits.detach(), *words())
    )
    p_logits = random_logits(3, 40, dtype=torch.float32, seed=2)
    torch.library.opcheck(
        torch.ops.tether.categorical_kl_forward.default, (logits, p_logits, None, None, *words())
    )

    def step(x):
        return tether.token_logps(x, targets, entropies=True).logps.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(logits), logits)
    (want,) = torch.autograd.grad(step(logits), logits)
    torch.testing.assert_close(got, want)


# ---- statistics ----------------------------------------------------------------------------------


def test_statistics_by_hand():
    # p = 1/8, 3/8, 0, 4/8 at temperature 0.5, whose logits are half the logarithms.
    p = torch.tensor([1.0, 3.0, 0.0, 4.0], dtype=torch.float64).expand(5, 4)
    targets = torch.tensor([3, 1, 2, -100, 0])
    leaf = (p.log() / 2).requires_grad_()
    out = tether.token_logps(leaf, targets, temperature=0.5, statistics=True)
    squares, mean = (1 + 9 + 16) / 64, math.log(12) / 3
    assert out.sum_of_squared_p.tolist() == pytest.approx([squares] * 3 + [1, squares], rel=1e-15)
    assert out.mean_logits.tolist() == pytest.approx([mean] * 3 + [0, mean], rel=1e-15)
    assert out.target_is_largest.tolist() == [True, False, False, True, False]
    assert out.entropies is None
    assert out.logps.requires_grad and not any(each.requires_grad for each in out[2:])
    tie = tether.token_logps(torch.zeros(1, 7), torch.tensor([6]), statistics=True)
    assert tie.target_is_largest.item() is True
    assert tether.token_logps(leaf, targets)[1:] == (None,) * 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.0, 12.0])
def test_statistics_equal_reference(dtype, softcap):
    logits = random_logits(2, 3, 777, dtype=dtype)
    logits[0, 1, 5:9] = -math.inf
    targets = random_targets(logits)
    targets[0, 0], targets[0, 1], targets[1, 2] = logits[0, 0].argmax(), 5, -100
    options = {"temperature": 0.8, "scale": 1.5, "softcap": softcap}
    out = tether.token_logps(logits, targets, statistics=True, **options)
    expected = tether.reference.token_statistics(logits.double(), targets, **options)
    wide = dtype == torch.float64
    for actual in out[2:4]:
        assert actual.dtype == (torch.float64 if wide else torch.float32)
    assert_same(out[2:4], expected[:2], 1e-12 if wide else 1e-5)
    assert out.target_is_largest.dtype == torch.bool
    assert torch.equal(out.target_is_largest, expected[2])
    assert out.target_is_largest[0, 0] and not out.target_is_largest[0, 1]


def test_statistics_leave_the_rest_alone():
    logits = random_logits(2, 3, 40)
    targets = random_targets(logits)
    want = token_results(tether.token_logps, logits, targets, entropies=True)
    buffer = torch.empty_like(logits)
    for options in ({}, {"gradient_buffer": buffer}):
        got = token_results(
            tether.token_logps, logits, targets, entropies=True, statistics=True, **options
        )
        assert_same(got, want, 1e-14)
    plain = tether.token_logps(logits.requires_grad_(), targets, statistics=True)
    into = tether.token_logps(logits, targets, statistics=True, gradient_buffer=buffer)
    assert all(torch.equal(a, b) for a, b in zip(into[2:], plain[2:], strict=True))
    assert into.logps.requires_grad and not any(each.requires_grad for each in into[2:])


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_linear_statistics_equal_those_of_whole_logits(rows):
    hidden, weight = random_logits(2, 5, 6), random_logits(33, 6, seed=2, scale=1)
    bias, targets = random_logits(33, seed=3), random_targets(torch.empty(2, 5, 33))
    logits = torch.nn.functional.linear(hidden, weight, bias)
    targets[0, 3], targets[1, 1], targets[1, 2] = -100, -100, logits[1, 2].argmax()
    hidden[0, 3] = math.nan
    options = {"temperature": 0.8, "scale": 1.5, "softcap": 9.0}
    leaves = [each.requires_grad_() for each in (hidden, weight, bias)]
    out = tether.linear_token_logps(
        *leaves[:2], targets, bias, statistics=True, chunk_bytes=rows * 33 * 8, **options
    )
    expected = tether.reference.token_statistics(logits, targets, **options)
    assert_same(out[2:], expected, 1e-12)
    assert out.entropies is None
    assert out.logps.requires_grad and not any(each.requires_grad for each in out[2:])


def test_statistics_compile_into_one_graph():
    logits, targets = random_logits(3, 40).requires_grad_(), torch.tensor([1, -100, 39])

    def step(x):
        return tether.token_logps(x, targets, statistics=True)

    got, want = torch.compile(step, fullgraph=True, backend="aot_eager")(logits), step(logits)
    assert_same((got.logps, *got[2:]), (want.logps, *want[2:]), 0)
    assert got.target_is_largest.dtype == torch.bool
    (gradient,) = torch.autograd.grad(got.logps.sum(), logits)
    assert torch.equal(gradient, torch.autograd.grad(want.logps.sum(), logits)[0])


def test_statistics_on_the_path_of_other_devices():
    hidden, weight = torch.empty(2, 3, 6, device="meta"), torch.empty(9, 6, device="meta")
    targets = torch.zeros(2, 3, dtype=torch.int64, device="meta")
    for out in (
        tether.token_logps(hidden, targets, statistics=True),
        tether.linear_token_logps(hidden, weight, targets, statistics=True),
    ):
        assert [each.shape for each in (out.logps, *out[2:])] == [targets.shape] * 4
        assert out.entropies is None and out.target_is_largest.dtype == torch.bool


# ---- linear_token_logps --------------------------------------------------------------------------


def linear_results(hidden, weight, bias, targets, fused, **options):
    leaves = [each.detach().requires_grad_() for each in (hidden, weight, bias)]
    if fused:
        chunk = {"chunk_bytes": options.pop("chunk_bytes")} if "chunk_bytes" in options else {}
        logps, entropies = tether.linear_token_logps(
            leaves[0], leaves[1], targets, leaves[2], entropies=True, **options, **chunk
        )[:2]
    else:
        options.pop("chunk_bytes", None)
        logits = torch.nn.functional.linear(*leaves)
        logps, entropies = tether.reference.token_logps(logits, targets, **options)
    a = weights_of(logps)
    gradients = torch.autograd.grad((a * logps + (1.7 - a) * entropies).sum(), leaves)
    return logps.detach(), entropies.detach(), *gradients


@pytest.mark.parametrize("rows", [1, 3, 7, 1000])
@pytest.mark.parametrize("ignored", [False, True])
def test_linear_equals_whole_logits(rows, ignored):
    hidden, weight = random_logits(2, 5, 6), random_logits(33, 6, seed=2, scale=1)
    bias, targets = random_logits(33, seed=3), random_targets(torch.empty(2, 5, 33))
    if ignored:
        targets[0, 3] = targets[1, 1] = -100
    options = {"temperature": 0.8, "softcap": 9.0, "chunk_bytes": rows * 33 * 8}
    actual = linear_results(hidden, weight, bias, targets, True, **options)
    expected = linear_results(hidden, weight, bias, targets, False, **options)
    assert_same(actual, expected, 1e-12)
    if ignored:
        hidden[0, 3] = math.nan
        poisoned = linear_results(hidden, weight, bias, targets, True, **options)
        assert all(torch.equal(a, b) for a, b in zip(poisoned, actual, strict=True))


def test_linear_of_half_weights_adds_up_in_float32():
    hidden, weight = random_logits(1, 64, 16), random_logits(33, 16, seed=2, scale=0.3)
    bias, targets = torch.zeros(33, dtype=torch.float64), random_targets(torch.empty(1, 64, 33))
    halves = [each.bfloat16() for each in (hidden, weight, bias)]
    expected = linear_results(*(each.double() for each in halves), targets, False)
    for chunk_bytes in (2 * 33 * 2, 1 << 20):
        actual = linear_results(*halves, targets, True, chunk_bytes=chunk_bytes)
        assert actual[3].dtype == torch.bfloat16
        error = (actual[3].double() - expected[3]).norm() / expected[3].norm()
        assert error < 2**-7


def test_linear_frozen_weight_and_second_derivative():
    hidden, weight = random_logits(4, 6).requires_grad_(), random_logits(9, 6, seed=2)
    targets = random_targets(torch.empty(4, 9))
    out = tether.linear_token_logps(hidden, weight, targets)
    (first,) = torch.autograd.grad(out.logps.square().sum(), hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="linear_token_logps: the gradient must not be"):
        first.square().sum().backward()


# ---- linear_policy_loss --------------------------------------------------------------------------


def policy_inputs(dtype=torch.float64):
    hidden, weight = random_logits(4, 5, 6, dtype=dtype), random_logits(33, 6, seed=2, dtype=dtype)
    bias, targets = random_logits(33, seed=3, dtype=dtype), random_targets(torch.empty(4, 5, 33))
    mask = torch.rand(4, 5, generator=torch.Generator().manual_seed(4)) > 0.3
    mask[2] = False
    logits = torch.nn.functional.linear(hidden.double(), weight.double(), bias.double())
    logps = tether.reference.token_logps(logits, targets)[0]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    batch = {
        "advantages": random_logits(4, seed=5).to(wide),
        "response_mask": mask,
        "old_logps": (logps + 0.2 * random_logits(4, 5, seed=6, scale=1)).to(wide),
        "ref_logps": (logps + 0.2 * random_logits(4, 5, seed=7, scale=1)).to(wide),
        "rollout_logps": (logps + 0.2 * random_logits(4, 5, seed=8, scale=1)).to(wide),
    }
    return hidden, weight, bias, targets, batch


def policy_results(hidden, weight, bias, targets, batch, fused, **settings):
    leaves = [each.detach().requires_grad_() for each in (hidden, weight, bias)]
    chunk = settings.pop("chunk_bytes", 1 << 20)
    if fused:
        out = tether.linear_policy_loss(
            leaves[0], leaves[1], targets, bias=leaves[2], chunk_bytes=chunk, **batch, **settings
        )
        logps = out.logps
    else:
        logits = torch.nn.functional.linear(*leaves)
        temperature = settings.pop("temperature", 1.0)
        logps, entropies = tether.token_logps(
            logits, targets, temperature=temperature, entropies=True
        )[:2]
        bonus = "entropy_coef" in settings
        out = tether.policy_loss(logps, entropies=entropies if bonus else None, **batch, **settings)
        logps = logps.detach().masked_fill(~batch["response_mask"], 0)
    gradients = torch.autograd.grad(1.7 * out.loss, leaves)
    return out.loss.detach(), logps, out.metrics.sums, out.metrics.maxima, *gradients


@pytest.mark.parametrize("objective", tether.objectives())
@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_linear_policy_loss_equals_whole_logits(objective, rows):
    settings = {"objective": objective, "beta": 0.05, "temperature": 0.9, "entropy_coef": 0.01}
    inputs = policy_inputs()
    for normalizer in (None, tether.Normalizer(policy=40, sequences=9, world_size=2)):
        actual = policy_results(
            *inputs, True, chunk_bytes=rows * 33 * 8, normalizer=normalizer, **settings
        )
        expected = policy_results(*inputs, False, normalizer=normalizer, **settings)
        assert_same(actual, expected, 1e-11)


PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in PRODUCTS
        return function(*args, **(kwargs or {}))


def test_linear_policy_loss_makes_only_the_products_that_it_needs():
    hidden, weight = torch.randn(2, 5, 8).requires_grad_(), torch.randn(30, 8).requires_grad_()
    rest = (torch.randint(30, (2, 5)), torch.randn(2), torch.ones(2, 5, dtype=torch.bool))

    def products(*leaves, **options):
        with Products() as counter:
            loss = tether.linear_policy_loss(
                *leaves, *rest, **{"objective": "dapo", **options}
            ).loss
            if loss.requires_grad:
                loss.backward()
        return counter.count

    assert products(hidden, weight) == 3
    assert products(hidden, weight, objective="gspo") == 3
    two_chunks = {"chunk_bytes": 5 * 30 * 4}
    assert products(hidden, weight, **two_chunks) == 6
    assert products(hidden, weight, objective="gspo", **two_chunks) == 8
    assert products(hidden.detach(), weight) == products(hidden, weight.detach()) == 2
    assert products(hidden.detach(), weight.detach()) == 1
    with torch.no_grad():
        assert products(hidden, weight) == 1


def test_linear_token_logps_keeps_the_logits_of_one_chunk_for_one_backward():
    torch.manual_seed(5)
    hidden = torch.randn(6, 8, dtype=torch.float64).requires_grad_()
    weight = torch.randn(30, 8, dtype=torch.float64).requires_grad_()
    targets = torch.randint(30, (6,))
    targets[2] = -100
    upstream = torch.linspace(0.5, 2, 6, dtype=torch.float64)

    def gradients(logps, factors=upstream):
        with Products() as counter:
            out = torch.autograd.grad((factors * logps).sum(), (hidden, weight), retain_graph=True)
        return counter.count, out

    plain = tether.token_logps(hidden @ weight.t(), targets).logps
    logps = tether.linear_token_logps(hidden, weight, targets).logps
    for count in (2, 3):  # the second backward makes the logits again
        products, got = gradients(logps)
        assert products == count
        assert_same(got, gradients(plain)[1], 1e-12)
    logps = tether.linear_token_logps(hidden, weight, targets).logps
    some = upstream * torch.tensor([1, 0, 1, 1, 0, 1])
    products, got = gradients(logps, some)
    assert products == 3
    assert_same(got, gradients(plain, some)[1], 1e-12)
    with torch.no_grad():
        assert not tether.linear_token_logps(hidden, weight, targets).logps.requires_grad


def test_linear_policy_loss_masks_and_packs():
    hidden, weight, bias, targets, batch = policy_inputs()
    want = policy_results(hidden, weight, bias, targets, batch, True, chunk_bytes=3 * 33 * 8)
    mask = batch["response_mask"]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    packed = {name: each[mask] if each.dim() == 2 else each for name, each in batch.items()}
    got = policy_results(
        hidden[mask], weight, bias, targets[mask], packed | {"offsets": offsets}, True
    )
    assert_same((got[0], *got[2:4], got[5]), (want[0], *want[2:4], want[5]), 1e-12)
    poisoned = {
        name: torch.where(mask, each, math.nan)
        if each.dim() == 2 and name != "response_mask"
        else each
        for name, each in batch.items()
    }
    hidden = torch.where(mask[..., None], hidden, math.nan)
    targets = targets.masked_fill(~mask, 1 << 40)
    got = policy_results(hidden, weight, bias, targets, poisoned, True, chunk_bytes=3 * 33 * 8)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    empty = poisoned | {"response_mask": torch.zeros_like(mask)}
    out = policy_results(hidden, weight, bias, targets, empty, True)
    assert out[0] == 0 and all((each == 0).all() for each in out[4:])


def test_linear_policy_loss_frozen_second_derivative_and_errors():
    hidden, weight, bias, targets, batch = policy_inputs()
    leaf = weight.detach().requires_grad_()
    loss = tether.linear_policy_loss(hidden, leaf, targets, bias=bias, **batch).loss
    (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="linear_policy_loss: backward must run once"):
        first.sum().backward()
    constant = tether.linear_policy_loss(hidden, weight, targets, bias=bias, **batch).loss
    assert not constant.requires_grad and constant == loss.detach()
    for change, message in (
        ({"advantages": torch.zeros(3).double()}, "advantages must be [4] or [4, 5], got [3]"),
        ({"response_mask": None}, "response_mask must be given, got none"),
        (
            {"ref_logps": None, "beta": 0.04},
            "ref_logps must be given when beta is greater than 0, got beta 0.04 and none. Pass "
            "ref_logps or beta = 0",
        ),
    ):
        with pytest.raises(ValueError) as raised:
            tether.linear_policy_loss(hidden, weight, targets, **batch | change)
        assert str(raised.value) == f"linear_policy_loss: {message}"


# ---- linear_preference_loss ----------------------------------------------------------------------


def preference_inputs():
    hidden, weight = random_logits(6, 5, 4, scale=0.5), random_logits(33, 4, seed=2, scale=0.5)
    bias, targets = random_logits(33, seed=3, scale=0.5), random_targets(torch.empty(6, 5, 33))
    mask = torch.rand(6, 5, generator=torch.Generator().manual_seed(4)) > 0.3
    mask[1] = mask[4] = False  # a pair without answers
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logps = tether.reference.token_logps(logits, targets)[0]
    ref_logps = logps + 0.2 * random_logits(6, 5, seed=5, scale=1)
    return hidden, weight, bias, targets, {"ref_logps": ref_logps, "response_mask": mask}


def preference_results(hidden, weight, bias, targets, batch, fused, **settings):
    leaves = [each.detach().requires_grad_() for each in (hidden, weight, bias)]
    if fused:
        out = tether.linear_preference_loss(
            leaves[0], leaves[1], targets, bias=leaves[2], **batch, **settings
        )
    else:
        del settings["chunk_bytes"]
        rows = {name: settings.pop(name) for name in ("temperature", "scale", "softcap")}
        logits = torch.nn.functional.linear(*leaves)
        logps = tether.token_logps(logits, targets, **rows).logps
        out = tether.preference_loss(logps, **batch, **settings)
    return out.loss.detach(), out.metrics.sums, *torch.autograd.grad(1.7 * out.loss, leaves)


@pytest.mark.parametrize("objective", tether.objectives("preference"))
@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_linear_preference_loss_equals_whole_logits(objective, rows):
    *inputs, batch = preference_inputs()
    batch["nll_mask"] = torch.rand(6, 5, generator=torch.Generator().manual_seed(6)) > 0.5
    batch["baselines"] = torch.linspace(-1, 1, 6)
    if tether.reference.PREFERENCES[objective].takes_labels:
        batch["labels"] = torch.arange(6) % 2
    inputs = (*inputs, batch)
    head = {"temperature": 0.9, "scale": 1.2, "softcap": 9.0, "chunk_bytes": rows * 33 * 8}
    for settings in (
        {"beta": 0.3, "link": "js", "score": "mean"},
        {"pairs": 7, "tokens": 40, "world_size": 2, "reference": False},
        {"nll_coef": 0.5, "tokens": 9},
    ):
        settings = {"objective": objective, **head, **settings}
        actual = preference_results(*inputs, True, **settings)
        expected = preference_results(*inputs, False, **settings)
        assert actual[2].abs().max() > 1e-3
        assert_same(actual, expected, 1e-12)


@pytest.mark.parametrize("active", [True, 1, 0.7])
def test_linear_preference_loss_reads_nothing_under_the_mask(active):
    hidden, weight, bias, targets, batch = preference_inputs()
    mask = batch["response_mask"]
    batch["response_mask"] = torch.where(mask, active, type(active)(0))
    want = preference_results(hidden, weight, bias, targets, batch, True, chunk_bytes=3 * 33 * 8)
    assert (want[2][~mask] == 0).all() and (want[2][mask] != 0).any()
    poisoned = (
        torch.where(mask[..., None], hidden, math.nan),
        weight,
        bias,
        targets.masked_fill(~mask, 1 << 40),
        batch | {"ref_logps": torch.where(mask, batch["ref_logps"], math.nan)},
    )
    got = preference_results(*poisoned, True, chunk_bytes=3 * 33 * 8)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_linear_preference_loss_packs():
    hidden, weight, bias, targets, batch = preference_inputs()
    want = preference_results(hidden, weight, bias, targets, batch, True)
    mask = batch["response_mask"]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    packed = {name: each[mask] for name, each in batch.items()} | {"offsets": offsets}
    got = preference_results(hidden[mask], weight, bias, targets[mask], packed, True)
    assert_same((*got[:2], *got[3:]), (*want[:2], *want[3:]), 1e-12)
    assert_same(got[2:3], [want[2][mask]], 1e-12)


def test_linear_preference_loss_of_half_and_frozen_weights():
    hidden, weight, bias, targets, batch = preference_inputs()
    batch["ref_logps"] = batch["ref_logps"].float()
    leaf = hidden.bfloat16().requires_grad_()
    out = tether.linear_preference_loss(
        leaf, weight.bfloat16(), targets, bias=bias.bfloat16(), **batch
    )
    assert out.loss.dtype == torch.float32
    (gradient,) = torch.autograd.grad(out.loss, leaf, create_graph=True)
    assert gradient.dtype == torch.bfloat16
    with pytest.raises(NotImplementedError):
        gradient.sum().backward()


def test_linear_preference_loss_on_the_path_of_other_devices():
    hidden, weight, _, targets, batch = preference_inputs()
    tensors = [each.to("meta") for each in (hidden, weight, targets, *batch.values())]
    out = tether.linear_preference_loss(*tensors)
    assert (out.loss.shape, out.loss.dtype, out.loss.device.type) == ((), torch.float64, "meta")


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"response_mask": None}, ValueError, "response_mask must be given, got none"),
        ({"targets": None}, ValueError, "targets must be given, got none"),
        (
            {"response_mask": torch.ones(6, 4)},
            ValueError,
            "response_mask must be [6, 5] like logps, got [6, 4]",
        ),
        (
            {"ref_logps": torch.zeros(6, 4).double()},
            ValueError,
            "ref_logps must be [6, 5] like logps, got [6, 4]",
        ),
        (
            {"weight": torch.zeros(33, 5).double()},
            ValueError,
            "weight must be [V, 4] with V at least 1, for hidden [6, 5, 4], got [33, 5]",
        ),
        (
            {"offsets": torch.tensor([0, 30])},
            ValueError,
            "logps must be [N] with offsets, got [6, 5]",
        ),
        (
            {"targets": torch.full((6, 5), 33), "response_mask": torch.arange(30).view(6, 5) == 7},
            IndexError,
            "targets must be in [0, 33) or ignore_index -100, got 33 at [1, 2]",
        ),
        ({"temperature": 0.0}, ValueError, "temperature must be in [1e-06, 1e+06], got 0"),
        ({"chunk_bytes": 0}, ValueError, "chunk_bytes must be at least 1, got 0"),
    ],
)
def test_linear_preference_loss_refuses(change, error, message):
    hidden, weight, _, targets, batch = preference_inputs()
    arguments = {"hidden": hidden, "weight": weight, "targets": targets, **batch}
    with pytest.raises(error) as raised:
        tether.linear_preference_loss(**arguments | change)
    assert str(raised.value) == f"linear_preference_loss: {message}"


def test_linear_preference_loss_of_answers_of_one_token_needs_the_mask_too():
    hidden, weight, _, targets, batch = preference_inputs()
    tokens = hidden[:, 0], weight, targets[:, 0], batch["ref_logps"][:, 0]
    with pytest.raises(ValueError) as raised:
        tether.linear_preference_loss(*tokens)
    assert str(raised.value) == "linear_preference_loss: response_mask must be given, got none"
    out = tether.linear_preference_loss(*tokens, torch.ones(6, dtype=torch.bool))
    logps = tether.linear_token_logps(*tokens[:3]).logps
    assert out.loss == tether.preference_loss(logps, tokens[3]).loss


def test_linear_preference_loss_leaves_the_objective_to_preference_loss():
    hidden, weight, _, targets, batch = preference_inputs()
    for change, message in (
        (
            {"tau": 1},
            "option must be one of label_smoothing, beta, loss_weight, nll_coef, ld_alpha, "
            'link_alpha, got "tau"',
        ),
        ({"ref_logps": None}, "ref_logps must be given, got none. Pass them or reference = false"),
        ({"pairs": -1}, "pairs must be at least 0 and finite, got -1"),
    ):
        with pytest.raises(ValueError) as raised:
            tether.linear_preference_loss(hidden, weight, targets, **batch | change)
        assert str(raised.value) == f"linear_preference_loss: {message}"


# ---- categorical_kl ------------------------------------------------------------------------------


def kl_results(function, q_logits, p_logits, **options):
    leaves = [each.detach().requires_grad_() for each in (q_logits, p_logits)]
    values = function(*leaves, **options)
    a = weights_of(values[0])
    loss = (a * values[0] + (0.3 - a) * values[1] + (1.7 - a) * values[2]).sum()
    return *(each.detach() for each in values), *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("dtype", DTYPES)
def test_categorical_kl_equals_reference(dtype):
    q_logits = random_logits(2, 4, 555, dtype=dtype)[:, :-1]
    p_logits = random_logits(2, 3, 555, dtype=dtype, seed=5)
    q_logits[0, 0, 7] = p_logits[0, 0, 7] = -math.inf
    mask = torch.tensor([[True, True, False], [True, False, True]])
    options = {"mask": mask, "temperature": 0.8}
    expected = kl_results(
        tether.reference.categorical_kl, q_logits.double(), p_logits.double(), **options
    )
    q_logits[~mask] = math.nan
    actual = kl_results(tether.categorical_kl, q_logits, p_logits, **options)
    wide = dtype == torch.float64
    assert_same(actual[:3], expected[:3], 1e-12 if wide else 1e-5)
    rounding = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(dtype, 0)
    assert_same(actual[3:], expected[3:], rounding + (1e-12 if wide else 1e-5))


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("gap", [1e-2, 1e-3, 1e-4])
def test_categorical_kl_of_nearly_equal_rows(gap, on_cpu, monkeypatch):
    if not on_cpu:
        monkeypatch.setattr(tether._ops, "KERNELS", frozenset())
    generator = torch.Generator().manual_seed(2)
    q = 2 * torch.randn(4, 5000, generator=generator)
    p = q + gap * torch.randn(4, 5000, generator=generator) + 3
    q[0, 7] = p[0, 7] = -math.inf
    log_q, log_p = (each.double().log_softmax(-1) for each in (q, p))
    d = (log_q - log_p).nan_to_num()
    for actual, log_of, gap_of in zip(tether.categorical_kl(q, p)[:2], (log_q, log_p), (d, -d),
                                      strict=True):  # fmt: skip
        exact = (log_of.exp() * (torch.expm1(-gap_of) + gap_of)).sum(-1)
        torch.testing.assert_close(actual.double(), exact, rtol=2e-2, atol=0)
    for each in tether.categorical_kl(q, q)[:2]:
        assert (each == 0).all()


def test_categorical_kl_is_never_negative(monkeypatch):
    monkeypatch.setattr(tether._ops, "KERNELS", frozenset())
    q_logits = random_logits(1, 64, 999, dtype=torch.float32)
    p_logits = q_logits * (1 + 1e-7)
    both = (q_logits.requires_grad_(), p_logits.requires_grad_())
    for each in tether.categorical_kl(*both):
        assert (each >= 0).all()
    tether.categorical_kl(*both).kl.sum().backward()  # what is cut off keeps its gradient
    assert (p_logits.grad != 0).any(-1).all()


def test_categorical_kl_gradcheck():
    q_logits, p_logits = random_logits(3, 7), random_logits(3, 7, seed=4)
    assert torch.autograd.gradcheck(
        lambda q, p: tuple(tether.categorical_kl(q, p)),
        (q_logits.requires_grad_(), p_logits.requires_grad_()),
    )
    tether.categorical_kl(q_logits, p_logits.detach()).kl.sum().backward()
    assert q_logits.grad is not None and p_logits.grad is None


# ---- errors --------------------------------------------------------------------------------------

LOGITS, TARGETS = torch.zeros(2, 3, 32), torch.zeros(2, 3, dtype=torch.int64)


def bad_ids(value):
    targets = TARGETS.clone()
    targets[1, 2] = value
    return targets


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((None, TARGETS), {}, ValueError, "logits must be given, got none"),
        (
            (LOGITS.long(), TARGETS),
            {},
            TypeError,
            "logits must be float32, float64, bfloat16 or float16, got int64",
        ),
        (
            (LOGITS[..., :0], TARGETS),
            {},
            ValueError,
            "logits must be [..., V] with V at least 1, got [2, 3, 0]",
        ),
        (
            (LOGITS, TARGETS[:, 1:]),
            {},
            ValueError,
            "targets must be [2, 3] like logits [2, 3, 32], got [2, 2]",
        ),
        (
            (LOGITS, TARGETS.float()),
            {},
            TypeError,
            "targets must be int32 or int64, got float32",
        ),
        (
            (LOGITS, bad_ids(32)),
            {},
            IndexError,
            "targets must be in [0, 32) or ignore_index -100, got 32 at [1, 2]",
        ),
        (
            (LOGITS, TARGETS),
            {"temperature": 0.0},
            ValueError,
            "temperature must be in [1e-06, 1e+06], got 0",
        ),
        (
            (LOGITS, TARGETS),
            {"softcap": -1.0},
            ValueError,
            "softcap must be in [0, 1e+06], got -1",
        ),
        (
            (LOGITS, TARGETS),
            {"gradient_buffer": LOGITS[0]},
            ValueError,
            "gradient_buffer must be [2, 3, 32] like logits, got [3, 32]",
        ),
    ],
)
def test_token_logps_refuses(arguments, options, error, message):
    with pytest.raises(error) as raised:
        tether.token_logps(*arguments, **options)
    assert str(raised.value) == f"token_logps: {message}"


def test_buffers_that_overlap_are_refused():
    memory = torch.zeros(3, 3, 32)
    with pytest.raises(ValueError, match="share no memory with them, got an overlap"):
        tether.token_logps(memory[:2], TARGETS, gradient_buffer=memory[1:])
    workspace = torch.zeros(4, 3, 32)
    tether.token_logps(workspace[:2], TARGETS, gradient_buffer=workspace[2:])


@pytest.mark.parametrize(
    "weight, options, error, message",
    [
        (
            torch.zeros(9, 7),
            {},
            ValueError,
            "weight must be [V, 32] with V at least 1, for hidden [2, 3, 32], got [9, 7]",
        ),
        (
            torch.zeros(9, 32, dtype=torch.int64),
            {},
            TypeError,
            "weight must be float32, float64, bfloat16 or float16, got int64",
        ),
        (
            torch.zeros(9, 32),
            {"bias": torch.zeros(8)},
            ValueError,
            "bias must be [9] like the rows of weight, got [8]",
        ),
        (
            torch.zeros(9, 32),
            {"chunk_bytes": 0},
            ValueError,
            "chunk_bytes must be at least 1, got 0",
        ),
    ],
)
def test_linear_token_logps_refuses(weight, options, error, message):
    with pytest.raises(error) as raised:
        tether.linear_token_logps(LOGITS, weight, TARGETS, **options)
    assert str(raised.value) == f"linear_token_logps: {message}"


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_options_are_refused_on_every_device(device):
    logits, targets = torch.zeros(2, 9, device=device), TARGETS[0, :2].to(device)
    head = torch.arange(2, device=device).expand(2, 2).contiguous(), logits[:, :2] - 2
    positive = "must be in [1e-06, 1e+06], got 0"
    for function, arguments, options, message in (
        ("token_logps", (logits, targets), {"temperature": 0}, f"temperature {positive}"),
        ("token_logps", (logits, targets), {"scale": 0}, f"scale {positive}"),
        ("linear_token_logps", (logits, logits, targets), {"scale": 0}, f"scale {positive}"),
        (
            "linear_preference_loss",
            (logits[:, None], logits, targets[:, None], None, logits[:, :1] + 1),
            {"softcap": -1, "reference": False},
            "softcap must be in [0, 1e+06], got -1",
        ),
        ("categorical_kl", (logits, logits), {"temperature": 0}, f"temperature {positive}"),
        ("head_logps", (logits, head[0]), {"temperature": 0}, f"temperature {positive}"),
        (
            "top_k_kl",
            (logits, *head),
            {"temperature": 0, "tail": "bucket"},
            f"temperature {positive}",
        ),
        (
            "top_k_kl",
            (logits, *head),
            {"precision": 1, "tail": "bucket"},
            "precision must be in [2.22045e-16, 0.00390625], got 1",
        ),
    ):
        with pytest.raises(ValueError) as raised:
            getattr(tether, function)(*arguments, **options)
        assert str(raised.value) == f"{function}: {message}"


def test_categorical_kl_refuses():
    for p_logits, options, error, message in (
        (LOGITS.double(), {}, TypeError, "p_logits must be float32 like q_logits, got float64"),
        (
            LOGITS[:, 1:],
            {},
            ValueError,
            "p_logits must be [2, 3, 32] like q_logits, got [2, 2, 32]",
        ),
        (LOGITS, {"mask": TARGETS}, TypeError, "mask must be bool, got int64"),
    ):
        with pytest.raises(error) as raised:
            tether.categorical_kl(LOGITS, p_logits, **options)
        assert str(raised.value) == f"categorical_kl: {message}"


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("face", [tether.token_logps, tether.reference.token_logps])
def test_the_slope_of_a_softcap_keeps_its_digits(face, dtype, bound):
    values = torch.tensor([[300.0, 270.0, -300.0]], dtype=torch.float64)
    z = values / 30
    p = torch.softmax(30 * torch.tanh(z), -1)
    expected = torch.stack([p[0, 1] + p[0, 2], -p[0, 1], -p[0, 2]]) / torch.cosh(z).square()
    logits = values.to(dtype).requires_grad_()
    face(logits, torch.zeros(1, dtype=torch.int64), softcap=30.0)[0].sum().backward()
    torch.testing.assert_close(logits.grad.double(), expected, rtol=bound, atol=0)


def test_a_bad_id_in_compiled_code_is_refused_in_the_name_of_the_function():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(logits, targets):
        return tether.token_logps(logits, targets).logps

    with pytest.raises(ValueError) as caught:
        step(random_logits(2, 8), torch.tensor([3, 9]))
    assert str(caught.value) == (
        "token_logps: targets must be in [0, 8) or ignore_index -100, got 9 at [1]"
    )


@pytest.mark.parametrize("softcap", [0.0, 5.0, 30.0])
@pytest.mark.parametrize("temperature", [1.0, 1e-3, 1e-6])
@pytest.mark.parametrize("size", [1.0, 10.0])
def test_a_small_temperature_multiplies_the_rounding_of_logits_alone(
    softcap, temperature, size, monkeypatch
):
    # Two ulp of the largest final logit over the temperature; no probability is above 1.
    logits = random_logits(64, 50, dtype=torch.float32, seed=1, scale=size)
    targets = logits.argmax(-1)
    targets[::2] = 3
    options = {"temperature": temperature, "softcap": softcap}

    def results(function, x):
        x = x.clone().requires_grad_()
        logps = function(x, targets, **options)[0]
        return logps.detach(), torch.autograd.grad(logps.sum(), x)[0]

    wide = logits.double()
    final = softcap * torch.tanh(wide / softcap) if softcap > 0 else wide
    rounding = 2.0**-22 * final.abs().amax(-1) / temperature
    want, slopes = results(tether.reference.token_logps, wide)
    least = 2.0**-22 * (1 + want.abs())
    part = torch.expm1(rounding).clamp_max(1)[:, None] + 2.0**-22
    for got, gradient in on_both_paths(
        lambda: results(lambda *a, **o: tether.token_logps(*a, **o, entropies=True), logits),
        monkeypatch,
    ):
        assert ((got.double() - want).abs() <= rounding + least).all()
        assert ((gradient.double() - slopes).abs() <= part / temperature).all()
