"""Log-probabilities over the ids that a sampler kept."""

import math

import pytest
import tether
import torch
from kept_sets import (
    OPTIONS,
    H,
    K,
    V,
    absent_columns,
    by_columns_that_are_not_there,
    gradients,
    kept_sets,
    normal,
)


@pytest.mark.parametrize("kernel", [True, False])
def test_logits_equal_those_with_the_other_columns_away(kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr("tether.logits.has_kernel", lambda tensor, *others: False)
    targets, ids = kept_sets()
    logits = normal(3, 4, V, seed=1).requires_grad_()
    support = tether.support(targets, ids)
    out = tether.token_logps(logits, targets, support=support, **OPTIONS)
    logps, entropies = by_columns_that_are_not_there(logits, targets, ids)
    torch.testing.assert_close(out.logps, logps, rtol=0, atol=1e-14)
    torch.testing.assert_close(out.entropies, entropies, rtol=0, atol=1e-14)
    (expected,) = gradients(tether.TokenLogps(logps, entropies), [logits])
    (actual,) = gradients(out, [logits])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-14)
    assert (actual[absent_columns(targets, ids)] == 0).all()


def test_ids_one_token_after_the_other_are_the_same_sets():
    targets, ids = kept_sets()
    flat = ids.reshape(-1, K)
    sizes = (flat >= 0).sum(-1)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    token_ids = flat[flat >= 0].to(torch.int32)
    padded, other = tether.support(targets, ids), tether.support(targets, token_ids, offsets)
    for a, b in zip(padded, other, strict=True):
        assert torch.equal(a, b)


def test_what_it_says_of_its_sets():
    targets, ids = kept_sets()
    support = tether.support(targets, ids)
    known = targets >= 0
    assert not support.added[0].any()
    outside = ~(ids == targets[..., None]).any(-1) & (ids >= 0).any(-1) & known
    assert torch.equal(support.added, outside) and outside.sum() >= 4
    assert support.whole.nonzero().tolist() == [[2, 0]]
    sizes = (support.ids >= 0).sum(-1)
    assert torch.equal(sizes, ((ids >= 0).sum(-1) + outside) * known)
    inside = support.position >= 0
    found = support.ids.gather(-1, support.position.clamp_min(0)[..., None])[..., 0]
    assert torch.equal(found[inside], targets[inside])
    assert torch.equal(inside, known & ~support.whole)


def test_what_is_not_kept_is_not_read():
    targets, ids = kept_sets()
    support = tether.support(targets, ids)
    logits = normal(3, 4, V, seed=1)
    expected = tether.token_logps(logits, targets, support=support, **OPTIONS)
    poisoned = logits.masked_fill(absent_columns(targets, ids), math.nan)
    poisoned[0, 1] = math.nan
    out = tether.token_logps(poisoned.requires_grad_(), targets, support=support, **OPTIONS)
    assert torch.equal(out.logps, expected.logps) and torch.equal(out.entropies, expected.entropies)
    (gradient,) = gradients(out, [poisoned])
    assert gradient.isfinite().all()
    hidden, weight = normal(3, 4, H, seed=2), normal(V, H, seed=3)
    expected = tether.linear_token_logps(hidden, weight, targets, support=support)
    hidden[0, 1] = math.nan
    out = tether.linear_token_logps(hidden.requires_grad_(), weight, targets, support=support)
    assert torch.equal(out.logps, expected.logps)
    (gradient,) = torch.autograd.grad(out.logps.sum(), [hidden])
    assert (gradient[0, 1] == 0).all() and gradient.isfinite().all()


def test_a_kept_logit_that_is_no_number_spoils_its_token_alone():
    targets, ids = kept_sets()
    support = tether.support(targets, ids)
    logits = normal(3, 4, V, seed=1)
    logits[1, 2, support.ids[1, 2, 0]] = math.nan
    logps = tether.token_logps(logits, targets, support=support).logps
    assert logps.isnan().nonzero().tolist() == [[1, 2]]


def test_all_ids_are_the_whole_vocabulary():
    targets, _ = kept_sets()
    logits = normal(3, 4, V, seed=1)
    every = tether.support(targets, torch.arange(V).expand(3, 4, V))
    none = tether.support(targets, torch.full((3, 4, 1), -1))
    expected = tether.token_logps(logits, targets, entropies=True, statistics=True)
    for support in (every, none):
        out = tether.token_logps(logits, targets, support=support, entropies=True, statistics=True)
        for a, b in zip(out, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


def test_of_packed_and_empty_batches():
    targets, ids = kept_sets()
    flat = tether.support(targets.reshape(-1), ids.reshape(-1, K))
    logits = normal(12, V, seed=1)
    out = tether.token_logps(logits, targets.reshape(-1), support=flat)
    rows = tether.token_logps(logits.view(3, 4, V), targets, support=tether.support(targets, ids))
    assert torch.equal(out.logps.view(3, 4), rows.logps)
    nothing = torch.zeros(0, dtype=torch.int64)
    support = tether.support(nothing, torch.zeros(0, 3, dtype=torch.int64))
    assert tether.token_logps(torch.zeros(0, V), nothing, support=support).logps.shape == (0,)
    hidden = torch.zeros(0, H, requires_grad=True)
    out = tether.linear_token_logps(hidden, torch.zeros(V, H), nothing, support=support)
    (gradient,) = torch.autograd.grad(out.logps.sum(), [hidden])
    assert gradient.shape == (0, H)


def test_ids_of_ignored_targets_may_be_anything():
    targets, ids = kept_sets()
    support = tether.support(targets, ids)
    unknown = support.ids.clone()
    unknown[1] = V + 3
    ignored = targets.clone()
    ignored[1] = -100
    logits = normal(3, 4, V, seed=1)
    out = tether.token_logps(logits, ignored, support=support._replace(ids=unknown))
    assert (out.logps[1] == 0).all()
    expected = tether.token_logps(logits, targets, support=support).logps
    assert torch.equal(out.logps[::2], expected[::2])


UNKNOWN_IN_A_GRAPH = r"^token_logps: ids of support must be in \[0, 40\) or -1 for none, got"


def test_in_a_traced_graph_another_support_is_refused_too():
    targets, ids = kept_sets()
    support, logits = tether.support(targets, ids), normal(3, 4, V, seed=1)
    graph = torch.compile(
        lambda x, y, s: tether.token_logps(x, y, support=s).logps,
        backend="aot_eager",
        fullgraph=True,
    )
    expected = tether.token_logps(logits, targets, support=support).logps
    torch.testing.assert_close(graph(logits, targets, support), expected)
    with pytest.raises(ValueError, match="support must be made of the same targets, got others"):
        graph(logits, (targets + 1) % V, support)
    ignored = tether.support(targets.index_fill(0, torch.tensor([0]), -100), ids)
    with pytest.raises(ValueError, match="support must be made of the same targets, got others"):
        graph(logits, targets, ignored)
    high = support._replace(ids=support.ids + V)
    with pytest.raises(ValueError, match=UNKNOWN_IN_A_GRAPH):
        graph(logits, targets, high)


def test_on_a_device_a_traced_graph_gives_nan(monkeypatch):
    monkeypatch.setattr("tether.logits.has_kernel", lambda tensor, *others: False)
    targets, ids = kept_sets()
    support, logits = tether.support(targets, ids), normal(3, 4, V, seed=1)
    graph = torch.compile(
        lambda x, y, s: tether.token_logps(x, y, support=s).logps, backend="aot_eager"
    )
    expected = tether.token_logps(logits, targets, support=support).logps
    torch.testing.assert_close(graph(logits, targets, support), expected)
    assert graph(logits, (targets + 1) % V, support).isnan().any()
    assert graph(logits, targets, support._replace(ids=support.ids + V)).isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_kernel_equals_torch(dtype, monkeypatch):
    targets, ids = kept_sets()
    support, logits = tether.support(targets, ids), 3 * normal(3, 4, V, seed=1).to(dtype)

    def results():
        leaf = logits.clone().requires_grad_()
        out = tether.token_logps(leaf, targets, support=support, statistics=True, **OPTIONS)
        return *out, *gradients(out, [leaf])

    actual = results()
    monkeypatch.setattr("tether.logits.has_kernel", lambda tensor, *others: False)
    for a, b in zip(actual, results(), strict=True):
        wide = 1e-14 if dtype == torch.float64 else 1e-6
        rounding = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(a.dtype, wide)
        torch.testing.assert_close(a, b, rtol=rounding, atol=wide)


def test_the_gradient_may_go_to_memory_of_the_caller():
    targets, ids = kept_sets()
    support = tether.support(targets, ids)
    leaf = normal(3, 4, V, seed=1).requires_grad_()
    out = tether.token_logps(leaf, targets, support=support, **OPTIONS)
    (expected,) = gradients(out, [leaf])
    buffer = torch.full_like(leaf, math.nan, requires_grad=False)
    for memory, logits in ((buffer, leaf), (None, leaf.detach().clone().requires_grad_())):
        memory = logits.detach() if memory is None else memory
        out = tether.token_logps(
            logits, targets, support=support, gradient_buffer=memory, **OPTIONS
        )
        (gradient,) = gradients(out, [logits])
        assert torch.equal(gradient, expected) and gradient.data_ptr() == memory.data_ptr()


def test_ids_that_are_there_twice_count_once():
    targets, ids = kept_sets()
    once = tether.support(targets, ids)
    for a, b in zip(tether.support(targets, ids.repeat(1, 1, 3)), once, strict=True):
        assert torch.equal(a, b)


ONE = torch.tensor([0])
WRONG = {
    "token_ids must be int32 or int64, got float32": {"token_ids": torch.zeros(3, 4, 2)},
    "token_ids must be a tensor, got list": {"token_ids": [[1]]},
    "token_ids must be [..., K] like targets [3, 4] without offsets, got [3, 4]": {
        "token_ids": torch.zeros(3, 4, dtype=torch.int64)
    },
    "token_ids must be at least 0, or -1 for none, got -2": {
        "token_ids": torch.full((3, 4, 1), -2)
    },
    "token_ids must be [M] with offsets, got [3, 4, 5]": {"offsets": torch.zeros(13).long()},
    "offsets must be [13] for targets [3, 4], got [1]": {"token_ids": ONE, "offsets": ONE},
    "offsets must run from 0 to 1, the size of token_ids, got 0 to 0": {
        "token_ids": ONE,
        "offsets": torch.zeros(13, dtype=torch.int64),
    },
    "targets must be int32 or int64, got float32": {"targets": torch.zeros(3, 4)},
    "targets must be at least 0 or ignore_index 5, got -100": {"ignore_index": 5},
    "ignore_index must be an int, got float": {"ignore_index": 0.5},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_sets_are_refused(message):
    targets, ids = kept_sets()
    with pytest.raises((ValueError, TypeError)) as caught:
        tether.support(**{"targets": targets, "token_ids": ids} | WRONG[message])
    assert str(caught.value) == f"support: {message}"


def test_wrong_supports_are_refused():
    targets, ids = kept_sets()
    logits, support = normal(3, 4, V, seed=1), tether.support(targets, ids)
    high = support._replace(ids=support.ids + V)
    other = "support must be as tether.support makes it, got another"
    for strange in (
        support._replace(ids=support.ids.float()),
        support._replace(ids=support.ids[:2]),
        support._replace(whole=None),
        support._replace(whole=support.whole.long()),
    ):
        with pytest.raises(ValueError, match=other):
            tether.token_logps(logits, targets, support=strange)
    calls = {
        "support must be a tether.Support, got Tensor": {"support": ids},
        "support must be of targets [12], got [3, 4]": {
            "logits": logits.view(12, V),
            "targets": targets.view(12),
        },
        f"support must have ids below {V}, got {int(high.ids.max())}": {"support": high},
        "support must be made of the same targets, got others": {"targets": (targets + 1) % V},
    }
    for message, changes in calls.items():
        arguments = {"logits": logits, "targets": targets, "support": support} | changes
        with pytest.raises((ValueError, TypeError, IndexError)) as caught:
            tether.token_logps(**arguments)
        assert str(caught.value) == f"token_logps: {message}"
