"""What a check found, property by property."""

from __future__ import annotations

import dataclasses

HOLDS, FAILS, NOT_APPLICABLE = "holds", "fails", "not applicable"
_MARKS = {HOLDS: "ok   ", FAILS: "FAILS", NOT_APPLICABLE: "-    "}


@dataclasses.dataclass(frozen=True)
class PropertyReport:
    id: str  # "poison"
    statement: str  # what should hold, in one sentence
    outcome: str = HOLDS  # or "fails", "not applicable"
    detail: str = ""  # fails: what differed; not applicable: why
    meaning: str = ""  # fails: what follows from it in training
    batch: str = ""  # fails: the smallest failing input found, as Python
    rows: int = 0  # of it
    columns: int = 0

    def __str__(self) -> str:
        lines = [f"{_MARKS[self.outcome]} {self.id}: {self.statement}."]
        lines += [f"        {line}" for line in self.detail.splitlines()]
        lines += [f"        Then: {self.meaning}."] if self.meaning else []
        lines += [f"        {line}" for line in self.batch.splitlines()]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Report:
    properties: tuple[PropertyReport, ...]
    seed: int
    batches: int

    @property
    def ok(self) -> bool:
        """Nothing fails."""
        return not self.failed

    @property
    def failed(self) -> tuple[str, ...]:
        return tuple(each.id for each in self.properties if each.outcome == FAILS)

    def assert_ok(self) -> None:
        """Raises AssertionError with what fails."""
        if not self.ok:
            broken = [str(each) for each in self.properties if each.outcome == FAILS]
            raise AssertionError("\n".join([self._summary(), *broken]))

    def __getitem__(self, id: str) -> PropertyReport:
        for each in self.properties:
            if each.id == id:
                return each
        known = ", ".join(each.id for each in self.properties)
        raise KeyError(f'Report: property must be one of {known}, got "{id}"')

    def __str__(self) -> str:
        return "\n".join([self._summary(), *map(str, self.properties)])

    def _summary(self) -> str:
        counts = [sum(each.outcome == of for each in self.properties) for of in _MARKS]
        return (
            f"{counts[0]} properties hold, {counts[1]} fail, {counts[2]} do not apply "
            f"(seed {self.seed}, {self.batches} random batches)"
        )
