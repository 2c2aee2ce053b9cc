"""The smallest batch found, by greedy steps, that still fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from tether.testing.cases import Case, gathered, rounded

_TRIES = 400
Fails = Callable[[Case], bool]


def shrunk(case: Case, fails: Fails) -> Case:
    tries = iter(range(_TRIES))

    def counted(candidate: Case) -> bool:
        return next(tries, None) is not None and fails(candidate)

    smaller = True
    while smaller:
        smaller = False
        for step in (_dropped_items, _dropped_columns, _simplified):
            case, better = step(case, counted)
            smaller |= better
    return case


def _dropped(
    case: Case, fails: Fails, size_of: Callable[[Case], int], kept: Callable[[Case, list], Case]
) -> tuple[Case, bool]:
    """Half of them, then a quarter, ..., then single ones, while it still fails."""
    better, size = False, size_of(case)
    while size > 0:
        first = 0
        while first < size_of(case):
            rest = [i for i in range(size_of(case)) if not first <= i < first + size]
            smaller = kept(case, rest)
            if rest and fails(smaller):
                case, better = smaller, True
            else:
                first += size
        size //= 2
    return case, better


def _dropped_items(case: Case, fails: Fails) -> tuple[Case, bool]:
    return _dropped(
        case, fails, lambda of: of.items, lambda of, rest: gathered(of, rest, range(of.columns))
    )


def _dropped_columns(case: Case, fails: Fails) -> tuple[Case, bool]:
    return _dropped(
        case, fails, lambda of: of.columns, lambda of, rest: gathered(of, range(of.items), rest)
    )


def _simplified(case: Case, fails: Fails) -> tuple[Case, bool]:
    """Plainer numbers, slot by slot."""
    better = False
    for name in ("mask", *reversed(case.arrays)):
        for place in _array(case, name).isfinite().nonzero().tolist():
            for value in _plainer(case, name, tuple(place)):
                if _array(case, name)[tuple(place)] == value:
                    break
                simpler = _array(case, name).clone()
                simpler[tuple(place)] = value
                candidate = case.changed(**{name: simpler})
                if fails(candidate):
                    case, better = candidate, True
                    break
    return case, better


def _array(case: Case, name: str) -> Tensor:
    return case.mask if name == "mask" else case.arrays[name]


def _plainer(case: Case, name: str, place: tuple[int, ...]) -> Iterator[float]:
    """The plainest first."""
    value = _array(case, name)[place]
    tenths = rounded(value.mul(10).round() / 10).item()
    if name == "mask":
        yield from (1.0, 0.0)
    elif name == "advantages":
        yield from (1.0, -1.0, value.round().item(), tenths)
    elif name == case.leaf:
        yield from (-1.0, tenths)
    elif name != "turn_ids":
        if len(place) == 2:
            yield case.arrays[case.leaf][place].item()
        yield from (value.round().item(), tenths)
