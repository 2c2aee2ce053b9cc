"""Log-probabilities of hidden states and a head: by chunks of logits, kept rows or torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

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
        if not _has_kernel(linear):
            raise ValueError(f"{function}: shard must be None for tensors on a device")
        weight = linear.weight
        check_shard(f"{function}: shard", shard, "weight", weight, weight.shape[0])
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
        return _logps_by_torch(function, linear, targets, settings, support)
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
    function: str, linear: Linear, targets: Tensor, settings: Settings, support: Support | None
) -> TokenLogps:
    leaves = (once_differentiable(function, each, again(function)) for each in linear)
    hidden, weight, bias = leaves
    # 0 times NaN would reach the gradient of the weight.
    known = hidden.masked_fill((targets == settings.numbers["ignore_index"])[..., None], 0)
    logits = torch.nn.functional.linear(known, savable(weight), savable(bias))
    options = settings.numbers | _flags(settings)
    return in_name_of(
        function, "token_logps", lambda: token_logps(logits, targets, support=support, **options)
    )
