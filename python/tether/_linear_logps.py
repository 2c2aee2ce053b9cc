"""Log-probabilities of hidden states and a head: by chunks of logits, kept rows or torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tether import _cuda, _ops
from tether._checks import check_no_tangents, in_name_of, savable
from tether._ids import check_asked_ids
from tether._linear_inputs import Linear
from tether._linear_ops import Chunk, LinearTokenLogps, chunk_of
from tether._linear_tracing import traced_logps
from tether._lists import Settings
from tether._logits_ops import again, token_statistics
from tether._ops import has_eager_kernel, once_differentiable
from tether._support import (
    Support,
    by_rows,
    check_support,
    checked_support,
    ids_for_kernel,
    linear_logits,
    with_known_ids,
)
from tether.logits import (
    TokenLogps,
    VocabularyShard,
    check_shard,
    of_support,
    token_logps,
    with_index_error,
)


class Walk(NamedTuple):
    """How the logits are made."""

    chunk: Chunk
    chunk_bytes: int
    shard: VocabularyShard | None


def walk_of(
    function: str,
    linear: Linear,
    chunk_bytes: int | None,
    rows_per_chunk: int,
    shard: VocabularyShard | None,
) -> Walk:
    if chunk_bytes is None:
        chunk_bytes = 1 << 30 if _ops.on_cuda(linear.weight) else 256 << 20
    if shard is not None:
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break(
                msg=f"{function}: shard must be None under fullgraph=True, got one"
            )
        weight = linear.weight
        check_shard(f"{function}: shard", shard, "weight", weight, weight.shape[0])
        if not _has_kernel(linear):
            raise ValueError(f"{function}: shard must be None for tensors on a device")
    return Walk(chunk_of(linear.weight, chunk_bytes, rows_per_chunk), chunk_bytes, shard)


def logps_of(
    function: str,
    linear: Linear,
    targets: Tensor,
    settings: Settings,
    walk: Walk,
    support: Support | None,
) -> TokenLogps:
    """linear_token_logps of checked tensors, in the name of `function`."""
    if support is not None:
        check_support(function, support, targets)
    # Which tokens have a set would be waited for on CUDA.
    on_cuda = _cuda.has_kernel("token_logps_forward", linear)
    whole = support is None or walk.chunk.padded or walk.shard is not None or on_cuda
    if whole or not by_rows(support, linear.weight):
        return _logps_of_chunks(function, linear, targets, settings, walk, support)
    check_no_tangents(function, **linear._asdict())
    ignore_index = settings.numbers["ignore_index"]
    kept = checked_support(function, support, targets, linear.weight.shape[0], ignore_index)
    others = targets.masked_fill(~kept.whole, ignore_index)
    return of_support(
        kept,
        linear_logits(function, *linear, kept, walk.chunk_bytes),
        settings.numbers | _flags(settings),
        lambda: _logps_of_chunks(function, linear, others, settings, walk),
    )


def _logps_of_chunks(
    function: str,
    linear: Linear,
    targets: Tensor,
    settings: Settings,
    walk: Walk,
    support: Support | None = None,
) -> TokenLogps:
    """The same by all logits of a chunk."""
    shard, vocabulary = walk.shard, linear.weight.shape[0]
    ignore_index = settings.numbers["ignore_index"]
    entropies, statistics = _flags(settings).values()
    check_no_tangents(function, **linear._asdict())
    if not _has_kernel(linear):
        return _logps_by_torch(function, linear, targets, settings, walk, support)
    if shard is not None:
        vocabulary = shard.ids
        own = {"first_id": shard.first_id, "ids": vocabulary}
        settings = settings._replace(numbers=settings.numbers | own)
    words, active = settings.words(), targets != ignore_index
    check_asked_ids(f"{function}: targets", targets, vocabulary, ignore_index)
    ids = ids_for_kernel(function, support, targets, vocabulary, ignore_index)
    row = (targets, ids, words, entropies, active, walk.chunk)

    def run():
        return with_known_ids(
            function,
            lambda: LinearTokenLogps.apply(*linear, *row, shard, function),
            ids,
            ~active,
            vocabulary,
        )

    if torch.compiler.is_compiling() and shard is None:
        out = traced_logps(linear, *row, function, ignore_index)
    else:
        out = with_index_error(function, run, targets, vocabulary, ignore_index)
    logps, found, sums = out
    further = token_statistics(sums, linear.hidden, settings) if statistics else ()
    return TokenLogps(logps, found, *further)


def _has_kernel(linear: Linear) -> bool:
    return has_eager_kernel(*linear) or _cuda.has_kernel("token_logps_forward", linear)


def _flags(settings: Settings) -> dict[str, bool]:
    return {name: settings.choices[name] == "true" for name in ("entropies", "statistics")}


def _logps_by_torch(
    function: str,
    linear: Linear,
    targets: Tensor,
    settings: Settings,
    walk: Walk,
    support: Support | None,
) -> TokenLogps:
    leaves = (once_differentiable(function, each, again(function)) for each in linear)
    hidden, weight, bias = leaves
    head, options = (savable(weight), savable(bias)), settings.numbers | _flags(settings)

    def of_rows(hidden: Tensor, targets: Tensor, support: Support | None) -> TokenLogps:
        # 0 times NaN would reach the gradient of the weight.
        known = hidden.masked_fill((targets == options["ignore_index"])[..., None], 0)
        logits = torch.nn.functional.linear(known, *head)
        return token_logps(logits, targets, support=support, **options)

    def run() -> TokenLogps:
        return _by_pieces(of_rows, hidden, targets, support, walk.chunk)

    return in_name_of(function, "token_logps", run)


def _by_pieces(
    of_rows: Callable[..., TokenLogps],
    hidden: Tensor,
    targets: Tensor,
    support: Support | None,
    chunk: Chunk,
) -> TokenLogps:
    """of_rows of some tokens at a time, which backward computes once more. In a graph and under
    torch.func, which cannot do that, of all."""
    pieces = chunk.pieces(targets.numel())
    whole = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if whole or len(pieces) <= 1:
        return of_rows(hidden, targets, support)
    rows, y = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    sets = None if support is None else Support(*(_rows_of(each, targets) for each in support))
    parts = []
    for begin, end in pieces:
        some = slice(begin, end)
        kept = None if sets is None else Support(*(each[some] for each in sets))
        part = checkpoint(
            of_rows, rows[some], y[some], kept, use_reentrant=False, preserve_rng_state=False
        )
        parts.append(part)

    def joined(column: tuple[Tensor | None, ...]) -> Tensor | None:
        return None if column[0] is None else torch.cat(column).view_as(targets)

    return TokenLogps(*map(joined, zip(*parts, strict=True)))


def _rows_of(column: Tensor, targets: Tensor) -> Tensor:
    """One row a target."""
    return column.reshape(targets.numel(), *column.shape[targets.dim() :])
