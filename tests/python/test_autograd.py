"""Every differentiable function under torch's modes: checkpoint, autocast, inference_mode, forward
mode, compile; and gradients of any layout and size that arrive."""

import math
import re

import pytest
import tether
import torch
from batches import LEVELS
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint


def normal(*size, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)


MASK = torch.tensor([[True, True, False, True], [True, True, True, False]])
TARGETS = torch.tensor([[1, 7, -100, 3], [0, 3, 5, 2]])
HEAD = torch.tensor([[0, 4]]).expand(2, 4, 2).contiguous()


SQUARED = tether.Surrogate(lambda token: token.log_ratio**2 - token.ratio * token.advantage)


def functions(dtype=torch.float64):
    """name -> (function of the leaves to a scalar, leaves, constants)."""
    logps, logits = -normal(2, 4, seed=1).abs(), normal(2, 4, 8, seed=2)
    hidden, weight, bias = normal(2, 4, 5, seed=3), normal(8, 5, seed=4), normal(8, seed=5)
    log_p = torch.log_softmax(normal(2, 4, 8, seed=6), -1)
    batch = {
        "advantages": normal(2, seed=7),
        "response_mask": MASK.double(),
        "old_logps": logps + 0.1 * normal(2, 4, seed=8),
        "ref_logps": logps + 0.1 * normal(2, 4, seed=9),
    }
    pairs = {"response_mask": MASK.double(), "ref_logps": batch["ref_logps"]}

    def both(out):
        return (out.logps * 1.5 + out.entropies).sum()

    def linear(function):
        return lambda h, w, b, **c: function(h, w, bias=b, chunk_bytes=3 * 8 * 8, **c)

    linear_logps = linear(tether.linear_token_logps)
    linear_policy = linear(tether.linear_policy_loss)
    linear_pairs = linear(tether.linear_preference_loss)
    leaves = (hidden, weight, bias)
    targets = {"targets": TARGETS}
    known = {"targets": TARGETS.clamp_min(0)}
    rows = {
        "policy_loss": (
            lambda x, h, **c: (
                tether.policy_loss(x, entropies=h, beta=0.1, entropy_coef=0.1, **c).loss
            ),
            (logps, logps.exp()),
            batch,
        ),
        "policy_loss of a surrogate": (
            lambda x, **c: tether.policy_loss(x, objective=SQUARED, level="turn_mean", **c).loss,
            (logps,),
            batch,
        ),
        "policy_token_losses": (
            lambda x, **c: tether.policy_token_losses(x, beta=0.1, **c).sum(),
            (logps,),
            batch,
        ),
        "preference_loss": (lambda x, **c: tether.preference_loss(x, **c).loss, (logps,), pairs),
        "dpo_loss": (lambda x, **c: tether.dpo_loss(x, **c).loss, (logps,), pairs),
        "value_loss": (
            lambda x, **c: tether.value_loss(x, **c).loss,
            (normal(2, 4, seed=10),),
            {"returns": normal(2, 4, seed=11), "old_values": logps, "response_mask": MASK.double()},
        ),
        "token_logps": (
            lambda x, **c: both(tether.token_logps(x, entropies=True, **c)),
            (logits,),
            targets,
        ),
        "token_logps of a buffer": (
            lambda x, **c: both(
                tether.token_logps(
                    x, entropies=True, gradient_buffer=torch.empty_like(x).detach(), **c
                )
            ),
            (logits,),
            targets,
        ),
        "linear_token_logps": (
            lambda *x, **c: both(linear_logps(*x, entropies=True, **c)),
            leaves,
            targets,
        ),
        "linear_policy_loss": (
            lambda *x, **c: linear_policy(*x, beta=0.1, **c).loss,
            leaves,
            batch | known,
        ),
        "linear_policy_loss of sequences": (
            lambda *x, **c: linear_policy(*x, objective="gspo", **c).loss,
            leaves,
            batch | known,
        ),
        "linear_preference_loss": (
            lambda *x, **c: linear_pairs(*x, **c).loss,
            leaves,
            pairs | known,
        ),
        "categorical_kl": (
            lambda q, p, **c: sum(each.sum() for each in tether.categorical_kl(q, p, **c)),
            (logits, log_p),
            {"mask": MASK},
        ),
        "categorical_kl of a constant": (
            lambda q, **c: tether.categorical_kl(q, **c).kl.sum(),
            (logits,),
            {"p_logits": log_p, "mask": MASK},
        ),
        "top_k_kl": (
            lambda q, **c: tether.top_k_kl(q, **c).sum(),
            (logits,),
            {
                "head_ids": HEAD,
                "head_logps": log_p.gather(-1, HEAD),
                "targets": TARGETS,
                "target_logps": log_p.gather(-1, TARGETS.clamp_min(0)[..., None])[..., 0],
            },
        ),
    }

    def narrow(each):
        return each.to(dtype) if each.is_floating_point() else each

    return {
        name: (
            function,
            tuple(map(narrow, leaves)),
            {key: narrow(each) for key, each in constants.items()},
        )
        for name, (function, leaves, constants) in rows.items()
    }


NAMES = tuple(functions())


def results(function, leaves, constants, wrap=lambda function: function):
    leaves = [each.detach().clone().requires_grad_() for each in leaves]
    loss = wrap(lambda *x: function(*x, **constants))(*leaves)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def assert_equal(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_checkpoint_changes_nothing(name):
    row = functions()[name]

    def again(function):
        return lambda *leaves: checkpoint(function, *leaves, use_reentrant=False)

    assert_equal(results(*row, wrap=again), results(*row))


@pytest.mark.parametrize("name", NAMES)
def test_constants_may_come_from_inference_mode(name):
    function, leaves, constants = functions()[name]
    with torch.inference_mode():
        made = {key: each.clone() for key, each in constants.items()}
    assert_equal(results(function, leaves, made), results(function, leaves, constants))


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("linear")])
def test_weights_may_come_from_inference_mode(name):
    function, (hidden, weight, bias), constants = functions()[name]
    with torch.inference_mode():
        frozen = weight.clone(), bias.clone()

    def of_hidden(*rest):
        return lambda h, **c: function(h, *rest, **c)

    actual = results(of_hidden(*frozen), (hidden,), constants)
    assert_equal(actual, results(of_hidden(weight, bias), (hidden,), constants))


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("name", [name for name in NAMES if "buffer" not in name])
def test_torch_func_differentiates_in_each_leaf(name, on_cpu, monkeypatch):
    function, leaves, constants = functions()[name]
    _, *expected = results(function, leaves, constants)
    if not on_cpu:
        monkeypatch.setattr("tether._ops.KERNELS", frozenset())
    for place, gradient in enumerate(expected):

        def of_one(leaf, place=place):
            return function(*leaves[:place], leaf, *leaves[place + 1 :], **constants)

        _, pull = torch.func.vjp(of_one, leaves[place])
        for actual in (
            torch.func.grad(of_one)(leaves[place]),
            torch.func.jacrev(of_one)(leaves[place]),
            pull(torch.ones((), dtype=gradient.dtype))[0],
        ):
            torch.testing.assert_close(actual, gradient, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_inference_mode_itself(name):
    function, leaves, constants = functions()[name]
    expected, *_ = results(function, leaves, constants)
    with torch.inference_mode():
        assert torch.equal(function(*leaves, **constants), expected)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("linear")])
def test_autocast_leaves_what_multiplies_nothing(name):
    row = functions(torch.float32)[name]

    def under_autocast(function):
        def run(*leaves):
            with torch.autocast("cpu", torch.bfloat16):
                return function(*leaves)

        return run

    assert_equal(results(*row, wrap=under_autocast), results(*row))


@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("linear")])
def test_autocast_multiplies_in_its_dtype(name, backward_inside):
    function, leaves, constants = functions(torch.float32)[name]
    leaves = [each.clone().requires_grad_() for each in leaves]
    rounded = [each.bfloat16() for each in leaves]
    expected = function(*rounded, **constants)
    expected = expected.detach(), *torch.autograd.grad(expected, leaves)
    for mixed in (leaves, [rounded[0], *leaves[1:]]):  # what the layer before hands over
        with torch.autocast("cpu", torch.bfloat16):
            loss = function(*mixed, **constants)
            if backward_inside:
                actual = loss.detach(), *torch.autograd.grad(loss, leaves)
        if not backward_inside:
            actual = loss.detach(), *torch.autograd.grad(loss, leaves)
        assert_equal(actual, expected)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("linear")])
def test_mixed_dtypes_are_promoted(name):
    function, (hidden, weight, bias), constants = functions(torch.float32)[name]
    narrow = hidden.bfloat16()
    expected = results(function, (narrow.float(), weight, bias), constants)
    actual = results(function, (narrow, weight, bias), constants)
    assert actual[1].dtype == torch.bfloat16
    assert_equal((actual[0], *actual[2:]), (expected[0], *expected[2:]))
    assert torch.equal(actual[1], expected[1].bfloat16())


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "policy_token_losses"])
def test_forward_mode_is_refused(name, on_cpu, monkeypatch):
    if not on_cpu:
        monkeypatch.setattr(tether._ops, "KERNELS", frozenset())
    function, leaves, constants = functions()[name]
    tangents = tuple(torch.ones_like(each) for each in leaves)
    with pytest.raises(NotImplementedError, match="must have no tangent, got one") as caught:
        torch.func.jvp(lambda *x: function(*x, **constants), leaves, tangents)
    called = name.split(" ")[0]
    assert str(caught.value).startswith(f"{called}: ")
    assert str(caught.value).endswith(
        "must have no tangent, got one. Forward-mode derivatives are not supported: use backward"
    )
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=called):
        duals = [forward_ad.make_dual(*each) for each in zip(leaves, tangents, strict=True)]
        function(*duals, **constants)


CONSTANTS = [
    (name, key)
    for name, (_, _, constants) in functions().items()
    for key, each in constants.items()
    if each.is_floating_point()
]


@pytest.mark.parametrize("name, key", CONSTANTS)
def test_tangents_of_constants_are_refused(name, key):
    function, leaves, constants = functions()[name]

    def run(constant):
        return function(*leaves, **constants | {key: constant})

    with pytest.raises(NotImplementedError) as caught:
        torch.func.jvp(run, (constants[key],), (torch.ones_like(constants[key]),))
    assert str(caught.value) == (
        f"{name.split(' ')[0]}: {key} must have no tangent, got one. Forward-mode derivatives are "
        "not supported: use backward"
    )


ROWS, ONES = normal(2, 3), torch.ones(2, 3, dtype=torch.float64)
DOORS = {
    "policy_loss: beta": lambda x: tether.policy_loss(
        ROWS, ONES, ONES, ref_logps=ROWS, beta=x[0, 0]
    ),
    "policy_loss: normalizer.policy": lambda x: tether.policy_loss(
        ROWS, ONES, ONES, normalizer=tether.Normalizer(policy=x[0, 0])
    ),
    "policy_token_losses: entropy_coef": lambda x: tether.policy_token_losses(
        ROWS, ONES, ONES, entropies=ROWS, entropy_coef=x[0, 0]
    ),
    "preference_loss: pairs": lambda x: tether.preference_loss(ROWS, ROWS, ONES, pairs=x[0, 0]),
    "value_loss: normalizer.scale": lambda x: tether.value_loss(
        ROWS, ROWS, ONES, normalizer=tether.Normalizer(scale=x[0, 0])
    ),
    "group_advantage: rewards": lambda x: tether.group_advantage(x[0], 3),
    "discounted_returns: rewards": lambda x: tether.discounted_returns(x, ONES),
    "discounted_returns: bootstrap": lambda x: tether.discounted_returns(
        ROWS, ONES, bootstrap=x[:, 0]
    ),
    "generalized_advantage_estimation: values": lambda x: tether.generalized_advantage_estimation(
        ROWS, x, ONES
    ),
    "generalized_advantage_estimation: lambdas": lambda x: tether.generalized_advantage_estimation(
        ROWS, ROWS, ONES, lambdas=x
    ),
    "moments: values": lambda x: tether.moments(x, ONES),
    "whiten: values": lambda x: tether.whiten(x, ONES),
    "whiten: response_mask": lambda x: tether.whiten(ROWS, x),
    "kl_report: log_ratios": lambda x: tether.kl_report(x, ONES),
    "head_logps: logits": lambda x: tether.head_logps(x, torch.tensor([[0], [1]])),
    "token_logps: temperature": lambda x: tether.token_logps(
        ROWS, torch.tensor([0, 1]), temperature=x[0, 0]
    ),
}


@pytest.mark.parametrize("where", DOORS)
def test_tangents_are_refused_at_every_door(where):
    with forward_ad.dual_level(), pytest.raises(NotImplementedError) as caught:
        DOORS[where](forward_ad.make_dual(ONES, ROWS))
    assert str(caught.value) == (
        f"{where} must have no tangent, got one. Forward-mode derivatives are not supported: use "
        "backward"
    )


def test_policy_token_losses_have_forward_mode():
    function, leaves, constants = functions()["policy_token_losses"]
    tangents = tuple(torch.ones_like(each) for each in leaves)
    _, tangent = torch.func.jvp(lambda *x: function(*x, **constants), leaves, tangents)
    _, gradient = results(function, leaves, constants)
    torch.testing.assert_close(tangent, gradient.sum())


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("upstream", [math.inf, -math.inf, math.nan])
def test_a_gradient_of_0_stays_0_whatever_arrives(name, upstream, on_cpu, monkeypatch):
    if not on_cpu:
        if name == "token_logps of a buffer":
            return  # on a CPU alone
        monkeypatch.setattr(tether._ops, "KERNELS", frozenset())
    function, leaves, constants = functions()[name]
    _, *finite = results(function, leaves, constants)
    _, *spoilt = results(lambda *x, **c: upstream * function(*x, **c), leaves, constants)
    for a, b in zip(spoilt, finite, strict=True):
        assert not a.isfinite().all()
        assert (a[b == 0] == 0).all()


CLIP = tether.Surrogate(
    lambda token, epsilon=0.2: (
        -torch.minimum(
            token.ratio * token.advantage,
            token.ratio.clamp(1 - epsilon, 1 + epsilon) * token.advantage,
        )
    )
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("upstream", [1e-6, 3e38, -3e38, math.inf, math.nan])
def test_what_arrives_at_clipped_tokens_is_the_same_on_every_path(dtype, upstream, monkeypatch):
    logps = -normal(2, 6, seed=1).abs().to(dtype)
    batch = (torch.tensor([1.0, -2.0]), torch.ones(2, 6, dtype=torch.bool))
    old_logps = logps - torch.tensor([0.5, -0.5, 0.1, 0.0, 0.9, -0.1], dtype=dtype)

    def gradient(objective):
        leaf = logps.clone().requires_grad_()
        loss = tether.policy_loss(leaf, *batch, objective=objective, old_logps=old_logps).loss
        (loss * upstream).backward()
        return leaf.grad

    expected = gradient("ppo")
    assert (expected == 0).sum() == 3
    monkeypatch.setattr(tether._ops, "KERNELS", frozenset())
    for actual in (gradient("ppo"), gradient(CLIP)):
        torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("upstream", [1.0, 0.25, 65536.0])
def test_parameters_of_a_formula_get_what_arrives(upstream, on_cpu, monkeypatch):
    if not on_cpu:
        monkeypatch.setattr(tether._ops, "KERNELS", frozenset())
    slope = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    logps, advantages, mask = -normal(2, 6).abs(), normal(2), torch.ones(2, 6)
    own = tether.Surrogate(lambda token: -slope * token.ratio * token.advantage)
    leaf = logps.clone().requires_grad_()
    loss = tether.policy_loss(leaf, advantages, mask, objective=own).loss
    (upstream * loss).backward()
    expected = -advantages.mean()
    torch.testing.assert_close(slope.grad, upstream * expected)
    torch.testing.assert_close(leaf.grad, (-upstream * 0.5 / 12 * advantages)[:, None].expand(2, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk_bytes", [1, 256 << 20])
def test_upstream_gradients_may_be_expanded(dtype, chunk_bytes):
    hidden, weight = normal(40, 6, seed=1, dtype=dtype), normal(9, 6, seed=2, dtype=dtype)
    targets = torch.arange(40) % 9

    def run(weigh):
        leaves = [each.clone().requires_grad_() for each in (hidden, weight)]
        out = tether.linear_token_logps(*leaves, targets, entropies=True, chunk_bytes=chunk_bytes)
        return torch.autograd.grad(weigh(out.logps) + weigh(out.entropies), leaves)

    ones = torch.ones(40, dtype=dtype)
    assert_equal(run(torch.Tensor.sum), run(lambda x: (x * ones).sum()))


def test_one_buffer_for_two_calls_is_noticed():
    first, second = (normal(3, 8, seed=i).requires_grad_() for i in range(2))
    buffer, targets = torch.empty(3, 8, dtype=torch.float64), torch.tensor([1, 2, 3])
    outs = [
        tether.token_logps(each, targets, gradient_buffer=buffer).logps.sum()
        for each in (first, second)
    ]
    with pytest.raises(ValueError) as caught:
        sum(outs).backward()
    assert str(caught.value) == (
        "token_logps: gradient_buffer must be used for nothing else until backward, got one that "
        "has changed. Give each call a buffer of its own"
    )
    for each in (first, second):  # one after the other
        loss = tether.token_logps(each, targets, gradient_buffer=buffer).logps.sum()
        (gradient,) = torch.autograd.grad(loss, each)
        assert torch.equal(
            gradient, torch.autograd.grad(tether.token_logps(each, targets).logps.sum(), each)[0]
        )


@pytest.mark.parametrize("between", ["itself", "a view", "a sum", "a product"])
def test_a_buffer_used_again_leaves_gradients_of_leaves_alone(between):
    leaf, targets = normal(3, 8, seed=0).requires_grad_(), torch.tensor([1, 2, 3])
    buffer = torch.empty(1, 3, 8, dtype=torch.float64) if between == "a view" else leaf.detach() * 0

    def logps(**options):
        logits = {
            "itself": lambda: leaf,
            "a view": lambda: leaf.view(1, 3, 8),
            "a sum": lambda: leaf + 0,
            "a product": lambda: leaf * 1,
        }[between]()
        return tether.token_logps(logits, targets.view(logits.shape[:-1]), **options).logps

    for factor in (1, 2):
        (factor * logps(gradient_buffer=buffer).sum()).backward()
    (expected,) = torch.autograd.grad(3 * logps().sum(), leaf)
    torch.testing.assert_close(leaf.grad, expected)


def test_a_buffer_of_inference_mode_is_refused():
    with torch.inference_mode():
        buffer = torch.empty(3, 8)
    logits = torch.zeros(3, 8, requires_grad=True)
    with pytest.raises(ValueError, match="gradient_buffer must not be made under inference_mode"):
        tether.token_logps(logits, torch.tensor([1, 2, 3]), gradient_buffer=buffer)


def references():
    """The path of other devices: name -> (function of leaves, leaves, constants)."""
    rows = functions()
    of_logps = {"aggregation": "sequence_mean_token_mean", "beta": 0.1, "kl_correction": "ratio"}

    def policy(level):
        def run(x, h, **c):
            settings = {"objective": "grpo", "level": level, "entropy_coef": 0.1, **of_logps}
            return tether.reference.policy_loss(x, entropies=h, **c, **settings).loss

        return run

    def row(name, function):
        return function, *rows[name][1:]

    return {
        **{f"policy_loss, {level}": row("policy_loss", policy(level)) for level in LEVELS},
        "preference_loss": row(
            "preference_loss", lambda x, **c: tether.reference.preference_loss(x, **c).loss
        ),
        "value_loss": row("value_loss", lambda x, **c: tether.reference.value_loss(x, **c).loss),
        "token_logps": row(
            "token_logps", lambda x, **c: sum(tether.reference.token_logps(x, **c)).sum()
        ),
        "categorical_kl": row(
            "categorical_kl of a constant",
            lambda q, **c: sum(tether.reference.categorical_kl(q, **c)).sum(),
        ),
        "top_k_kl": row("top_k_kl", lambda q, **c: tether.reference.top_k_kl(q, **c).sum()),
    }


@pytest.mark.parametrize("name", references())
def test_other_devices_take_constants_from_inference_mode(name):
    function, leaves, constants = references()[name]
    with torch.inference_mode():
        made = {key: each.clone() for key, each in constants.items()}
    assert_equal(results(function, leaves, made), results(function, leaves, constants))


def test_numbers_may_come_from_inference_mode():
    logps, ref_logps = (normal(2, 3, seed=i) for i in range(2))
    ones = torch.ones(2, 3, dtype=torch.float64)

    def number(value, inference):
        with torch.inference_mode(inference):
            return torch.tensor(value, dtype=torch.float64)

    def policy(function, inference):
        numbers = {
            name: number(0.3, inference)
            for name in ("beta", "entropy_coef", "epsilon_low", "epsilon_high", "constant")
        }
        return lambda x: function(
            x, ones, ones, old_logps=ref_logps, ref_logps=ref_logps, entropies=x.exp(), **numbers
        )

    def step(inference):
        return tether.Normalizer(number(5.0, inference), world_size=number(2.0, inference))

    def losses(inference):
        pairs = {
            name: number(0.3, inference)
            for name in ("beta", "label_smoothing", "pairs", "world_size", "loss_scale")
        }
        reference = tether.reference
        return (
            lambda x: policy(tether.policy_token_losses, inference)(x).sum(),
            lambda x: policy(tether.policy_loss, inference)(x).loss,
            lambda x: policy(reference.policy_loss, inference)(x).loss,
            lambda x: reference.policy_loss(x, ones, ones, normalizer=step(inference)).loss,
            lambda x: reference.value_loss(x, ones, ones, normalizer=step(inference)).loss,
            lambda x: reference.preference_loss(x, ones, ref_logps, **pairs).loss,
            lambda x: tether.preference_loss(x, ref_logps, ones, **pairs).loss,
        )

    for actual, expected in zip(losses(True), losses(False), strict=True):
        assert_equal(results(actual, (logps,), {}), results(expected, (logps,), {}))


@pytest.mark.parametrize("name", references())
def test_autocast_changes_nothing_on_other_devices(name):
    function, leaves, constants = references()[name]
    leaves = [each.float() for each in leaves]
    constants = {k: c.float() if c.is_floating_point() else c for k, c in constants.items()}

    def under_autocast(function):
        def run(*leaves):
            with torch.autocast("cpu", torch.bfloat16):
                return function(*leaves)

        return run

    row = function, leaves, constants
    assert_equal(results(*row, wrap=under_autocast), results(*row))


ON_EACH_PATH = pytest.mark.parametrize(
    ("name", "on_cpu"),
    [
        (name, on_cpu)
        for name in NAMES
        for on_cpu in (True, False)
        if on_cpu or "buffer" not in name
    ],
)


def with_leaves(name, on_cpu, monkeypatch):
    """The function of a name, its leaves made anew and its constants, on one path."""
    if not on_cpu:
        monkeypatch.setattr(tether._ops, "KERNELS", frozenset())
    function, leaves, constants = functions()[name]
    return function, [each.clone().requires_grad_() for each in leaves], constants


@ON_EACH_PATH
def test_a_second_derivative_is_refused_however_it_is_asked_for(name, on_cpu, monkeypatch):
    function, leaves, constants = with_leaves(name, on_cpu, monkeypatch)
    gradients = torch.autograd.grad(function(*leaves, **constants), leaves, create_graph=True)
    for gradient in gradients:
        for again in (
            lambda g: torch.autograd.grad(g.sum(), leaves, allow_unused=True, retain_graph=True),
            lambda g: g.sum().backward(retain_graph=True),
        ):
            with pytest.raises(NotImplementedError) as caught:
                again(gradient)
            called, rule = str(caught.value).split(": ", 1)
            assert called == name.split(" of ")[0]
            assert re.search("must (run once|not be differentiated)", rule)


NESTED = {
    "hessian": torch.func.hessian,
    "jacrev of jacrev": lambda f: torch.func.jacrev(torch.func.jacrev(f)),
    "jacfwd of jacfwd": lambda f: torch.func.jacfwd(torch.func.jacfwd(f)),
    "grad of jvp": lambda f: torch.func.grad(
        lambda x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1]
    ),
}


@pytest.mark.parametrize("nested", NESTED)
@pytest.mark.parametrize("name", [name for name in NAMES if "buffer" not in name])
def test_second_derivatives_of_torch_func_are_refused_in_our_words(name, nested):
    function, (leaf, *others), constants = functions()[name]
    with pytest.raises(NotImplementedError) as caught:
        NESTED[nested](lambda x: function(x, *others, **constants))(leaf)
    called, rule = str(caught.value).split(": ", 1)
    assert called == name.split(" of ")[0]
    assert re.search("must (run once|not be differentiated|have no tangent)", rule)


@ON_EACH_PATH
def test_a_batch_of_gradients_is_each_of_them_or_refused(name, on_cpu, monkeypatch):
    function, leaves, constants = with_leaves(name, on_cpu, monkeypatch)
    loss = function(*leaves, **constants)
    upstream = torch.tensor([1.0, -2.0], dtype=loss.dtype)
    try:
        both = torch.autograd.grad(loss, leaves, upstream, retain_graph=True, is_grads_batched=True)
    except NotImplementedError as error:
        assert str(error) == (
            f"{name.split(' of ')[0]}: gradients must arrive one at a time, got a batch of them. "
            "Use torch.func.jacrev in place of is_grads_batched"
        )
    else:
        for each, one in zip(both, torch.autograd.grad(loss, leaves), strict=True):
            torch.testing.assert_close(each, torch.stack([one, -2 * one]))


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("name", [name for name in NAMES if "buffer" not in name])
def test_gradients_of_a_graph_that_stays_are_the_callers(name, on_cpu, monkeypatch):
    if not on_cpu:
        monkeypatch.setattr(tether._ops, "KERNELS", frozenset())
    function, leaves, constants = functions()[name]
    leaves = [each.clone().requires_grad_() for each in leaves]
    loss = function(*leaves, **constants)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    expected = [each.clone() for each in first]
    for each in first:
        each.fill_(math.nan)
    assert_equal(torch.autograd.grad(loss, leaves), expected)


@pytest.mark.parametrize("name", NAMES)
def test_eager_calls_take_a_shorter_way_to_the_same_bits(name, monkeypatch):
    row = functions()[name]
    short = results(*row)
    monkeypatch.setattr("tether._functions.is_eager", lambda: False)
    for mine, theirs in zip(short, results(*row), strict=True):
        assert torch.equal(mine, theirs)


def test_numbers_that_are_kept_are_not_those_of_a_mode():
    """Options of an earlier call, in a mode in which tensors hold nothing."""
    batch = normal(2, 4), normal(2), MASK

    def loss(batch):
        return tether.policy_loss(*batch, epsilon_low=0.125, beta=0.0).loss

    first = loss(batch)
    with FakeTensorMode() as mode:
        assert isinstance(loss([mode.from_tensor(each) for each in batch]), FakeTensor)
    assert torch.equal(loss(batch), first)


@pytest.mark.parametrize("name", NAMES)
def test_a_first_call_in_inference_mode_leaves_later_ones_alone(name):
    row = functions()[name]
    expected = results(*row)
    tether._lists._constants.cache_clear()
    function, leaves, constants = row
    with torch.inference_mode():
        function(*leaves, **constants)
    assert_equal(results(*row), expected)


@pytest.mark.parametrize("name", [name for name in NAMES if "buffer" not in name])
def test_torch_func_differentiates_what_is_mapped(name):
    function, leaves, constants = functions()[name]
    _, expected, *_ = results(function, leaves, constants)
    stacked = torch.stack([leaves[0], leaves[0]])

    def summed(both):
        def of_one(leaf):
            return function(leaf, *leaves[1:], **constants)

        return torch.vmap(of_one)(both).sum()

    actual = torch.func.grad(summed)(stacked)
    torch.testing.assert_close(actual, torch.stack([expected] * 2), rtol=1e-11, atol=1e-12)
