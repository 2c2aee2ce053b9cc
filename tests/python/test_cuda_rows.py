"""Rows of logits on the way of CUDA tensors, beside those of the CPU: further statistics, kept ids,
ids out of range. Kernels are teams of host threads (host_operators.py)."""

import host_operators
import pytest
import tether
import torch
from kept_sets import V, absent_columns, kept_sets, normal, upstream
from test_cuda_linear import NoWait
from test_shards import Left, by_shards

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module", autouse=True)
def host():
    host_operators.load()


def on_both(run):
    """(by kernels for CUDA, which wait for nothing, by those of the CPU, what the first called)"""
    want = run()
    with host_operators.kernels_of("cpu") as calls, NoWait():
        return run(), want, calls


def assert_same(got, want, dtype=torch.float32):
    tolerance = 2e-5 if dtype == torch.float32 else 1e-2
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def results(out, *leaves):
    """All of them, and the gradients of upstream ones that differ."""
    weights = [each.float() for each in upstream()]
    total = (weights[0] * out.logps).sum()
    if out.entropies is not None:
        total = total + (weights[1] * out.entropies).sum()
    return [*(None if x is None else x.detach() for x in out), *torch.autograd.grad(total, leaves)]


def leaf(*shape, seed, dtype=torch.float32):
    return normal(*shape, seed=seed).to(dtype).requires_grad_()


# ---- further statistics -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entropies", [False, True])
def test_statistics_are_those_of_the_cpu(dtype, entropies):
    targets, _ = kept_sets()
    logits = normal(3, 4, V, seed=1).to(dtype)
    logits[1, 1, 3:9] = -torch.inf
    logits[2, 2, targets[2, 2]] = 9  # the largest
    settings = {"temperature": 0.7, "scale": 1.3, "statistics": True, "entropies": entropies}

    def run():
        x = logits.detach().clone().requires_grad_()
        return results(tether.token_logps(x, targets, **settings), x)

    got, want, calls = on_both(run)
    assert calls == ["token_logps_forward", "token_logps_backward"]
    assert_same(got, want, dtype)
    assert got[4].dtype == torch.bool and got[4][2, 2]


@pytest.mark.parametrize("chunk_bytes", [None, V * 4 * 5])
def test_statistics_of_hidden_states_are_those_of_the_cpu(chunk_bytes):
    targets, _ = kept_sets()

    def run():
        linear = leaf(3, 4, 6, seed=2), leaf(V, 6, seed=3)
        settings = {"temperature": 0.7, "statistics": True, "chunk_bytes": chunk_bytes}
        return results(tether.linear_token_logps(*linear, targets, **settings), *linear)

    got, want, calls = on_both(run)
    assert calls.count("token_logps_forward") == (1 if chunk_bytes is None else 3)
    assert_same(got, want)


def test_a_graph_has_the_statistics():
    targets, _ = kept_sets()
    logits = normal(3, 4, V, seed=1).float()

    def run(x):
        return tether.token_logps(x, targets, statistics=True)

    want = run(logits)
    torch._dynamo.reset()
    with host_operators.kernels_of("cpu") as calls:
        got = torch.compile(run, fullgraph=True, backend="aot_eager")(logits)
    assert calls == ["token_logps_forward"]
    assert_same(got, want)


# ---- kept ids -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("settings", [{}, {"entropies": True, "statistics": True}])
def test_kept_ids_are_those_of_the_cpu(dtype, settings):
    targets, ids = kept_sets()
    support = tether.support(targets, ids)
    absent = absent_columns(targets, ids)
    logits = normal(3, 4, V, seed=1).to(dtype).masked_fill(absent, torch.nan)
    logits[0, 1] = torch.nan  # ignored

    def run():
        x = logits.detach().clone().requires_grad_()
        out = tether.token_logps(x, targets, support=support, temperature=0.7, **settings)
        return results(out, x)

    got, want, calls = on_both(run)
    assert calls == ["token_logps_forward", "token_logps_backward"]
    assert_same(got, want, dtype)
    assert (got[-1][absent] == 0).all()


def test_the_gradient_of_kept_ids_may_go_to_memory_of_the_caller():
    targets, ids = kept_sets()
    support = tether.support(targets, ids)

    def run():
        x = leaf(3, 4, V, seed=1)
        logits = x * 1
        out = tether.token_logps(logits, targets, support=support, gradient_buffer=logits)
        return results(out, x)

    got, want, calls = on_both(run)
    assert calls == ["token_logps_forward", "token_logps_backward"]
    assert_same(got, want)


@pytest.mark.parametrize("chunk_bytes", [None, V * 4 * 5])
def test_kept_ids_of_hidden_states_are_those_of_the_cpu(chunk_bytes):
    targets, ids = kept_sets()
    support = tether.support(targets, ids)

    def run():
        linear = leaf(3, 4, 6, seed=2), leaf(V, 6, seed=3), leaf(V, seed=4)
        hidden, weight, bias = linear
        settings = {"support": support, "chunk_bytes": chunk_bytes, "entropies": True}
        out = tether.linear_token_logps(hidden, weight, targets, bias, **settings)
        return results(out, *linear)

    got, want, calls = on_both(run)
    assert calls.count("token_logps_backward") == (1 if chunk_bytes is None else 3)
    assert_same(got, want)


def test_few_kept_ids_of_hidden_states_go_by_chunks_too(monkeypatch):
    targets, ids = kept_sets()
    support = tether.support(targets, ids)
    monkeypatch.setattr("tether._linear_logps.by_rows", lambda *_: True)

    def run():
        linear = leaf(3, 4, 6, seed=2), leaf(V, 6, seed=3)
        return results(tether.linear_token_logps(*linear, targets, support=support), *linear)

    got, want, calls = on_both(run)
    assert calls == ["token_logps_forward", "token_logps_backward"]
    assert_same(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_divergences_of_kept_ids_are_those_of_the_cpu(dtype):
    targets, ids = kept_sets()
    support = tether.support(targets, ids)
    absent = absent_columns(targets, ids)
    q, p = (normal(3, 4, V, seed=i).to(dtype).masked_fill(absent, torch.nan) for i in (1, 2))
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1, 1] = False
    weights = normal(3, 3, 4, seed=7).float()

    def run():
        leaves = [x.detach().clone().requires_grad_() for x in (q, p)]
        out = tether.categorical_kl(*leaves, mask=mask, temperature=0.7, support=support)
        total = sum((each * weight).sum() for each, weight in zip(out, weights, strict=True))
        return *(each.detach() for each in out), *torch.autograd.grad(total, leaves)

    got, want, calls = on_both(run)
    assert calls == ["categorical_kl_forward", "categorical_kl_backward"]
    assert_same(got, want, dtype)


def test_a_graph_has_kept_ids():
    targets, ids = kept_sets()
    support = tether.support(targets, ids)

    def run(x):
        out = tether.token_logps(x, targets, support=support)
        kl = tether.categorical_kl(x, x.detach() * 2, support=support)
        return out.logps.sum() + kl.kl.sum()

    x = leaf(3, 4, V, seed=1)
    want = run(x)
    (slope,) = torch.autograd.grad(want, x)
    torch._dynamo.reset()
    with host_operators.kernels_of("cpu") as calls:
        got = torch.compile(run, fullgraph=True, backend="aot_eager")(x)
        (gradient,) = torch.autograd.grad(got, x)
    assert len(calls) == 4
    assert_same([got.detach(), gradient], [want.detach(), slope])


# ---- shards of the vocabulary -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bounds", [(0, V), (0, 13, V), (0, 1, V - 1, V)])
@pytest.mark.parametrize("kept", [False, True])
def test_shards_are_the_whole(dtype, bounds, kept):
    targets, ids = kept_sets()
    logits = normal(3, 4, V, seed=1).to(dtype)
    logits[..., 7] = -torch.inf
    targets[0, 0], targets[1, 1], targets[1, 2] = 0, V - 1, 13
    options = {"temperature": 0.8, "scale": 1.3}
    if kept:
        options["support"] = tether.support(targets, ids)
    x = logits.detach().clone().requires_grad_()
    whole = tether.token_logps(x, targets, entropies=True, **options)
    weights = torch.linspace(0.5, 2, 12, dtype=torch.float64).view(3, 4)
    loss = (weights * whole.logps + (1.7 - weights) * whole.entropies).sum()
    (want,) = torch.autograd.grad(loss, x)
    with host_operators.kernels_of("cpu") as calls, NoWait():
        ranks = by_shards(logits, targets, bounds, **options)
    assert set(calls) == {"token_logps_forward", "token_logps_backward"}
    for each in ranks:
        assert_same(each[:2], [whole.logps.detach(), whole.entropies.detach()], dtype)
        assert torch.equal(each[0], ranks[0][0])
    assert_same([torch.cat([each[2] for each in ranks], -1)], [want], dtype)


def statistics_of_shards(run):
    """What run(rank, gather) gives of both ranks."""
    blocks = []

    def leave(ours):
        blocks.append(ours.clone())
        raise Left

    for rank in range(2):
        with pytest.raises(Left):
            run(rank, leave)
    return [run(rank, lambda _: torch.stack(blocks)) for rank in range(2)]


def test_further_statistics_of_shards_are_those_of_the_whole():
    targets, _ = kept_sets()
    logits = normal(3, 4, V, seed=1).float()
    settings = {"statistics": True, "temperature": 0.8}
    want = tether.token_logps(logits, targets, **settings)

    def run(rank, gather):
        own = logits[..., 15 * rank : 15 if rank == 0 else V]
        shard = tether.VocabularyShard(15 * rank, V, gather)
        return tether.token_logps(own, targets, shard=shard, **settings)

    with host_operators.kernels_of("cpu"), NoWait():
        ranks = statistics_of_shards(run)
    for each in ranks:
        assert_same(each, want)


@pytest.mark.parametrize("chunk_bytes", [None, V * 4 * 5])
@pytest.mark.parametrize("kept", [False, True])
def test_shards_of_a_head_are_the_whole(chunk_bytes, kept):
    targets, ids = kept_sets()
    support = tether.support(targets, ids) if kept else None
    settings = {"entropies": True, "chunk_bytes": chunk_bytes, "support": support}
    hidden, weight = normal(3, 4, 6, seed=2).float(), normal(V, 6, seed=3).float()

    def run(rank, gather, bounds=(0, 15, V)):
        own = weight[bounds[rank] : bounds[rank + 1]]
        leaves = [x.detach().clone().requires_grad_() for x in (hidden, own)]
        shard = tether.VocabularyShard(bounds[rank], V, gather) if gather else None
        out = tether.linear_token_logps(*leaves, targets, shard=shard, **settings)
        return results(out, *leaves)

    want = run(0, None, (0, V))
    with host_operators.kernels_of("cpu"), NoWait():
        ranks = statistics_of_shards(run)
    for each in ranks:
        assert_same(each[:2], want[:2])
    of_hidden, of_weight = (each[-2] for each in ranks), [each[-1] for each in ranks]
    assert_same([sum(of_hidden), torch.cat(of_weight)], want[-2:])


@pytest.mark.parametrize(
    "wrong",
    [
        {"first_id": 14},
        {"first_id": 16},
        {"ids": V + 1},
        {"temperature": 0.9},
        {"scale": 1.1},
        {"softcap": 9.0},
        {"ignore_index": -1},
        {"targets": torch.zeros(3, 4, dtype=torch.int64)},
        {},
    ],
)
def test_ranks_that_do_not_fit_together_give_nan(wrong):
    """Nobody looks at it there; the CPU refuses them."""
    targets, _ = kept_sets()
    logits = normal(3, 4, V, seed=1).float()

    def run(rank, gather):
        first, own = 15 * rank, logits[..., 15 * rank : 15 if rank == 0 else V]
        options = {"targets": targets, **(wrong if rank else {})}
        place = (options.pop("first_id", first), options.pop("ids", V), gather)
        own = own[..., : place[1] - place[0]]
        return tether.token_logps(own, shard=tether.VocabularyShard(*place), **options)

    with host_operators.kernels_of("cpu"), NoWait():
        (mine, _) = statistics_of_shards(run)
    assert bool(mine.logps[targets != -100].isnan().all()) == bool(wrong)
    assert mine.logps[0, 1] == 0


# ---- what nobody looks at -----------------------------------------------------------------------


def others(targets):
    """Targets that are no longer those of a support: another id, and one that was ignored."""
    changed = targets.clone()
    changed[1, 1] = (targets[1, 1] + 1) % V
    changed[0, 1] = 0
    return changed


def test_a_support_of_other_targets_is_nan_for_their_rows():
    targets, ids = kept_sets()
    support = tether.support(targets, ids)
    changed = others(targets)
    assert changed[1, 1] not in support.ids[1, 1]
    with host_operators.kernels_of("cpu"), NoWait():
        out = tether.token_logps(normal(3, 4, V, seed=1).float(), changed, support=support)
    assert out.logps.isnan().nonzero().tolist() == [[0, 1], [1, 1]]


def test_an_unknown_kept_id_is_nan_for_its_row():
    targets, ids = kept_sets()
    ids[1, 2, 1] = V + 3
    support = tether.support(targets, ids)
    logits = normal(3, 4, V, seed=1).float()
    hidden, weight = normal(3, 4, 6, seed=2).float(), normal(V, 6, seed=3).float()
    with host_operators.kernels_of("cpu"), NoWait():
        found = (
            tether.token_logps(logits, targets, support=support).logps,
            tether.linear_token_logps(hidden, weight, targets, support=support).logps,
            *tether.categorical_kl(logits, logits, support=support),
        )
    for each in found:
        assert each.isnan().nonzero().tolist() == [[1, 2]]


# ---- where ids are looked at --------------------------------------------------------------------


def calls_with_ids(targets, support=None):
    logits = normal(3, 4, V, seed=1).float()
    linear = normal(3, 4, 6, seed=2).float(), normal(V, 6, seed=3).float()
    ones = torch.ones(3, 4)
    kept = {} if support is None else {"support": support}
    calls = {
        "token_logps": lambda: tether.token_logps(logits, targets, **kept),
        "linear_token_logps": lambda: tether.linear_token_logps(*linear, targets, **kept),
        "linear_policy_loss": lambda: tether.linear_policy_loss(
            *linear, targets, torch.ones(3), ones, beta=0.0, **kept
        ),
    }
    if support is not None:
        calls["categorical_kl"] = lambda: tether.categorical_kl(logits, logits, **kept)
    return calls


def message(run):
    with pytest.raises((IndexError, ValueError)) as caught:
        run()
    return type(caught.value), str(caught.value)


@pytest.mark.parametrize("bad", [V, -1, 1 << 40])
def test_ids_are_looked_at_where_that_is_asked_for(bad):
    targets, _ = kept_sets()
    targets[1, 2] = bad
    for function, call in calls_with_ids(targets).items():
        sentence = (
            f"{function}: targets must be in [0, {V}) or ignore_index -100, got {bad} at [1, 2]"
        )
        assert message(call) == (IndexError, sentence)
        with host_operators.kernels_of("cpu"):
            call()
            with tether.check_ids():
                assert message(call) == (IndexError, sentence)
                with tether.check_ids(False):
                    call()
                assert message(call) == (IndexError, sentence)
            call()


def test_kept_ids_are_looked_at_too():
    targets, ids = kept_sets()
    ids[1, 2, 1] = V + 3
    support = tether.support(targets, ids)
    for function, call in calls_with_ids(targets, support).items():
        sentence = f"{function}: support must have ids below {V}, got {V + 3}"
        assert message(call) == (IndexError, sentence)
        with host_operators.kernels_of("cpu"), tether.check_ids():
            assert message(call) == (IndexError, sentence)
    good = tether.support(*kept_sets())
    run = calls_with_ids(others(targets), good)["token_logps"]
    sentence = "token_logps: support must be made of the same targets, got others"
    assert message(run) == (ValueError, sentence)
    with host_operators.kernels_of("cpu"), tether.check_ids():
        assert message(run) == (ValueError, sentence)
        for call in calls_with_ids(kept_sets()[0], good).values():
            call()


def test_it_is_a_switch_too():
    targets, _ = kept_sets()
    targets[1, 2] = V
    call = calls_with_ids(targets)["token_logps"]
    with host_operators.kernels_of("cpu"):
        tether.check_ids(True)
        try:
            assert message(call)[0] is IndexError
        finally:
            tether.check_ids(False)
        call()
    with pytest.raises(TypeError) as caught:
        tether.check_ids(1)
    assert str(caught.value) == "check_ids: enabled must be a bool, got int"


def test_a_tensor_without_numbers_is_not_looked_at():
    with tether.check_ids():
        logits = torch.empty(3, 4, V, device="meta")
        targets = torch.empty(3, 4, dtype=torch.int64, device="meta")
        assert tether.token_logps(logits, targets).logps.is_meta
