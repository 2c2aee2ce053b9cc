"""Vocabularies split over ranks, and chunks of a fixed size."""

import math

import pytest
import tether
import torch
from batches import words


class Left(Exception):
    """What a rank has to say has been taken; the others have not spoken yet."""


def by_shards(logits, targets, bounds, **options):
    """[logps, entropies, dlogits] of every rank: calls of one process, the first of which leave
    their statistics for the second."""
    statistics = [None] * (len(bounds) - 1)

    def outcome(rank, gather):
        own = logits[..., bounds[rank] : bounds[rank + 1]].detach().requires_grad_()
        shard = tether.VocabularyShard(bounds[rank], logits.shape[-1], gather)
        out = tether.token_logps(own, targets, entropies=True, shard=shard, **options)
        weights = torch.linspace(0.5, 2, targets.numel(), dtype=torch.float64).view(targets.shape)
        loss = (weights * out.logps + (1.7 - weights) * out.entropies).sum()
        return [out.logps.detach(), out.entropies.detach(), torch.autograd.grad(loss, own)[0]]

    def leave(rank):
        def gather(ours):
            statistics[rank] = ours.clone()
            raise Left

        return gather

    ranks = range(len(statistics))
    for rank in ranks:
        with pytest.raises(Left):
            outcome(rank, leave(rank))
    return [outcome(rank, lambda _: torch.stack(statistics)) for rank in ranks]


def test_shards_of_kept_ids_are_the_whole():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 3, 90, generator=generator, dtype=torch.float64).mul_(3)
    targets = torch.randint(90, (2, 3), generator=generator)
    targets[1, 1] = -100
    ids = torch.randint(90, (2, 3, 7), generator=generator)
    ids[0, 2] = -1  # the whole vocabulary
    ids[1, 0] = targets[1, 0]  # one id: the other shards have none
    options = {"support": tether.support(targets, ids), "temperature": 0.8}
    leaf = logits.clone().requires_grad_()
    plain = tether.token_logps(leaf, targets, entropies=True, **options)
    weights = torch.linspace(0.5, 2, 6, dtype=torch.float64).view(2, 3)
    loss = (weights * plain.logps + (1.7 - weights) * plain.entropies).sum()
    (want,) = torch.autograd.grad(loss, leaf)
    ranks = by_shards(logits, targets, (0, 30, 31, 90), **options)
    for each in ranks:
        torch.testing.assert_close(each[0], plain.logps, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(each[1], plain.entropies, rtol=1e-13, atol=1e-13)
    got = torch.cat([each[2] for each in ranks], -1)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


def test_ranks_of_other_kept_ids_are_refused():
    logits, targets, blocks = torch.randn(2, 8), torch.tensor([1, 6]), []
    for rank, other in enumerate((2, 3)):
        support = tether.support(targets, torch.tensor([[other], [4]]))

        def gather(ours):
            blocks.append(ours.clone())
            if len(blocks) == 1:
                raise Left
            return torch.stack(blocks)

        shard = tether.VocabularyShard(4 * rank, 8, gather)
        with pytest.raises(ValueError if rank else Left) as caught:
            tether.token_logps(logits[:, :4], targets, shard=shard, support=support)
    assert str(caught.value) == (
        "token_logps: shards must all have the same targets, ignore_index and support, got those "
        "of rank 0 and others of rank 1"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bounds", [(0, 900), (0, 300, 900), (0, 1, 899, 900)])
def test_shards_are_the_whole(dtype, bounds):
    generator = torch.Generator().manual_seed(2)
    logits = (3 * torch.randn(2, 3, 900, generator=generator, dtype=torch.float64)).to(dtype)
    logits[..., 7] = -math.inf
    targets = torch.randint(900, (2, 3), generator=generator)
    targets[0, 0], targets[0, 1], targets[1, 1] = 0, 899, -100
    options = {"temperature": 0.8, "softcap": 9.0}
    (whole,) = by_shards(logits, targets, (0, 900), **options)
    plain = tether.token_logps(logits, targets, entropies=True, **options)
    torch.testing.assert_close(whole[0], plain.logps, rtol=0, atol=0)
    ranks = by_shards(logits, targets, bounds, **options)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for each in ranks:
        torch.testing.assert_close(each[0], whole[0], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(each[1], whole[1], rtol=tolerance, atol=tolerance)
        assert torch.equal(each[0], ranks[0][0])
    rounding = tolerance + (2**-7 if dtype == torch.bfloat16 else 0)
    got = torch.cat([each[2] for each in ranks], -1)
    torch.testing.assert_close(got, whole[2], rtol=rounding, atol=rounding)
    assert got[..., 7].abs().max() == 0


def test_opcheck_and_compile():
    logits, targets = torch.randn(4, 32), torch.tensor([0, 31, -100, 5])
    asked = {"entropies": True}
    ops = torch.ops.tether
    row = (logits, targets, None)
    torch.library.opcheck(ops.shard_statistics, (*row, *words({"ids": 64}, **asked)))
    shards = ops.shard_statistics(*row, *words({"ids": 32}, **asked))[None]
    torch.library.opcheck(
        ops.token_logps_of_shards, (shards, targets, logits, *words({"ids": 32}, **asked))
    )

    def step(x):
        shard = tether.VocabularyShard(0, 32, lambda ours: ours[None])
        return tether.token_logps(x, targets, shard=shard).logps.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits), step(logits))


def test_shard_is_checked():
    logits, targets = torch.zeros(4, 32), torch.zeros(4, dtype=torch.int64)

    def refusal(first_id=0, ids=96, gather=lambda ours: ours[None], target=0):
        shard = tether.VocabularyShard(first_id, ids, gather)
        with pytest.raises((ValueError, TypeError, IndexError)) as raised:
            tether.token_logps(logits, targets + target, shard=shard)
        return f"{raised.type.__name__}: {raised.value}"

    name = "token_logps: shard"
    assert refusal(65) == f"ValueError: {name}.first_id must be in [0, 64], got 65"
    assert refusal(-1) == f"ValueError: {name}.first_id must be in [0, 64], got -1"
    assert refusal(ids=31) == (
        f"ValueError: {name}.ids must be at least 32 like logits [4, 32], got 31"
    )
    assert refusal(target=96) == (
        "IndexError: token_logps: targets must be in [0, 96) or ignore_index -100, got 96 at [0]"
    )
    assert refusal(gather=None) == f"TypeError: {name}.gather must be callable, got NoneType"
    assert refusal(first_id=0.5) == f"TypeError: {name}.first_id must be an int, got float"
    with pytest.raises(TypeError, match="shard must be a VocabularyShard, got tuple"):
        tether.token_logps(logits, targets, shard=(0, 96, None))

    def broken(_):
        raise ValueError("network: targets must be in reach")

    assert refusal(gather=broken) == "ValueError: network: targets must be in reach"
    assert refusal(gather=lambda _: None) == (
        f"TypeError: {name}.gather must return a tensor, got NoneType"
    )
    assert refusal(gather=lambda ours: ours) == (
        f"ValueError: {name}.gather must return float64 [shards, 5, 8] on cpu, got float64 [5, 8] "
        "on cpu"
    )


def gathered(ranks, ids=96):
    """token_logps of the last rank; a rank is its first id, its columns and other options."""
    blocks = []

    def leave(ours):
        blocks.append(ours.clone())
        raise Left

    def call(gather, first_id, columns, ids=ids, targets=(0, 0, 0, 0), **options):
        shard = tether.VocabularyShard(first_id, ids, gather)
        targets = torch.tensor(targets)
        return tether.token_logps(torch.zeros(4, columns), targets, shard=shard, **options)

    for first_id, columns, options in ranks:
        with pytest.raises(Left):
            call(leave, first_id, columns, **options)
    first_id, columns, options = ranks[-1]
    return call(lambda _: torch.stack(blocks), first_id, columns, **options)


@pytest.mark.parametrize(
    "ranks, message",
    [
        (
            [(0, 48, {}), (0, 48, {})],
            "must not overlap, got [0, 48) of rank 0 and [0, 48) of rank 1",
        ),
        (
            [(64, 32, {}), (0, 48, {}), (47, 17, {})],
            "must not overlap, got [0, 48) of rank 1 and [47, 64) of rank 2",
        ),
        (
            [(0, 32, {}), (64, 32, {})],
            "must hold every id of [0, 96), got none between [0, 32) of rank 0 and [64, 96) of "
            "rank 1",
        ),
        (
            [(32, 32, {}), (64, 32, {})],
            "must hold every id of [0, 96), got none before [32, 64) of rank 0",
        ),
        (
            [(32, 32, {}), (0, 32, {})],
            "must hold every id of [0, 96), got none after [32, 64) of rank 0",
        ),
        (
            [(0, 48, {}), (48, 48, {"ids": 100})],
            "must all have the same ids, got 96 of rank 0 and 100 of rank 1",
        ),
        (
            [(0, 48, {"entropies": True}), (48, 48, {})],
            "must all have the same results, got entropies of rank 0 and logps of rank 1",
        ),
        (
            [(0, 48, {"entropies": True}), (48, 48, {"statistics": True})],
            "must all have the same results, got entropies of rank 0 and statistics of rank 1",
        ),
        (
            [(0, 48, {"temperature": 0.5}), (48, 48, {})],
            "must all have the same temperature, got 0.5 of rank 0 and 1 of rank 1",
        ),
        (
            [(0, 48, {}), (48, 48, {"scale": 2.0})],
            "must all have the same scale, got 1 of rank 0 and 2 of rank 1",
        ),
        (
            [(0, 48, {"softcap": 30.0}), (48, 48, {})],
            "must all have the same softcap, got 30 of rank 0 and 0 of rank 1",
        ),
        (
            [(0, 48, {}), (48, 48, {"ignore_index": -1})],
            "must all have the same targets, ignore_index and support, got those of rank 0 and "
            "others of rank 1",
        ),
        (
            [(0, 48, {}), (48, 48, {"targets": (0, 0, 0, 1)})],
            "must all have the same targets, ignore_index and support, got those of rank 0 and "
            "others of rank 1",
        ),
        (
            [
                (0, 32, {"targets": (1, 2, 3, 4)}),
                (32, 32, {"targets": (1, 2, 3, 4)}),
                (64, 32, {"targets": (2, 1, 3, 4)}),
            ],
            "must all have the same targets, ignore_index and support, got those of rank 0 and "
            "others of rank 2",
        ),
    ],
)
def test_shards_that_do_not_fit_are_refused(ranks, message):
    with pytest.raises(ValueError) as caught:
        gathered(ranks)
    assert str(caught.value) == f"token_logps: shards {message}"


def test_shards_may_come_in_any_order():
    out = gathered([(64, 32, {}), (0, 16, {}), (16, 48, {})])
    torch.testing.assert_close(out.logps, torch.full((4,), -math.log(96)))


# ---- from hidden states: a part of the head ------------------------------------------------------


def on_ranks(step, bounds):
    """[what step(rank, shard) returns] of every rank, as `by_shards` does."""
    blocks, ranks = [], range(len(bounds) - 1)

    def leave(ours):
        blocks.append(ours.clone())
        raise Left

    def shard(rank, gather):
        return tether.VocabularyShard(bounds[rank], bounds[-1], gather)

    for rank in ranks:
        with pytest.raises(Left):
            step(rank, shard(rank, leave))
    return [step(rank, shard(rank, lambda _: torch.stack(blocks))) for rank in ranks]


def head(dtype=torch.float64):
    torch.manual_seed(5)
    hidden = torch.randn(2, 7, 6, dtype=torch.float64).to(dtype)
    weight, bias = torch.randn(40, 6).to(dtype), torch.randn(40).to(dtype)
    targets = torch.randint(40, (2, 7))
    targets[0, 0], targets[0, 1], targets[1, 1] = 0, 39, -100
    return (hidden, weight, bias), targets


def linear_outcome(function, linear, targets, rows=slice(None), **options):
    """[values..., dhidden, dweight, dbias] of the rows of the head; upstream gradients differ."""
    given = (linear[0], *(each[rows] for each in linear[1:]))
    leaves = [each.detach().requires_grad_() for each in given]
    values = function(*leaves, targets, **options)
    upstream = torch.linspace(0.5, 2, targets.numel(), dtype=torch.float64).view(targets.shape)
    loss = sum((upstream**i * each).sum() for i, each in enumerate(values))
    return [*(each.detach() for each in values), *torch.autograd.grad(loss, leaves)]


def linear_logps(hidden, weight, bias, targets, **options):
    out = tether.linear_token_logps(
        hidden, weight, targets, bias, entropies=True, statistics=True, **options
    )
    return out.logps, out.entropies, out.mean_logits, out.target_is_largest


def linear_kept(hidden, weight, bias, targets, **options):
    """Over five ids a token; one token has all, the target of another is the only one."""
    ids = (targets[..., None] + 7 * torch.arange(5)) % 40
    ids[0, 2], ids[0, 3] = -1, targets[0, 3]
    support = tether.support(targets, ids)
    return linear_logps(hidden, weight, bias, targets, support=support, **options)


def linear_loss(hidden, weight, bias, targets, objective="dapo", **options):
    advantages = torch.tensor([1.0, -0.5], dtype=torch.float64)
    batch = {"old_logps": torch.linspace(-5, -1, targets.numel()).view(targets.shape)}
    batch = {name: each.to(hidden.dtype) for name, each in batch.items()}
    row = (hidden, weight, targets, advantages.to(hidden.dtype), targets >= 0, bias)
    settings = {"objective": objective, "entropy_coef": 0.1, "beta": 0.0}
    return (tether.linear_policy_loss(*row, **batch, **settings, **options).loss,)


def linear_pairs(hidden, weight, bias, targets, **options):
    ref = torch.linspace(-4, -2, targets.numel(), dtype=hidden.dtype).view(targets.shape)
    row = (hidden, weight, targets, ref, targets >= 0, bias)
    return (tether.linear_preference_loss(*row, **options).loss,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bounds", [(0, 40), (0, 13, 40), (0, 1, 39, 40)])
@pytest.mark.parametrize("function", [linear_logps, linear_kept, linear_loss, linear_pairs])
@pytest.mark.parametrize("chunks", [{}, {"chunk_bytes": 3 * 13 * 8}, {"rows_per_chunk": 4}])
def test_parts_of_a_head_are_the_whole(function, bounds, dtype, chunks):
    linear, targets = head(dtype)
    options = {"temperature": 0.8, "softcap": 9.0}
    whole = linear_outcome(function, linear, targets, **options)

    def step(rank, shard):
        rows = slice(bounds[rank], bounds[rank + 1])
        return linear_outcome(function, linear, targets, rows, shard=shard, **options, **chunks)

    ranks = on_ranks(step, bounds)
    # In bfloat16 gradients are rounded before they are added.
    error = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-6}[dtype]
    near = {"rtol": error, "atol": error}
    for each in ranks:
        for got, want, first in zip(each[:-3], whole, ranks[0], strict=False):
            torch.testing.assert_close(got, want, **near)
            assert torch.equal(got, first)
    torch.testing.assert_close(sum(each[-3] for each in ranks), whole[-3], **near)
    for i in (-2, -1):
        torch.testing.assert_close(torch.cat([each[i] for each in ranks]), whole[i], **near)


def alone(reduce=None, gather=lambda ours: ours[None], first_id=0, ids=40):
    """A shard that has the whole vocabulary."""
    return tether.VocabularyShard(first_id, ids, gather, reduce)


def test_the_gradient_of_hidden_is_reduced():
    linear, targets = head()
    plain = linear_outcome(linear_logps, linear, targets, shard=alone())
    twice = linear_outcome(linear_logps, linear, targets, shard=alone(lambda each: 2 * each))
    assert torch.equal(twice[-3], 2 * plain[-3]) and torch.equal(twice[-2], plain[-2])
    hidden = linear[0].clone().requires_grad_()
    out = tether.linear_token_logps(hidden, *linear[1:2], targets, shard=alone())
    (gradient,) = torch.autograd.grad(out.logps.square().sum(), hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"^linear_token_logps: the gradient must not be"):
        gradient.sum().backward()


def test_a_part_of_a_head_breaks_the_graph():
    linear, targets = head()

    def step(hidden):
        return tether.linear_token_logps(hidden, linear[1], targets, shard=alone()).logps.sum()

    torch._dynamo.reset()
    loss = torch.compile(step, backend="aot_eager")(linear[0])
    torch.testing.assert_close(loss, step(linear[0]), rtol=1e-14, atol=0)
    torch._dynamo.reset()
    sentence = "linear_token_logps: shard must be None under fullgraph=True, got one"
    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match=sentence):
        torch.compile(step, backend="aot_eager", fullgraph=True)(linear[0])


def test_a_part_of_a_head_is_checked(monkeypatch):
    (hidden, weight, _), targets = head()
    hidden.requires_grad_()

    def refusal(shard, at=None, function="linear_token_logps", **options):
        ids = targets if at is None else targets.masked_fill(targets == 39, at)
        with pytest.raises((ValueError, TypeError, IndexError)) as raised:
            if function == "linear_token_logps":
                out = tether.linear_token_logps(hidden, weight, ids, shard=shard, **options)
                out.logps.sum().backward()
            else:
                mask, advantages = targets >= 0, torch.zeros(2, dtype=torch.float64)
                batch = (hidden, weight, ids, advantages, mask)
                tether.linear_policy_loss(*batch, shard=shard, objective="ppo")
        return f"{raised.type.__name__}: {raised.value}"

    name = "linear_token_logps: shard"
    assert refusal(alone(first_id=1)) == f"ValueError: {name}.first_id must be in [0, 0], got 1"
    assert refusal(alone(ids=39)) == (
        f"ValueError: {name}.ids must be at least 40 like weight [40, 6], got 39"
    )
    assert refusal(alone(), at=40) == (
        "IndexError: linear_token_logps: targets must be in [0, 40) or ignore_index -100, got 40 "
        "at [0, 1]"
    )
    assert refusal(alone(reduce=3)) == f"TypeError: {name}.reduce must be callable, got int"
    assert refusal(alone(gather=lambda _: None)) == (
        f"TypeError: {name}.gather must return a tensor, got NoneType"
    )
    assert refusal(alone(ids=96), function="linear_policy_loss") == (
        "ValueError: linear_policy_loss: shards must hold every id of [0, 96), got none after "
        "[0, 40) of rank 0"
    )
    assert refusal(alone(lambda _: None)) == (
        f"ValueError: {name}.reduce must return the sum, float64 [2, 7, 6], got NoneType"
    )
    assert refusal(alone(lambda each: each[0])) == (
        f"ValueError: {name}.reduce must return the sum, float64 [2, 7, 6], got float64 [7, 6]"
    )
    monkeypatch.setattr(tether._ops, "KERNELS", frozenset())
    assert refusal(alone()) == f"ValueError: {name} must be None for tensors on a device"


# ---- chunks of a fixed size ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fixed_chunks_give_a_token_the_same_bits_in_any_batch(dtype):
    torch.manual_seed(3)
    hidden = torch.randn(390, 1024).to(dtype)
    weight, bias = (0.05 * torch.randn(640, 1024)).to(dtype), torch.randn(640).to(dtype)
    targets = torch.randint(640, (390,))
    options = {"bias": bias, "entropies": True, "rows_per_chunk": 64}
    whole = tether.linear_token_logps(hidden, weight, targets, **options)
    for begin, end in ((0, 1), (0, 65), (7, 31), (100, 390)):
        part = tether.linear_token_logps(hidden[begin:end], weight, targets[begin:end], **options)
        assert torch.equal(part.logps, whole.logps[begin:end])
        assert torch.equal(part.entropies, whole.entropies[begin:end])


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_fixed_chunks_are_the_same_loss(rows):
    torch.manual_seed(4)
    leaves = [torch.randn(s, dtype=torch.float64).requires_grad_() for s in ((3, 5, 6), (40, 6))]
    targets = torch.randint(40, (3, 5))
    mask = torch.rand(3, 5) > 0.3
    advantages = torch.randn(3, dtype=torch.float64)
    outcomes = []
    for rows_per_chunk in (0, rows):
        arguments = (*leaves, targets, advantages, mask)
        out = tether.linear_policy_loss(*arguments, objective="dapo", rows_per_chunk=rows_per_chunk)
        logps = tether.linear_token_logps(*leaves, targets, rows_per_chunk=rows_per_chunk).logps
        total = out.loss + logps.square().sum()
        outcomes.append((total.detach(), *torch.autograd.grad(total, leaves)))
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [-1, 10**12])
def test_rows_of_a_chunk_are_those_of_a_product(rows):
    arguments = torch.zeros(3, 5, 6), torch.zeros(40, 6), torch.zeros(3, 5, dtype=torch.int64)
    with pytest.raises(ValueError) as raised:
        tether.linear_token_logps(*arguments, rows_per_chunk=rows)
    sentence = f"rows_per_chunk must be in [0, 2147483647], got {rows}"
    assert str(raised.value) == f"linear_token_logps: {sentence}"
    out = tether.linear_token_logps(*arguments, chunk_bytes=2**63 - 1)
    assert torch.equal(out.logps, tether.linear_token_logps(*arguments).logps)
