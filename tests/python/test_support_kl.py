"""KL of two rows of logits over the ids that a sampler kept."""

import math

import pytest
import tether
import torch
from kept_sets import V, absent_columns, kept_sets, normal, upstream

TEMPERATURE = 0.7


def by_definition(q_logits, p_logits, absent, known):
    """The three values of softmaxes over the columns that are not absent, 0 where not known."""

    def log_softmax(x):
        kept = torch.where(absent, -1e300, x / TEMPERATURE).masked_fill(~known[..., None], 0)
        return kept.log_softmax(-1)

    def mean(of, what):
        return (of.exp() * what.masked_fill(absent, 0)).sum(-1).masked_fill(~known, 0)

    q, p = log_softmax(q_logits), log_softmax(p_logits)
    return tether.CategoricalKl(mean(q, q - p), mean(p, p - q), -mean(q, q))


def gradients(out, leaves):
    kl, entropies = upstream()
    total = (kl * out.kl + (0.3 - kl) * out.reverse_kl + entropies * out.entropies).sum()
    return torch.autograd.grad(total, leaves)


def batch():
    """Logits of both, the support, the columns beside it and the tokens that have one."""
    targets, ids = kept_sets()
    q, p = (normal(3, 4, V, seed=seed).requires_grad_() for seed in (1, 2))
    return q, p, tether.support(targets, ids), absent_columns(targets, ids), targets >= 0


def without_kernels(monkeypatch):
    monkeypatch.setattr("tether._ops.KERNELS", frozenset())


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_is_that_of_the_kept_logits(dtype, kernel, monkeypatch):
    if not kernel:
        without_kernels(monkeypatch)
    q, p, support, absent, known = batch()
    narrow = [each.detach().to(dtype).requires_grad_() for each in (q, p)]
    wide = [each.detach().double().requires_grad_() for each in narrow]
    out = tether.categorical_kl(*narrow, temperature=TEMPERATURE, support=support)
    want = by_definition(*wide, absent, known)
    bound = 1e-13 if dtype == torch.float64 else 1e-5
    for got, each in zip(out, want, strict=True):
        torch.testing.assert_close(got.double(), each, rtol=bound, atol=bound)
    rounding = 2**-8 if dtype == torch.bfloat16 else bound
    for got, each in zip(gradients(out, narrow), gradients(want, wide), strict=True):
        torch.testing.assert_close(got.double(), each, rtol=rounding, atol=rounding)
        assert (got[absent | ~known[..., None]] == 0).all()


@pytest.mark.parametrize("kernel", [True, False])
def test_nothing_else_is_read_and_a_mask_takes_more_out(kernel, monkeypatch):
    if not kernel:
        without_kernels(monkeypatch)
    q, p, support, absent, known = batch()
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1, 1] = False
    want = by_definition(q, p, absent, known & mask)
    expected = gradients(want, (q, p))
    poisoned = [
        x.detach().masked_fill(absent | ~(known & mask)[..., None], math.nan).requires_grad_()
        for x in (q, p)
    ]
    support.ids[1, 1] = V + 3  # of a masked position
    out = tether.categorical_kl(*poisoned, mask=mask, temperature=TEMPERATURE, support=support)
    for got, each in zip(out, want, strict=True):
        torch.testing.assert_close(got, each, rtol=0, atol=1e-13)
    for got, each in zip(gradients(out, poisoned), expected, strict=True):
        torch.testing.assert_close(got, each, rtol=0, atol=1e-13)


def test_packed_ids_are_the_same_sets_to_the_bit():
    q, p, support, *_ = batch()
    targets, ids = kept_sets()
    flat = ids.view(12, -1)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), (flat >= 0).sum(-1).cumsum(0)])
    other = tether.support(targets, flat[flat >= 0].to(torch.int32), offsets)
    one, two = (tether.categorical_kl(q, p, support=each) for each in (support, other))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_all_ids_and_none_are_the_whole_rows_to_the_bit():
    q, p, *_ = batch()
    targets, _ = kept_sets()
    want = tether.categorical_kl(q, p, mask=targets >= 0)
    for ids in (torch.arange(V).expand(3, 4, V), torch.full((3, 4, 1), -1)):
        out = tether.categorical_kl(q, p, support=tether.support(targets, ids))
        assert all(torch.equal(a, b) for a, b in zip(out, want, strict=True))


@pytest.mark.parametrize("kernel", [True, False])
def test_wrong_ones_are_refused(kernel, monkeypatch):
    if not kernel:
        without_kernels(monkeypatch)
    q, p, support, *_ = batch()
    high = support._replace(ids=support.ids.clone())
    high.ids[1, 2, 0] = V
    for given, logits, kind, sentence in (
        (support.ids, (q, p), TypeError, "must be a tether.Support, got Tensor"),
        (high, (q, p), IndexError, f"must have ids below {V}, got {V}"),
        (support, (q[1:], p[1:]), ValueError, f"must be of q_logits [2, 4, {V}], got [3, 4]"),
        (
            support._replace(whole=support.ids),
            (q, p),
            ValueError,
            "must be as tether.support makes it, got another",
        ),
    ):
        with pytest.raises(kind) as raised:
            tether.categorical_kl(*logits, support=given)
        assert str(raised.value) == f"categorical_kl: support {sentence}"


def test_it_compiles_and_has_no_second_derivative():
    q, p, support, *_ = batch()

    def step(x):
        return tether.categorical_kl(x, p.detach(), support=support).kl.square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (want,) = torch.autograd.grad(step(q), q, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(q), q)[0], want)
    with pytest.raises(NotImplementedError, match="categorical_kl: the gradient must not be"):
        want.sum().backward()
