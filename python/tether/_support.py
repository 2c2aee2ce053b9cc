"""Log-probabilities over the ids that a sampler kept at each token: top-k, top-p, min-p."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tether import _ops
from tether._checks import (
    check_device,
    check_integers,
    kind_of,
    savable,
    shape_text,
)
from tether._ids import check_id_type, looks_at_ids
from tether._ops import once_differentiable
from tether._values import check_offset_values

_ABSENT = -1  # in ids
NOWHERE = -100  # in positions


class Support(NamedTuple):
    """The kept set of every token, as `support` makes it."""

    ids: Tensor  # [..., K] int64, in descending order, padded with -1
    position: Tensor  # like targets: where the target is among them; -100: nothing to find there
    whole: Tensor  # like targets, bool: no set was given, the whole vocabulary counts
    added: Tensor  # like targets, bool: the set lacked the target

    def gather(self, logits: Tensor) -> Tensor:
        """[..., K]: the logits of the kept ids, -inf behind them. Differentiable."""
        found = logits.gather(-1, self.ids.clamp_min(0))
        return found.masked_fill(self.ids < 0, -torch.inf)

    def may_be_whole(self) -> bool:
        """Whether any token needs all logits; in a graph nothing can be asked."""
        return torch.compiler.is_compiling() or bool(self.whole.any())


def support(
    targets: Tensor,
    token_ids: Tensor,
    offsets: Tensor | None = None,
    *,
    ignore_index: int = -100,
) -> Support:
    """The sets of ids that a sampler kept, for `support=` of token_logps and linear_token_logps.

    An engine that samples with top-k, top-p or min-p draws from the softmax over the ids that it
    kept. The log-probability over the whole vocabulary is another number: its ratio to the
    engine's is off by the mass that was cut away.

    targets       [...]: int32 or int64, the sampled ids, or ignore_index
    token_ids     [..., K], padded with -1; or, with offsets, [M]: the ids of one token after the
                  other, as vLLM returns them (token_ids, offsets). In any order; an id that is
                  there twice counts once
    offsets       [N + 1], from 0 to M: token i of the N targets, in their order, has the ids
                  offsets[i] .. offsets[i + 1]

    A target that its set lacks, by rounding at the engine's edge, is added to it: `added` says
    where. A token without any id has the whole vocabulary: `whole`. All sets are padded to the
    longest of the batch: bound them at the sampler (top_k), or leave a token of a huge one whole.
    On any device; the ids are looked at, which waits for it. ValueError or TypeError.
    """
    function = "support"
    check_integers(function, ignore_index=ignore_index)
    check_id_type(f"{function}: targets", targets)
    check_id_type(f"{function}: token_ids", token_ids)
    check_device(f"{function}: token_ids", token_ids, "targets", targets)
    y = targets.to(torch.int64)
    if offsets is None:
        if token_ids.dim() != targets.dim() + 1 or token_ids.shape[:-1] != targets.shape:
            raise ValueError(
                f"{function}: token_ids must be [..., K] like targets {shape_text(targets)} "
                f"without offsets, got {shape_text(token_ids)}"
            )
        _check_on_a_device(function, targets)
        ids = token_ids.to(torch.int64)
    else:
        ids = _padded(function, targets, token_ids, offsets)
    if bool((ids < _ABSENT).any()):
        raise ValueError(
            f"{function}: token_ids must be at least 0, or -1 for none, got {int(ids.min())}"
        )
    active = y != ignore_index
    if bool(((y < 0) & active).any()):
        raise ValueError(
            f"{function}: targets must be at least 0 or ignore_index {ignore_index}, got "
            f"{int(y[active].min())}"
        )
    ids = ids.masked_fill(~active[..., None], _ABSENT)
    empty = (ids == _ABSENT).all(-1)
    missing = ~empty & ~(ids == y[..., None]).any(-1)
    own = y.masked_fill(~missing, _ABSENT)[..., None]
    ids = torch.cat([ids, own], -1).sort(-1, descending=True).values
    again = (ids[..., 1:] == ids[..., :-1]) & (ids[..., 1:] >= 0)
    if bool(again.any()):
        ids[..., 1:].masked_fill_(again, _ABSENT)
        ids = ids.sort(-1, descending=True).values
    longest = max(int((ids >= 0).sum(-1).max()) if ids.numel() else 0, 1)
    ids = ids[..., :longest].contiguous()
    position = (ids == y[..., None]).to(torch.int8).argmax(-1).masked_fill(empty, NOWHERE)
    return Support(ids, position, empty & active, missing)


def _check_on_a_device(function: str, targets: Tensor) -> None:
    if targets.device.type == "meta":
        raise ValueError(f"{function}: targets must hold numbers, got a tensor on meta")


def _padded(function: str, targets: Tensor, token_ids: Tensor, offsets: Tensor) -> Tensor:
    """[..., K] of ids that lie one token after the other."""
    check_id_type(f"{function}: offsets", offsets)
    check_device(f"{function}: offsets", offsets, "targets", targets)
    count = targets.numel()
    if token_ids.dim() != 1:
        raise ValueError(
            f"{function}: token_ids must be [M] with offsets, got {shape_text(token_ids)}"
        )
    if offsets.shape != (count + 1,):
        raise ValueError(
            f"{function}: offsets must be [{count + 1}] for targets {shape_text(targets)}, got "
            f"{shape_text(offsets)}"
        )
    _check_on_a_device(function, targets)
    check_offset_values(function, offsets, "token_ids", token_ids.shape[0])
    begin = offsets.to(torch.int64)
    sizes = begin.diff()
    longest = int(sizes.max()) if count else 0
    row = torch.repeat_interleave(torch.arange(count, device=targets.device), sizes)
    column = torch.arange(token_ids.shape[0], device=targets.device) - begin[row]
    ids = torch.full((count, longest), _ABSENT, dtype=torch.int64, device=targets.device)
    ids[row, column] = token_ids.to(torch.int64)
    return ids.view(*targets.shape, longest)


def check_support(function: str, kept: Support, of: Tensor, name: str = "targets") -> None:
    """That it is one, of the positions of targets or of logits."""
    where = f"{function}: support"
    if not isinstance(kept, Support):
        raise TypeError(f"{where} must be a tether.Support, got {kind_of(kept)}")
    if not _is_made(kept):
        raise ValueError(f"{where} must be as tether.support makes it, got another")
    if kept.position.shape != (of.shape if name == "targets" else of.shape[:-1]):
        raise ValueError(
            f"{where} must be of {name} {shape_text(of)}, got {shape_text(kept.position)}"
        )
    check_device(where, kept.ids, name, of)


def support_of_logits(
    function: str, kept: Support, name: str, logits: Tensor, mask: Tensor | None
) -> tuple[Support, Tensor]:
    """That of the positions of logits that are not masked, and which they are; ids are not looked
    at."""
    check_support(function, kept, logits, name)
    known = (kept.position >= 0) | kept.whole
    mask = known if mask is None else known & mask
    return kept._replace(ids=kept.ids.masked_fill(~mask[..., None], _ABSENT)), mask


def with_ids_below(function: str, kept: Support, vocabulary: int) -> Support:
    """An IndexError for another one, in a traced graph NaN, of sets without any id."""
    beyond = kept.ids >= vocabulary
    if torch.compiler.is_compiling():
        return kept._replace(ids=kept.ids.masked_fill(beyond.any(), _ABSENT))
    if bool(beyond.any()):
        raise IndexError(
            f"{function}: support must have ids below {vocabulary}, got {int(kept.ids.max())}"
        )
    return kept


def _is_of_targets(kept: Support, targets: Tensor, ignored: Tensor) -> Tensor:
    """Whether it is made of those that are not ignored."""
    found = kept.ids.gather(-1, kept.position.clamp_min(0)[..., None])[..., 0]
    return (ignored | torch.where(kept.position == NOWHERE, kept.whole, found == targets)).all()


def _other_targets(function: str) -> ValueError:
    return ValueError(f"{function}: support must be made of the same targets, got others")


def _unknown_id(function: str, ids: Tensor, ignored: Tensor, vocabulary: int) -> IndexError:
    largest = int(ids.masked_fill(ignored[..., None], _ABSENT).max())
    return IndexError(f"{function}: support must have ids below {vocabulary}, got {largest}")


def checked_support(
    function: str, kept: Support, targets: Tensor, vocabulary: int, ignore_index: int
) -> Support:
    """That of the targets that are not ignored, made of the same ones and with known ids."""
    check_support(function, kept, targets)
    ignored = targets == ignore_index
    known = _is_of_targets(kept, targets, ignored)
    ids = kept.ids.masked_fill(ignored[..., None], _ABSENT)
    out = kept._replace(
        position=kept.position.masked_fill(ignored, NOWHERE), whole=kept.whole & ~ignored
    )
    if torch.compiler.is_compiling():  # nothing can be asked: NaN, of sets without any id
        broken = ~known | (ids >= vocabulary).any()
        return out._replace(ids=ids.masked_fill(broken, _ABSENT))
    if ids.numel() and int(ids.max()) >= vocabulary:
        raise _unknown_id(function, kept.ids, ignored, vocabulary)
    if not bool(known):
        raise _other_targets(function)
    return out._replace(ids=ids)


def ids_for_kernel(
    function: str, kept: Support | None, targets: Tensor, vocabulary: int, ignore_index: int
) -> Tensor | None:
    """Those of a support as operators take them, which look at them once more; on CUDA an unknown
    one, or another target's, gives NaN."""
    if kept is None:
        return None
    check_support(function, kept, targets)
    ignored = targets == ignore_index
    unseen = _ops.on_cuda(targets) and not looks_at_ids()
    # Of a target that was ignored: another's id, to be refused.
    if torch.compiler.is_compiling() or unseen:
        unmade = ~ignored & ~kept.whole & (kept.position == NOWHERE)
        other = (targets == 0).long()[..., None]
        return torch.where(unmade[..., None], other, kept.ids).contiguous()
    made = bool(_is_of_targets(kept, targets, ignored))
    seen = made and not looks_at_ids()  # by the operator
    if not seen and bool(((kept.ids >= vocabulary) & ~ignored[..., None]).any()):
        raise _unknown_id(function, kept.ids, ignored, vocabulary)
    if not made:
        raise _other_targets(function)
    return kept.ids.contiguous()


def with_known_ids(
    function: str, run: Callable, ids: Tensor | None, ignored: Tensor | None, vocabulary: int
):
    """run(); what an operator says of an unknown id becomes an IndexError. `ignored`: whose ids are
    not meant; needed beside ids."""
    try:
        return run()
    except ValueError as error:
        if ids is None or ": ids of support must be in [" not in str(error):
            raise
        raise _unknown_id(function, ids, ignored, vocabulary) from None


def _is_made(kept: Support) -> bool:
    """Whether its tensors fit together."""
    tensors = all(isinstance(each, Tensor) for each in kept)
    return (
        tensors
        and (kept.ids.dtype, kept.position.dtype) == (torch.int64, torch.int64)
        and (kept.whole.dtype, kept.added.dtype) == (torch.bool, torch.bool)
        and kept.ids.dim() == kept.position.dim() + 1
        and kept.ids.shape[:-1] == kept.position.shape == kept.whole.shape == kept.added.shape
        and len({each.device for each in kept}) == 1
    )


# A token's own product with its kept rows of the head runs at the speed of memory, one of many
# tokens with the whole head at that of arithmetic: on the CPU so many times faster a row.
_FASTER = 128


def by_rows(kept: Support, weight: Tensor) -> bool:
    """Whether the sets are so small that each token is multiplied with its own rows."""
    return kept.ids.shape[-1] * _FASTER <= weight.shape[0]


def linear_logits(
    function: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, kept: Support, limit: int
) -> Tensor:
    """[..., K]: the logits of the kept ids, by about `limit` bytes at once."""
    linear = (hidden, weight, bias)
    leaves = [None if each is None else once_differentiable(function, each) for each in linear]
    return _LinearOfSupport.apply(*leaves, kept.ids, kept.position != NOWHERE, limit)


class _LinearOfSupport(torch.autograd.Function):
    """By the kept rows of the head alone, of some tokens at a time."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, ids, active, limit):
        size = ids.shape[-1]
        ctx.step = max(limit // (size * weight.shape[1] * weight.element_size()), 1)
        out = weight.new_full(ids.shape, -torch.inf)
        flat = out.view(-1, size)
        with torch.autocast(weight.device.type, enabled=False):
            for places, chosen, absent, inputs in _pieces(hidden, ids, active, ctx.step):
                logits = torch.bmm(weight[chosen], inputs[:, :, None])[..., 0]
                logits = logits if bias is None else logits + bias[chosen]
                flat[places] = logits.masked_fill(absent, -torch.inf)
        ctx.save_for_backward(*map(savable, (hidden, weight, bias, ids, active)))
        return out

    @staticmethod
    def backward(ctx, dlogits):
        hidden, weight, bias, ids, active = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        # Sums over tokens of half weights are in float32.
        wide = torch.float32 if weight.element_size() == 2 else weight.dtype
        dhidden = torch.zeros_like(hidden).view(-1, hidden.shape[-1]) if wanted[0] else None
        dweight = torch.zeros_like(weight, dtype=wide) if wanted[1] else None
        dbias = weight.new_zeros(weight.shape[:1], dtype=wide) if wanted[2] else None
        dlogits = dlogits.reshape(-1, ids.shape[-1])
        with torch.autocast(weight.device.type, enabled=False):
            for places, chosen, absent, inputs in _pieces(hidden, ids, active, ctx.step):
                part = dlogits[places].masked_fill(absent, 0)
                if dhidden is not None:
                    dhidden[places] = torch.bmm(part[:, None, :], weight[chosen])[:, 0]
                if dweight is not None:
                    outer = part[:, :, None].to(wide) * inputs[:, None, :].to(wide)
                    dweight.index_add_(0, chosen.view(-1), outer.view(-1, weight.shape[1]))
                if dbias is not None:
                    dbias.index_add_(0, chosen.view(-1), part.reshape(-1).to(wide))
        return (
            None if dhidden is None else dhidden.view(hidden.shape),
            None if dweight is None else dweight.to(weight.dtype),
            None if dbias is None else dbias.to(bias.dtype),
            *[None] * 3,
        )


def _pieces(hidden: Tensor, ids: Tensor, active: Tensor, step: int):
    """(places, ids, those that are none, hidden) of the active tokens, some at a time."""
    flat, ids = hidden.reshape(-1, hidden.shape[-1]), ids.reshape(-1, ids.shape[-1])
    for places in active.reshape(-1).nonzero()[:, 0].split(step):
        chosen = ids[places]
        yield places, chosen.clamp_min(0), chosen < 0, flat[places]
