"""linear_token_logps by torch's operations, of devices without kernels: in chunks too."""

import weakref

import pytest
import tether
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

N, V, H, K = 40, 200, 6, 5
ROW = V * 8  # bytes of a row of logits


@pytest.fixture(autouse=True)
def by_torch(monkeypatch):
    monkeypatch.setattr(tether._ops, "KERNELS", frozenset())


class Largest(TorchDispatchMode):
    """The largest tensor that an operation makes, in numbers."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        out = function(*arguments, **(keywords or {}))
        sizes = (each.numel() for each in tree_leaves(out) if isinstance(each, torch.Tensor))
        self.size = max(self.size, *sizes, 0)
        return out


def batch(dtype=torch.float64):
    torch.manual_seed(0)
    hidden = torch.randn(4, N // 4, H, dtype=dtype).requires_grad_()
    weight = torch.randn(V, H, dtype=dtype).requires_grad_()
    bias = torch.randn(V, dtype=dtype).requires_grad_()
    targets = torch.randint(V, (4, N // 4))
    targets[1, 3] = targets[3, 9] = -100
    return (hidden, weight, targets, bias), torch.randn(2, 4, N // 4, dtype=dtype)


def kept_sets(targets):
    """With a token that has none; large ones, so that a token is not multiplied with its rows."""
    ids = torch.randint(V, (*targets.shape, K))
    ids[2, 1] = -1
    return tether.support(targets, ids)


def evaluated(arrays, upstream, **settings):
    out = tether.linear_token_logps(*arrays, entropies=True, statistics=True, **settings)
    leaves = [each for each in arrays if each.is_floating_point()]
    total = (out.logps * upstream[0] + out.entropies * upstream[1]).sum()
    return out, torch.autograd.grad(total, leaves, retain_graph=True), (total, leaves)


@pytest.mark.parametrize("has_support", [False, True])
@pytest.mark.parametrize("rows", [1, 7, N])
def test_chunks_give_what_all_tokens_at_once_give(has_support, rows):
    arrays, upstream = batch()
    support = kept_sets(arrays[2]) if has_support else None
    expected, gradients, _ = evaluated(arrays, upstream, support=support)
    out, found, (total, leaves) = evaluated(
        arrays, upstream, support=support, chunk_bytes=rows * ROW
    )
    for ours, theirs in zip(out, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    again = torch.autograd.grad(total, leaves)  # what is computed once more may be so twice
    for ours, theirs, second in zip(found, gradients, again, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        assert torch.equal(ours, second)


@pytest.mark.parametrize("has_support", [False, True])
def test_logits_of_a_chunk_are_all_that_is_held(has_support):
    arrays, upstream = batch()
    support = kept_sets(arrays[2]) if has_support else None

    def held(**settings):
        """The largest tensor that is made, and the numbers that are kept for backward."""
        sizes = []

        def count(tensor):
            sizes.append(tensor.numel())
            return tensor

        with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            evaluated(arrays, upstream, support=support, **settings)
        return largest.size, sum(sizes)

    largest, kept = held(chunk_bytes=7 * ROW)
    assert 6 * V <= largest <= 7 * V and kept < N * V
    assert min(held()) >= N * V


def test_logits_of_a_chunk_are_gone_when_the_next_are_made(monkeypatch):
    alive, linear = [], torch.nn.functional.linear

    def watched(*arguments):
        out = linear(*arguments)
        alive.append(weakref.ref(out))
        return out

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    arrays, _ = batch()
    out = tether.linear_token_logps(*arrays, entropies=True, chunk_bytes=7 * ROW)
    assert len(alive) == 6 and not any(each() is not None for each in alive)
    out.logps.sum().backward()
    assert not any(each() is not None for each in alive)


def test_unread_rows_may_hold_anything_and_errors_are_those_of_the_function():
    (hidden, weight, targets, bias), upstream = batch()
    with torch.no_grad():
        hidden[1, 3] = torch.nan
    _, gradients, _ = evaluated((hidden, weight, targets, bias), upstream, chunk_bytes=7 * ROW)
    assert all(each.isfinite().all() for each in gradients) and not gradients[0][1, 3].any()
    support = kept_sets(targets)
    targets[0, 0] = (targets[0, 0] + 1) % V
    with pytest.raises(ValueError, match=r"^linear_token_logps: support must be made of the same"):
        tether.linear_token_logps(hidden, weight, targets, support=support, chunk_bytes=7 * ROW)


def test_the_loss_of_hidden_states_too():
    (hidden, weight, targets, bias), _ = batch()
    advantages, mask = torch.randn(4, dtype=torch.float64), targets >= 0

    def loss(**settings):
        out = tether.linear_policy_loss(
            hidden, weight, targets, advantages, mask, bias, objective="gspo", **settings
        )
        return out.loss, torch.autograd.grad(out.loss, (hidden, weight, bias))

    torch.testing.assert_close(loss(chunk_bytes=7 * ROW), loss(), rtol=1e-12, atol=1e-14)


def test_a_second_derivative_is_refused():
    (hidden, weight, targets, bias), _ = batch()
    out = tether.linear_token_logps(hidden, weight, targets, bias, chunk_bytes=7 * ROW)
    (once,) = torch.autograd.grad(out.logps.sum(), hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="linear_token_logps"):
        once.sum().backward()
