"""tether.top_k_kl and head_logps against tether.reference and the exact divergence."""

import math

import pytest
import tether
import torch
from batches import words
from paths import on_both_paths

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TAILS = ("bucket", "k1", "k3", "reverse_bucket")


def random_case(dtype=torch.float64, size=8, vocabulary=300):
    """q_logits and the four arguments that follow; one sample in the head, one position ignored."""
    generator = torch.Generator().manual_seed(3)
    q = (2 * torch.randn(2, 3, vocabulary, generator=generator, dtype=torch.float64)).to(dtype)
    noise = torch.randn(q.shape, generator=generator, dtype=torch.float64)
    log_p = torch.log_softmax(q.double() + 0.5 * noise, -1)
    ids = q.topk(size).indices
    targets = torch.randint(vocabulary, (2, 3), generator=generator)
    if size > 0:
        targets[0, 1] = ids[0, 1, 0]
    target_logps = log_p.gather(-1, targets[..., None])[..., 0]
    targets[1, 2] = -100
    return q, ids, log_p.gather(-1, ids), targets, target_logps


def results(function, arguments, **options):
    q = arguments[0].detach().requires_grad_()
    kl = function(q, *arguments[1:], **options)
    weights = torch.linspace(-0.5, 2, kl.numel(), dtype=torch.float64).view(kl.shape)
    return kl.detach(), torch.autograd.grad((weights * kl).sum(), q)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("size", [0, 1, 20])
def test_equals_reference(dtype, tail, size):
    q, *p = random_case(dtype, size)
    options = {"tail": tail, "temperature": 0.9, "precision": 2.0**-40}
    kl, dq = results(tether.top_k_kl, (q, *p), **options)
    want, want_dq = results(tether.reference.top_k_kl, (q.double(), *p), **options)
    wide = dtype == torch.float64
    assert kl.dtype == (torch.float64 if wide else torch.float32) and dq.dtype == dtype
    tolerance = 1e-12 if wide else 1e-5
    torch.testing.assert_close(kl.double(), want, rtol=tolerance, atol=tolerance)
    rounding = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(dtype, 0) + tolerance
    torch.testing.assert_close(dq.double(), want_dq, rtol=rounding, atol=rounding)
    assert kl[1, 2] == 0 and dq[1, 2].abs().max() == 0


@pytest.mark.parametrize("tail", ["k1", "k3"])
def test_unbiased_in_value_and_gradient(tail):
    # Over all samples, each with its probability: that of the exact divergence.
    q, ids, _, _, _ = random_case(vocabulary=40)
    q, ids = q[0, :1].requires_grad_(), ids[0, :1]
    p_logits = q.detach().flip(-1)
    samples = torch.arange(40)
    log_p = torch.log_softmax(p_logits, -1)
    kl = tether.top_k_kl(
        q.expand(40, 40),
        ids.expand(40, 8),
        tether.head_logps(p_logits, ids).expand(40, 8),
        samples,
        log_p[0],
        tail=tail,
        precision=2.0**-50,
    )
    weights = torch.softmax(q.detach()[0], -1)
    exact = tether.categorical_kl(q, p_logits).kl[0]
    torch.testing.assert_close((weights * kl).sum(), exact, rtol=1e-12, atol=0)
    (got,) = torch.autograd.grad((weights * kl).sum(), q)
    (want,) = torch.autograd.grad(exact, q)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


def test_reverse_of_the_whole_vocabulary_is_exact():
    q, *_ = random_case(vocabulary=40)
    teacher = q.flip(-1)
    ids = torch.arange(40).expand(q.shape)
    p = (ids, tether.head_logps(teacher, ids))
    kl, dq = results(tether.top_k_kl, (q, *p), tail="reverse_bucket", precision=2.0**-52)
    want, want_dq = results(lambda x: tether.categorical_kl(x, teacher).reverse_kl, (q,))
    torch.testing.assert_close(kl, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(dq, want_dq, rtol=1e-11, atol=1e-13)


def test_the_reverse_bucket_is_that_of_a_distribution_with_one_more_outcome():
    """For a teacher that gave its 8 most likely ids alone."""
    q, *_ = random_case(vocabulary=40)
    teacher = torch.log_softmax(q.flip(-1), -1)
    log_p, ids = teacher.topk(8)

    def bucketed(q):
        log_q = torch.log_softmax(q, -1)
        rest = log_q.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        p_rest = torch.log1p(-log_p.exp().sum(-1, keepdim=True))
        both = torch.cat([log_p, p_rest], -1), torch.cat([log_q.gather(-1, ids), rest], -1)
        return (both[0].exp() * (both[0] - both[1])).sum(-1)

    kl, dq = results(tether.top_k_kl, (q, ids, log_p), tail="reverse_bucket")
    want, want_dq = results(bucketed, (q,))
    torch.testing.assert_close(kl, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(dq, want_dq, rtol=1e-10, atol=1e-12)
    assert (kl < tether.categorical_kl(q, teacher).reverse_kl).all()


def test_head_logps():
    q, ids, *_ = random_case(torch.bfloat16)
    q.requires_grad_()
    got = tether.head_logps(q, ids.int(), temperature=0.7)
    want = torch.log_softmax(q.detach().double() / 0.7, -1).gather(-1, ids)
    torch.testing.assert_close(got, want.float(), rtol=0, atol=2e-6)
    assert not got.requires_grad
    assert tether.head_logps(q, ids[..., :0]).shape == (2, 3, 0)


def test_a_head_of_next_to_no_mass_keeps_its_gradient():
    q = torch.tensor([[0.0, -32.0, -1.0, -2.0, -0.5]], dtype=torch.float64)
    p = (torch.tensor([[1]]), torch.tensor([[-63.0]]).double(), torch.tensor([0]))
    arguments = (q, *p, torch.tensor([60.0], dtype=torch.float64))
    settings = {"temperature": 0.5, "precision": 2.0**-52}
    (_, got), (_, want) = (
        results(lambda *x, f=each: f(*x, **settings), arguments)
        for each in (tether.reference.top_k_kl, tether.top_k_kl)
    )
    assert want[0, 1].abs() > 1e-2
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("y", [20.0, 45.0, 80.0, 200.0])
def test_runaway_samples_are_pulled_back(dtype, y):
    q = torch.tensor([[0.0, -3.0, -y]], dtype=dtype)
    p = (torch.tensor([[0]]), torch.tensor([[-2.0]], dtype=dtype), torch.tensor([2]))
    arguments = (q, *p, torch.tensor([-1.0], dtype=dtype))
    got = results(tether.top_k_kl, arguments)
    want = results(tether.reference.top_k_kl, arguments)
    for actual, expected in zip(got, want, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        assert torch.isfinite(actual).all()


@pytest.mark.parametrize("tail", TAILS)
def test_no_positions(tail):
    q, *p = random_case(torch.float32)
    none = [each.flatten(0, 1)[:0] for each in (q, *p)]
    assert tether.top_k_kl(*none, tail=tail).shape == (0,)


def test_ignored_positions_may_hold_anything():
    clean = random_case(torch.float32)
    poisoned = [each.clone() for each in clean]
    for each in (poisoned[0], poisoned[2], poisoned[4]):
        each[1, 2] = math.nan
    poisoned[1][1, 2] = -7
    for tail in TAILS:
        for function in (tether.top_k_kl, tether.reference.top_k_kl):
            got, want = (results(function, each, tail=tail) for each in (poisoned, clean))
            if function is tether.top_k_kl:
                assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
            else:
                torch.testing.assert_close(got, want)


def test_opcheck_compile_and_second_derivative():
    q, ids, logps, targets, target_logps = random_case()
    arguments = (q.requires_grad_(), ids, logps, targets, target_logps)
    options = words({"precision": 2.0**-20}, tail="k3")
    torch.library.opcheck(torch.ops.tether.top_k_kl_forward, (*arguments, *options))
    rows = ids.view(-1, ids.shape[-1])
    torch.library.opcheck(torch.ops.tether.head_logps, (q.detach().view(6, -1), rows, *words()))

    def step(q_logits):
        return tether.top_k_kl(q_logits.tanh(), *arguments[1:]).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(q), q)
    (want,) = torch.autograd.grad(step(q), q)
    torch.testing.assert_close(got, want)
    loss = tether.top_k_kl(*arguments).square().sum()
    (first,) = torch.autograd.grad(loss, q, create_graph=True)
    with pytest.raises(NotImplementedError, match="top_k_kl: the gradient must not be"):
        first.square().sum().backward()


GOOD = (
    torch.zeros(2, 3, 9),
    torch.arange(4).expand(2, 3, 4),
    torch.full((2, 3, 4), -2.5),
    torch.zeros(2, 3, dtype=torch.int64),
    torch.full((2, 3), -2.5),
)


def bad_ids(value):
    ids = GOOD[1].clone()
    ids[1, 2, 3] = value
    return ids


@pytest.mark.parametrize(
    ("place", "value", "error", "message"),
    [
        (0, None, ValueError, "top_k_kl: q_logits must be given, got none"),
        (0, GOOD[0].long(), TypeError, "top_k_kl: q_logits must be float32, float64, bfloat16 or "
         "float16, got int64"),
        (1, GOOD[2], TypeError, "top_k_kl: head_ids must be int32 or int64, got float32"),
        (1, GOOD[1][0], ValueError, "top_k_kl: head_ids must be [..., k] like q_logits [2, 3, 9], "
         "got [3, 4]"),
        (1, bad_ids(9), IndexError, "top_k_kl: head_ids must be in [0, 9), got 9 at [1, 2, 3]"),
        (1, bad_ids(0), ValueError, "top_k_kl: head_ids must be all different in a row, got 0 "
         "again at [5, 3]"),
        (2, GOOD[2][..., 1:], ValueError, "top_k_kl: head_logps must be [2, 3, 4] like head_ids, "
         "got [2, 3, 3]"),
        (2, GOOD[2].clone().requires_grad_(), ValueError, "top_k_kl: head_logps must not require "
         "grad, got a tensor that does. It is a constant of the loss: pass head_logps.detach()"),
        (3, None, ValueError, "top_k_kl: targets must be given, got none"),
        (3, GOOD[3] + 9, IndexError, "top_k_kl: targets must be in [0, 9) or ignore_index -100, "
         "got 9 at [0, 0]"),
        (4, None, ValueError, "top_k_kl: target_logps must be given, got none"),
    ],
)  # fmt: skip
def test_refuses(place, value, error, message, monkeypatch):
    arguments = [*GOOD[:place], value, *GOOD[place + 1 :]]
    for kernels in (tether._ops.KERNELS, frozenset()):
        monkeypatch.setattr(tether._ops, "KERNELS", kernels)
        with pytest.raises(error) as raised:
            tether.top_k_kl(*arguments)
        assert str(raised.value) == message


def test_ids_of_ignored_positions_may_be_equal(monkeypatch):
    ids, targets = torch.zeros(2, 3, 4, dtype=torch.int64), torch.full((2, 3), -100)
    for kernels in (tether._ops.KERNELS, frozenset()):
        monkeypatch.setattr(tether._ops, "KERNELS", kernels)
        assert (tether.top_k_kl(GOOD[0], ids, GOOD[2], targets, GOOD[4]) == 0).all()


def test_refuses_options():
    assert tether.top_k_kl(*GOOD[:3], tail="bucket").shape == (2, 3)
    known = "bucket, k1, k3, reverse_bucket"
    with pytest.raises(ValueError, match=f"tail must be one of {known}, got .k2"):
        tether.top_k_kl(*GOOD, tail="k2")
    with pytest.raises(ValueError, match=r"top_k_kl: temperature must be in \[1e-06, 1e\+06\]"):
        tether.top_k_kl(*GOOD, temperature=0)
    graph = torch.compile(tether.head_logps, backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match=r"^head_logps: head_ids must be in \[0, 9\), got -1 at"):
        graph(torch.zeros(2, 9), torch.tensor([[0, -1], [0, 1]]))
    with pytest.raises(IndexError, match=r"head_logps: head_ids must be in \[0, 9\), got -1"):
        tether.head_logps(GOOD[0], bad_ids(-1))
    with pytest.raises(ValueError, match=r"head_logps: temperature must be in"):
        tether.head_logps(GOOD[0], GOOD[1], temperature=-1)


@pytest.mark.parametrize("tail", ["bucket", "k3", "reverse_bucket"])
def test_a_small_tail_keeps_its_digits(tail, monkeypatch):
    # float32 beside float64: 16 of 17 columns are the head, whose rest is a small difference.
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(400, 17, generator=generator)
    log_p = torch.log_softmax(q.double() + 0.1 * torch.randn(q.shape, generator=generator), -1)
    ids, y = q.topk(16).indices, q.argmin(-1)
    log_p = log_p.float().double()  # rounded alike
    p = ids, log_p.gather(-1, ids), y, log_p.gather(-1, y[:, None])[:, 0]
    options = {"tail": tail, "precision": 2.0**-23}
    wide = results(tether.reference.top_k_kl, (q.double(), *p), **options)
    p = ids, p[1].float(), y, p[3].float()
    for each in on_both_paths(lambda: results(tether.top_k_kl, (q, *p), **options), monkeypatch):
        for got, want in zip(each, wide, strict=True):
            assert (got.double() - want).square().mean().sqrt() < 1.5e-8
