"""Log-probabilities over kept ids from hidden states."""

import pytest
import tether
import torch
from kept_sets import OPTIONS, H, K, V, by_columns_that_are_not_there, gradients, kept_sets, normal


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("chunk_bytes", [1, 2 * K * H * 8, 1 << 20])
def test_hidden_states_equal_their_logits(kernel, with_bias, by_rows, chunk_bytes, monkeypatch):
    monkeypatch.setattr("tether._support._FASTER", 1 if by_rows else V)
    if not kernel:
        monkeypatch.setattr("tether.logits.has_kernel", lambda tensor, *others: False)
        monkeypatch.setattr("tether.linear.has_eager_kernel", lambda tensor, *others: False)
    targets, ids = kept_sets()
    hidden, weight = normal(3, 4, H, seed=2), normal(V, H, seed=3)
    leaves = [each.requires_grad_() for each in (hidden, weight, normal(V, seed=4))]
    leaves = leaves[: 3 if with_bias else 2]
    support = tether.support(targets, ids)
    out = tether.linear_token_logps(
        *leaves[:2], targets, *leaves[2:], support=support, chunk_bytes=chunk_bytes, **OPTIONS
    )
    logits = torch.nn.functional.linear(*leaves)
    logps, entropies = by_columns_that_are_not_there(logits, targets, ids)
    torch.testing.assert_close(out.logps, logps, rtol=0, atol=1e-13)
    torch.testing.assert_close(out.entropies, entropies, rtol=0, atol=1e-13)
    expected = gradients(tether.TokenLogps(logps, entropies), leaves)
    for a, b in zip(gradients(out, leaves), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize("by_rows", [True, False])
def test_gradient_is_the_derivative_of_the_value(by_rows, monkeypatch):
    monkeypatch.setattr("tether._support._FASTER", 1 if by_rows else V)
    targets, ids = kept_sets()
    support = tether.support(targets, ids)
    leaves = normal(3, 4, H, seed=2).requires_grad_(), normal(V, H, seed=3).requires_grad_()

    def both(hidden, weight):
        return tether.linear_token_logps(hidden, weight, targets, support=support, entropies=True)[
            :2
        ]

    assert torch.autograd.gradcheck(both, leaves)


def test_the_default_device_changes_nothing():
    targets, ids = kept_sets()
    hidden, weight = normal(3, 4, H, seed=2).requires_grad_(), normal(V, H, seed=3).requires_grad_()

    def results():
        support = tether.support(targets, ids)
        out = tether.linear_token_logps(hidden, weight, targets, support=support, entropies=True)
        return *out[:2], *gradients(out, [hidden, weight])

    expected = results()
    with torch.device("meta"):
        actual = results()
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("by_rows", [True, False])
def test_half_weights_add_up_in_float32(by_rows, monkeypatch):
    monkeypatch.setattr("tether._support._FASTER", 1 if by_rows else V)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = normal(512, 16, seed=2).bfloat16(), normal(V, 16, seed=3).bfloat16()
    targets = torch.randint(V, (512,), generator=generator)
    ids = torch.rand(512, V, generator=generator).argsort(-1)[:, :8]
    support = tether.support(targets, ids)
    leaves = [each.double().requires_grad_() for each in (hidden, weight)]
    out = tether.linear_token_logps(*leaves, targets, support=support)
    (expected,) = torch.autograd.grad(out.logps.sum(), [leaves[1]])
    leaf = weight.requires_grad_()
    out = tether.linear_token_logps(hidden, leaf, targets, support=support)
    (actual,) = torch.autograd.grad(out.logps.sum(), [leaf])
    assert out.logps.dtype == torch.float32 and actual.dtype == torch.bfloat16
    assert (actual.double() - expected).norm() / expected.norm() < 2**-7


@pytest.mark.parametrize("level", ["token", "sequence_mean"])
def test_linear_policy_loss_is_the_loss_of_these_log_probabilities(level):
    targets, ids = kept_sets()
    support = tether.support(targets, ids)
    hidden, weight = normal(3, 4, H, seed=2).requires_grad_(), normal(V, H, seed=3).requires_grad_()
    mask = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    batch = {"advantages": torch.tensor([1.0, -1.0, 0.5]), "response_mask": mask}
    batch["old_logps"] = -normal(3, 4, seed=5).abs()
    settings = {"objective": "ppo", "level": level, "entropy_coef": 0.1}
    out = tether.linear_policy_loss(hidden, weight, targets, support=support, **batch, **settings)
    made = tether.linear_token_logps(hidden, weight, targets, support=support, entropies=True)
    loss = tether.policy_loss(made.logps, entropies=made.entropies, **batch, **settings).loss
    torch.testing.assert_close(out.loss, loss, rtol=1e-14, atol=0)
    assert torch.equal(out.logps, made.logps.detach().masked_fill(~mask, 0))
    expected = torch.autograd.grad(loss, [hidden, weight])
    for a, b in zip(torch.autograd.grad(out.loss, [hidden, weight]), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


def test_of_a_part_of_the_batch():
    targets, ids = kept_sets()
    support = tether.support(targets, ids)
    part = tether.Support(*(each[:, 1:3] for each in support))
    hidden, weight = normal(3, 4, H, seed=2), normal(V, H, seed=3)
    whole = tether.linear_token_logps(hidden, weight, targets, support=support)
    out = tether.linear_token_logps(hidden[:, 1:3], weight, targets[:, 1:3], support=part)
    torch.testing.assert_close(out.logps, whole.logps[:, 1:3], rtol=0, atol=1e-14)


def test_rows_of_a_fixed_size_do_not_depend_on_the_batch():
    targets, ids = kept_sets()
    support = tether.support(targets, ids)
    hidden, weight = normal(3, 4, H, seed=2), normal(V, H, seed=3)
    fixed = {"rows_per_chunk": 4}
    both = tether.linear_token_logps(hidden, weight, targets, support=support, **fixed).logps
    part = tether.Support(*(each[1:2] for each in support))
    alone = tether.linear_token_logps(hidden[1:2], weight, targets[1:2], support=part, **fixed)
    assert torch.equal(alone.logps, both[1:2])
    free = tether.linear_token_logps(hidden, weight, targets, support=support).logps
    torch.testing.assert_close(both, free, rtol=0, atol=1e-13)


def test_tangents_are_refused():
    targets, ids = kept_sets()
    support = tether.support(targets, ids)
    with torch.autograd.forward_ad.dual_level():
        hidden = torch.autograd.forward_ad.make_dual(
            normal(3, 4, H, seed=2), normal(3, 4, H, seed=5)
        )
        with pytest.raises(NotImplementedError, match="linear_token_logps: hidden must have no"):
            tether.linear_token_logps(hidden, normal(V, H, seed=3), targets, support=support)


@pytest.mark.parametrize("by_rows", [True, False])
def test_second_derivatives_are_refused(by_rows, monkeypatch):
    monkeypatch.setattr("tether._support._FASTER", 1 if by_rows else V)
    sentence = "backward must run once" if by_rows else "the gradient must not be differentiated"
    targets, ids = kept_sets()
    support = tether.support(targets, ids)
    hidden, weight = normal(3, 4, H, seed=2).requires_grad_(), normal(V, H, seed=3)
    logps = tether.linear_token_logps(hidden, weight, targets, support=support).logps
    (first,) = torch.autograd.grad(logps.square().sum(), hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"linear_token_logps: {sentence}"):
        first.square().sum().backward()


@pytest.mark.parametrize("function", ["linear_token_logps", "linear_policy_loss"])
def test_in_a_traced_graph_an_unknown_id_is_refused_by_the_function(function):
    targets, ids = kept_sets()
    support = tether.support(targets, ids)
    hidden, weight = normal(3, 4, H, seed=2), normal(V, H, seed=3)
    rest = (torch.ones(3, dtype=torch.float64), torch.ones(3, 4))
    rest = rest if function == "linear_policy_loss" else ()

    def first(support):
        return getattr(tether, function)(hidden, weight, targets, *rest, support=support)[0]

    graph = torch.compile(first, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(graph(support), first(support))
    high = support._replace(ids=support.ids + V)
    sentence = f"^{function}: support must have ids below {V}, got"
    for run in (first, graph):
        with pytest.raises(IndexError, match=sentence):
            run(high)
