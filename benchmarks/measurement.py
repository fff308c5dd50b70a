"""What a workload measured, and a row of the table: two of those compared, in each repeat of one run."""

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec

Parameters = dict[str, str | int | float]


class Measurement(msgspec.Struct, frozen=True):
    """What one system did under one workload, once.

    Attributes:
        workload: what was asked for: ``unary``, ``streams``, …
        system: who did it: ``chains``, or a rival of the same run.
        repeat: which of the repeats this is, from 0; those of one repeat ran close to one another.
        parameters: of the workload: ``in_flight``, ``rate_per_s``, ``readers``, ``bytes``, …
        figures: in SI units, which end the name: ``p50_s``, ``rate_per_s``, ``rss_bytes``.
        series: many values of a figure, for plots.
    """

    workload: str
    system: str
    repeat: int
    parameters: Parameters
    figures: dict[str, float]
    series: dict[str, list[float]] = {}


class Pick(msgspec.Struct, frozen=True):
    """Which measurement is meant: one whose parameters include these."""

    workload: str
    system: str
    parameters: Parameters = {}

    def of(self, measurements: Sequence[Measurement], repeat: int) -> Measurement | None:
        """Find it in a repeat; None if that was not measured."""
        found = [
            one
            for one in measurements
            if (one.workload, one.system, one.repeat) == (self.workload, self.system, repeat)
            and self.parameters.items() <= one.parameters.items()
        ]
        if len(found) > 1:
            raise ValueError(f"{self}: {len(found)} measurements of repeat {repeat} match, name more parameters")
        return found[0] if found else None


Direction = Literal["at_least", "at_most"]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the table: a ratio of two measurements, or a figure by itself, and what it should reach.

    Attributes:
        name: short, unique and stable: committed ratios are found by it.
        compared: what is compared with what, for a reader.
        figure: which figure of the measurements.
        over: what it is divided by; None if the target is a number of its own.
        less: what is taken from both before they are divided, where only what is added counts: from the first, and from
            the second, if there is one.
        unit: of the target, if it is no ratio: a key of `UNITS`.
        quick: whether the quick run measures it.
    """

    name: str
    compared: str
    figure: str
    measured: Pick
    over: Pick | None = None
    less: tuple[Pick, ...] = ()
    target: float
    direction: Direction
    unit: str = ""
    quick: bool = False

    def outcome(self, measurements: Sequence[Measurement]) -> "Outcome":
        """Compare what was measured, repeat by repeat."""
        repeats = sorted({one.repeat for one in measurements})
        values = [value for repeat in repeats for value in self._values(measurements, repeat)]
        return Outcome(self, values)

    def _values(self, measurements: Sequence[Measurement], repeat: int) -> Iterator[float]:
        """Give the value of a repeat, if all that it takes was measured."""
        picks = [self.measured, *([self.over] if self.over else []), *self.less]
        found: list[float] = []
        for pick in picks:
            one = pick.of(measurements, repeat)
            if one is None or self.figure not in one.figures:
                return
            found.append(one.figures[self.figure])
        compared = 1 if self.over is None else 2
        above, *below = (
            value - (found[compared + number] if self.less else 0.0) for number, value in enumerate(found[:compared])
        )
        yield above if not below else _ratio(above, below[0])


def _ratio(above: float, below: float) -> float:
    """Divide; where the rival added nothing that can be measured, we added nothing either, or infinitely more."""
    if below > 0:
        return above / below
    return 0.0 if above <= 0 else math.inf


class Outcome(msgspec.Struct, frozen=True):
    """The values of a row, one of each repeat that measured all it takes."""

    row: Row
    values: list[float]

    @property
    def value(self) -> float:
        """Give the median; nan if it was not measured."""
        return statistics.median(self.values) if self.values else math.nan

    @property
    def noise(self) -> float:
        """Give half the range of the values."""
        if not self.values:
            return math.nan
        low, high = min(self.values), max(self.values)
        return (high - low) / 2 if math.isfinite(high) else math.inf

    @property
    def met(self) -> bool | None:
        """Tell whether the target is reached; None if it was not measured."""
        if not self.values:
            return None
        reached = self.value >= self.row.target if self.row.direction == "at_least" else self.value <= self.row.target
        return bool(reached)
