"""Regressions: the ratios of a quick run beside the committed ones, in `quick.json`.

A ratio is worse if it is worse by more than the noise of both runs: half the range of its repeats, then and now.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import msgspec

from benchmarks.measurement import Measurement, Outcome, Row
from benchmarks.report import in_unit
from benchmarks.targets import ROWS, WATCHED
from chains_stream.cli.figures import Machine

COMMITTED = Path(__file__).with_name("quick.json")
LEAST_NOISE = 0.02  # of a ratio: a few repeats may happen to agree more closely than others would
QUICK = tuple(row for row in (*ROWS, *WATCHED) if row.quick)


class Ratio(msgspec.Struct, frozen=True):
    """What a row was: the median of its repeats, and half their range."""

    median: float
    spread: float


class Committed(msgspec.Struct, frozen=True):
    """What later runs are compared with, and the machine that it was measured on."""

    machine: str
    rows: dict[str, Ratio]


def check(
    measurements: Sequence[Measurement], *, accept: bool, path: Path = COMMITTED, rows: Sequence[Row] = QUICK
) -> int:
    """Print a line for each row, and give the status to exit with: 1 if one is worse than what is committed.

    With `accept` the committed ratios are replaced instead.
    """
    outcomes = [row.outcome(measurements) for row in rows]
    here = Machine.here()
    machine = f"{here.processors} of {here.processor}"
    if accept:
        return _accept(outcomes, machine, path)
    if not path.exists():
        print(f"{path} is not there: write it with --accept")
        return 1
    committed = msgspec.json.decode(path.read_bytes(), type=Committed)
    verdicts = [verdict(outcome, committed, machine) for outcome in outcomes]
    for _, line in verdicts:
        print(line)
    worse = sum(fails for fails, _ in verdicts)
    if worse:
        print(f"{worse} of {len(verdicts)} are not as committed; if that is meant, write them with --accept")
    return 1 if worse else 0


def verdict(outcome: Outcome, committed: Committed, machine: str) -> tuple[bool, str]:
    """Tell whether a row fails, and say what it is in a line."""
    row, before = outcome.row, committed.rows.get(outcome.row.name)
    if not math.isfinite(outcome.value):
        return True, f"{row.name}: not measured"
    now = f"{row.name}: {in_unit(outcome.value, row.unit)} ± {in_unit(outcome.noise, row.unit)}"
    if before is None:
        return True, f"{now}, and nothing is committed"
    now = f"{now}, committed {in_unit(before.median, row.unit)} ± {in_unit(before.spread, row.unit)}"
    if row.unit == "µs" and machine != committed.machine:
        return False, f"{now}: not compared, as that was another machine ({committed.machine})"
    fails = worsening(outcome, before) > allowed(outcome, before)
    return fails, f"{now}: {'WORSE' if fails else 'ok'}"


def worsening(outcome: Outcome, before: Ratio) -> float:
    """Give how much worse a row has become; below 0 if it is better."""
    difference = outcome.value - before.median
    return difference if outcome.row.direction == "at_most" else -difference


def allowed(outcome: Outcome, before: Ratio) -> float:
    """Give how much worse it may be by chance."""
    return sum(max(noise, LEAST_NOISE * abs(before.median)) for noise in (outcome.noise, before.spread))


def _accept(outcomes: Sequence[Outcome], machine: str, path: Path) -> int:
    lacking = [outcome.row.name for outcome in outcomes if not math.isfinite(outcome.value)]
    if lacking:
        print(f"nothing is written: {', '.join(lacking)} could not be measured")
        return 1
    rows = {
        outcome.row.name: Ratio(*(float(f"{figure:.4g}") for figure in (outcome.value, outcome.noise)))
        for outcome in outcomes
    }
    path.write_bytes(msgspec.json.format(msgspec.json.encode(Committed(machine, rows)), indent=2) + b"\n")
    print(f"wrote {len(rows)} ratios to {path}")
    return 0
