"""Of losses of every family: where and how the numbers lie in memory must not matter."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tether.testing.cases import DTYPES, PADDING, Case, gathered, returned, rounded
from tether.testing.probe import Failure, Observed, Probe, Run, equal, gradient_of, slots_of
from tether.testing.properties import Property, needs_argument, unless

_LEGAL = ("answer_weights",)  # of padding too: they are looked at


def _poisoned(case: Case, name: str, value: float) -> Tensor:
    """A number that a row shares is masked where the whole row is, and the other of its pair."""
    values, active = case.arrays[name], case.active
    if values.dim() == 1:
        active = active.any(1)
        active = active.view(2, -1).any(0).repeat(2) if case.pairs else active
    return torch.where(active, values, value)


def check_poison(probe: Probe, case: Case) -> Failure:
    want = probe(case)
    leaking = (~case.active & (want.gradient != 0)).nonzero().tolist()
    if leaking:
        value = want.gradient[tuple(leaking[0])].item()
        return f"gradient of a masked slot at {leaking[0]}: {probe.changed(0, value)}"
    names = [n for n in case.arrays if n in probe.loss.names and n not in (*DTYPES, *_LEGAL)]
    lowest = torch.finfo(probe.dtype).min
    for value in (math.nan, math.inf, -1e30, -math.inf, 1e30, -1e10, -1e4, lowest):
        each = {name: _poisoned(case, name, value) for name in names}
        tries = {"masked slots of every array hold": each}
        if value in (math.inf, -1e30) or math.isnan(value):
            tries = {f"masked slots of {n} hold": {n: each[n]} for n in names} | tries
        for what, arrays in tries.items():
            failure = probe.same(f"{what} {value:g}", probe(case.changed(**arrays)), want)
            if failure:
                return failure
    return None


def _check_gathered(
    probe: Probe, case: Case, items: Sequence[int], columns: Sequence[int], what: str
) -> Failure:
    """The batch with rows and columns inserted or moved gives the same, slot by slot."""
    other = gathered(case, items, columns)
    got = probe(other)
    if (got.gradient[~other.active] != 0).any():
        return f"{what}: the padding has a gradient"
    got = Observed(got.loss, returned(case, items, columns, got.gradient))
    return probe.close(what, got, probe(case), probe.magnitude(case))


def check_padding_right(probe: Probe, case: Case) -> Failure:
    for extra in (1, 7, 600):
        columns = [*range(case.columns), *[PADDING] * extra]
        what = f"with {extra} masked columns on the right"
        if failure := _check_gathered(probe, case, range(case.items), columns, what):
            return failure
    return None


def check_padding_left(probe: Probe, case: Case) -> Failure:
    columns = [*[PADDING] * 7, *range(case.columns)]
    what = "with 7 masked columns on the left"
    return _check_gathered(probe, case, range(case.items), columns, what)


def check_padding_rows(probe: Probe, case: Case) -> Failure:
    rows, columns = list(range(case.items)), range(case.columns)
    what = "with 3 masked rows at the end"
    if failure := _check_gathered(probe, case, [*rows, *[PADDING] * 3], columns, what):
        return failure
    what = "with 2 masked rows at the start"
    return _check_gathered(probe, case, [PADDING, PADDING, *rows], columns, what)


def check_row_permutation(probe: Probe, case: Case) -> Failure:
    order = range(case.items - 1, -1, -1)
    return _check_gathered(probe, case, order, range(case.columns), "with the rows reversed")


def check_packed(probe: Probe, case: Case) -> Failure:
    """Where as many tokens as rows are left, one number a row may be read in two ways."""
    if slots_of(case).sum() == case.rows:
        return None
    got = probe(case, Run(layout="packed"))
    return probe.same_or_close("packed, with offsets", got, probe(case), case)


def check_strides(probe: Probe, case: Case) -> Failure:
    for layout, what in (
        ("transposed", "transposed in memory"),
        ("sliced", "every second element of a buffer"),
        ("misaligned", "from element 1 of a buffer"),
        ("expanded", "what rows share expanded with stride 0"),
    ):
        got = probe(case, Run(layout=layout))
        if failure := probe.same_or_close(what, got, probe(case), case):
            return failure
    return None


def check_mask_dtypes(probe: Probe, case: Case) -> Failure:
    if ((case.mask != 0) & (case.mask != 1)).any():
        return None
    for dtype in (torch.bool, torch.int64):
        what = f"with a mask of {str(dtype).removeprefix('torch.')}"
        got = probe(case, Run(mask_dtype=dtype))
        if failure := probe.same_or_close(what, got, probe(case), case):
            return failure
    return None


def check_threads(probe: Probe, case: Case) -> Failure:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = probe(case)
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            what = f"on {threads} threads, then on one"
            if failure := probe.same_or_close(what, probe(case.changed()), want, case):
                return failure
    finally:
        torch.set_num_threads(before)
    return None


def check_inputs_unchanged(probe: Probe, case: Case) -> Failure:
    given, wanted = probe.arguments(case), probe.arguments(case)
    gradient_of(probe.loss(given), given[case.leaf])
    for name, each in given.items():
        if isinstance(each, Tensor) and not torch.equal(each, wanted[name]):
            return f"{name} was written to"
    return None


def check_backward_twice(probe: Probe, case: Case) -> Failure:
    given = probe.arguments(case)
    loss = probe.loss(given)
    first = gradient_of(loss, given[case.leaf], retain_graph=True).clone()
    if equal(first, gradient_of(loss, given[case.leaf])).all():
        return None
    return "the gradient of the second backward is another"


def check_no_grad(probe: Probe, case: Case) -> Failure:
    want = probe(case).loss
    given = probe.arguments(case)
    values = {"without requires_grad": probe.loss(given | {case.leaf: given[case.leaf].detach()})}
    with torch.no_grad():
        values["under no_grad"] = probe.loss(given)
    with torch.inference_mode():
        values["in inference mode"] = probe.loss(given)
    for what, value in values.items():
        if not equal(value.item(), want):
            return f"{what}: loss {probe.changed(want, value.item())}"
    return None


def check_half_precision(probe: Probe, case: Case) -> Failure:
    if probe.dtype != torch.float32:
        return None
    for dtype in (torch.bfloat16, torch.float16):
        what = f"in {str(dtype).removeprefix('torch.')}"
        narrow = case.changed(**{name: rounded(x, dtype) for name, x in case.arrays.items()})
        got, want = probe(narrow, Run(dtype=dtype)), probe(narrow)
        if failure := probe.close_losses(what, got.loss, want.loss, probe.magnitude(narrow)):
            return failure
        # Rounded once, to a neighbour.
        nearest = Observed(want.loss, rounded(want.gradient, dtype))
        bound = torch.finfo(dtype).eps * want.gradient.abs() + 2**-24
        near = (got.gradient - nearest.gradient).abs() <= bound
        right = near | equal(got.gradient, nearest.gradient)
        if failure := probe.difference(what, got, nearest, right):
            return failure
    return None


PROPERTIES = (
    Property(
        "poison",
        "What masked slots hold changes no bit of loss and gradient; their gradient is 0",
        "a NaN or a huge number in padding, as a masked softmax leaves it, reaches the weights",
        "small",
        check_poison,
    ),
    Property(
        "padding_right",
        "Masked columns on the right change nothing",
        "the longest answer of a batch sets the learning rate of all others",
        "shaped",
        check_padding_right,
    ),
    Property(
        "padding_left",
        "Masked columns on the left change nothing",
        "the longest prompt of a batch sets the learning rate of its answers",
        "shaped",
        check_padding_left,
    ),
    Property(
        "padding_rows",
        "Masked rows change nothing",
        "rows that only fill a batch up, or were filtered out, weaken the others",
        "shaped",
        check_padding_rows,
    ),
    Property(
        "row_permutation",
        "The order of the rows does not matter",
        "shuffling the data changes the step",
        "small",
        check_row_permutation,
    ),
    Property(
        "packed",
        "Packed rows give what padded rows give",
        "sequence packing, meant to save time, trains another objective",
        "shaped",
        check_packed,
        needs_argument("offsets"),
    ),
    Property(
        "strides",
        "Any strides and alignment give what contiguous arrays give",
        "a view, a transpose or an expand in the caller changes the loss in silence",
        "shaped",
        check_strides,
    ),
    Property(
        "mask_dtypes",
        "A mask of bool, integers or floats is the same mask",
        "a caller's mask of another type changes the loss, or stops the run",
        "small",
        check_mask_dtypes,
    ),
    Property(
        "threads",
        "The number of threads does not matter",
        "a run is not repeated on another machine",
        "large",
        check_threads,
    ),
    Property(
        "inputs_unchanged",
        "No input is written to",
        "what is read after the loss, as old_logps in the next epoch, is no longer what it was",
        "small",
        check_inputs_unchanged,
    ),
    Property(
        "backward_twice",
        "A second backward gives the same gradient",
        "retain_graph, as of two losses on one graph, gives wrong gradients",
        "small",
        check_backward_twice,
    ),
    Property(
        "no_grad",
        "The value does not depend on whether a gradient is wanted",
        "losses of an evaluation are not comparable with those of training",
        "small",
        check_no_grad,
    ),
    Property(
        "half_precision",
        "bfloat16 and float16 give the loss of the same numbers in float32, and its gradient "
        "rounded",
        "under autocast, ratios near 1 are off by up to 0.4 %, as much as a step moves them",
        "small",
        check_half_precision,
        unless("takes_half_precision", "the loss takes no bfloat16 or float16"),
    ),
)
