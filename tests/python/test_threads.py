"""Calls from many Python threads at once, and backward of one graph from two: the bits of one."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import tether
import torch
from batches import OBJECTIVES, evaluated, padded_batch
from test_devices import CALLS
from tether._ops import Arriving, once_differentiable

THREADS, ROUNDS = 8, 6
LEAVES = ("logps", "entropies", "values", "terms", "logits", "q_logits", "hidden", "weight", "bias")


@pytest.fixture(autouse=True)
def turns_are_short():
    """Of a thread until the next one."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def tensors_in(out):
    if isinstance(out, torch.Tensor):
        return [out]
    if isinstance(out, (tuple, list)):
        return [tensor for each in out for tensor in tensors_in(each)]
    fields = getattr(out, "__dict__", {})
    return [tensor for each in fields.values() for tensor in tensors_in(each)]


def outcome(function, wanted):
    """Every result of a call, and the gradients of those that have one."""
    own = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in CALLS[function].items()}
    leaves = [own[name].requires_grad_() for name in wanted]
    found = tensors_in(getattr(tether, function)(**own))
    upstream = [each.double().sum() * (i + 1) for i, each in enumerate(found) if each.requires_grad]
    slopes = torch.autograd.grad(sum(upstream), leaves, allow_unused=True) if upstream else ()
    return [each.detach() for each in (*found, *slopes) if each is not None]


def differentiable(function):
    """The leaves that a function takes."""
    wanted = []
    for name in LEAVES:
        if isinstance(CALLS[function].get(name), torch.Tensor):
            try:
                outcome(function, [*wanted, name])
            except ValueError as error:
                assert "must not require" in str(error)
            else:
                wanted.append(name)
    return wanted


def same(a, b):
    """In every bit; NaN is NaN."""
    return len(a) == len(b) and all(
        x.dtype == y.dtype and bool(((x == y) | ((x != x) & (y != y))).all())
        for x, y in zip(a, b, strict=True)
    )


def at_once(run):
    """run(thread) of every thread, all of which begin together."""
    begin = threading.Barrier(THREADS)

    def started(thread):
        begin.wait()
        return run(thread)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(started, range(THREADS)))


def test_every_function_from_many_threads():
    leaves = {function: differentiable(function) for function in CALLS}
    assert sum(map(bool, leaves.values())) > 8
    alone = {function: outcome(function, leaves[function]) for function in CALLS}
    names = list(CALLS)

    def run(thread):
        order = names[thread:] + names[:thread]
        return [
            name
            for _ in range(ROUNDS)
            for name in order
            if not same(outcome(name, leaves[name]), alone[name])
        ]

    assert at_once(run) == [[]] * THREADS


@pytest.mark.parametrize("path", ["kernels", "other"])
def test_every_objective_from_many_threads(path, monkeypatch):
    if path == "other":
        monkeypatch.setattr(tether._ops, "KERNELS", frozenset())
    batch = padded_batch(columns=40, lengths=(31, 0, 40, 1, 22))

    def all_of(thread):
        order = OBJECTIVES[thread:] + OBJECTIVES[:thread]
        return {name: evaluated(batch, objective=name) for name in order}

    alone = all_of(0)
    for each in at_once(all_of):
        assert all(same(each[name], alone[name]) for name in OBJECTIVES)


def test_large_batches_from_many_threads():
    """Each uses torch's threads too."""
    batch = padded_batch(columns=1700, lengths=(1700, 1000) * 12)
    alone = {name: evaluated(batch, objective=name) for name in ("ppo", "gspo")}

    def all_of(_):
        return {name: evaluated(batch, objective=name) for name in alone}

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for each in at_once(all_of):
            assert all(same(each[name], alone[name]) for name in alone)
    finally:
        torch.set_num_threads(before)


def graphs():
    torch.manual_seed(0)
    hidden, weight = (torch.randn(size, dtype=torch.float64) for size in ((4, 50, 16), (300, 16)))
    ids, mask = torch.randint(300, (4, 50)), torch.rand(4, 50) < 0.8
    advantages = torch.randn(4, dtype=torch.float64)
    batch = (ids, advantages, mask)
    return {
        "policy_loss": lambda x: tether.policy_loss(x[..., 0], *batch[1:], objective="ppo").loss,
        "token_logps": lambda x: tether.token_logps(x @ weight.T, ids).logps.square().sum(),
        "linear_token_logps": lambda x: (
            tether.linear_token_logps(x, weight, ids).logps.square().sum()
        ),
        "linear_policy_loss": lambda x: tether.linear_policy_loss(x, weight, *batch).loss,
        "linear_policy_loss of sequences": lambda x: (
            tether.linear_policy_loss(x, weight, *batch, objective="gspo").loss
        ),
    }, hidden


@pytest.mark.parametrize("name", graphs()[0])
def test_one_graph_backwards_from_many_threads(name):
    functions, hidden = graphs()

    def gradient(loss, leaf):
        return torch.autograd.grad(loss, leaf, retain_graph=True)[0]

    for _ in range(ROUNDS):
        leaf = hidden.clone().requires_grad_()
        loss = functions[name](leaf)
        slopes = at_once(lambda _, loss=loss, leaf=leaf: gradient(loss, leaf))
        want = gradient(functions[name](leaf), leaf)
        # Logits that are kept are read once; made again they may differ by rounding.
        for each in slopes:
            torch.testing.assert_close(each, want, rtol=1e-13, atol=1e-15)


class Waits(torch.autograd.Function):
    """Between a loss and its leaf, until every thread's backward is there."""

    @staticmethod
    def forward(ctx, x, barrier):
        ctx.barrier = barrier
        return x.clone()

    @staticmethod
    def backward(ctx, upstream):
        ctx.barrier.wait(timeout=60)
        return upstream, None


def test_what_arrives_on_other_devices_is_of_each_backward():
    leaf, arriving = torch.ones((), requires_grad=True), Arriving(others=False)
    x = once_differentiable("loss", leaf, arriving=arriving)
    loss = arriving.at(Waits.apply(x, threading.Barrier(THREADS)))

    def gradient(thread):
        upstream = torch.tensor(float(thread + 1))
        return torch.autograd.grad(loss, leaf, upstream, retain_graph=True)[0].item()

    assert at_once(gradient) == [thread + 1 for thread in range(THREADS)]
    assert not arriving._upstreams
