"""From measurements to a report: a table in Markdown, a JSON file, and plots, with where and of what they were made."""

import math
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from benchmarks.measurement import Measurement, Outcome, Parameters, Row
from benchmarks.pictures import median_of, plots
from benchmarks.targets import ROWS, UNITS
from chains_stream.cli.figures import BUSY, PACKAGES, Machine, duration, number

ROOT = Path(__file__).resolve().parents[1]
RIVALS = ("fastapi", "aiohttp", "faststream", "ray", "uvloop", "httptools")
DIGITS = 5  # that count, of a figure in the JSON file
CAVEATS = (
    "Client, systems and Kafka share one machine: what one of them uses, the others lack.",
    "Ratios compare measurements of the same repeat, made shortly after one another.",
    "The table shows the median of the repeats, and half their range as the noise.",
    "Closed loops hide what a stall costs: nobody sends while it lasts.",
    "Latencies against a rate are of open loops, and count from the moment when a request was due.",
)


class Head(msgspec.Struct, frozen=True):
    """What was measured, and where."""

    commit: str
    dirty: bool
    machine: Machine
    caveats: list[str]


class Entry(msgspec.Struct, frozen=True):
    """A row of the table; the figures are in SI units, and None where nothing finite was measured."""

    name: str
    compared: str
    value: float | None
    noise: float | None
    target: float
    direction: str
    unit: str
    met: bool | None
    values: list[float | None]

    @classmethod
    def of(cls, outcome: Outcome) -> "Entry":
        row, values = outcome.row, [_finite(value) for value in outcome.values]
        figures = (_finite(outcome.value), _finite(outcome.noise), row.target)
        return cls(row.name, row.compared, *figures, row.direction, row.unit, outcome.met, values)


class Report(msgspec.Struct, frozen=True):
    """All that one run gave."""

    head: Head
    rows: list[Entry]
    measurements: list[Measurement]


def write(measurements: Sequence[Measurement], folder: Path, rows: Sequence[Row] = ROWS) -> Report:
    """Write `report.json`, `report.md` and the plots into a folder, made if it is not there."""
    rounded = [_rounded(one) for one in measurements]
    caveats = [*CAVEATS, *_busy_clients(measurements)]
    head = Head(*commit(), Machine.here((*PACKAGES, *RIVALS)), caveats)
    report = Report(head, [Entry.of(row.outcome(measurements)) for row in rows], rounded)
    drawn = plots(measurements)
    folder.mkdir(parents=True, exist_ok=True)
    for name, svg in drawn.items():
        (folder / f"{name}.svg").write_text(svg, encoding="utf-8")
    (folder / "report.json").write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    (folder / "report.md").write_text(markdown(report, drawn), encoding="utf-8")
    return report


# --- the table


def markdown(report: Report, drawn: Iterable[str] = ()) -> str:
    """Write a report, with a link to each of the plots in `drawn`."""
    head = report.head
    commit = f"commit {head.commit}{', with changes that are not committed' if head.dirty else ''}"
    parts = [
        "# Benchmarks",
        f"Measured at {commit}.\n" + "\n".join(f"{line}  " for line in str(head.machine).split("\n")),
        targets(report.rows),
        "\n".join(f"- {caveat}" for caveat in head.caveats),
        *(f"![{name}]({name}.svg)" for name in drawn),
        *(_all_of(workload, report.measurements) for workload in _workloads(report.measurements)),
    ]
    return "\n\n".join(parts) + "\n"


def targets(rows: Sequence[Entry]) -> str:
    """Write what was to be reached, and whether it is."""
    lines = [["", "measured", "noise", "target", ""]]
    for row in rows:
        sign = "≥" if row.direction == "at_least" else "≤"
        noise = "" if row.noise is None else f"± {in_unit(row.noise, row.unit)}"
        measured = "not finite" if row.value is None and row.values else in_unit(row.value, row.unit)
        verdict = {True: "met", False: "**NOT met**", None: "not measured"}[row.met]
        lines.append([row.compared, measured, noise, f"{sign} {in_unit(row.target, row.unit)}", verdict])
    return table(lines)


def in_unit(value: float | None, unit: str) -> str:
    """Write a figure in the unit of its row; nothing for None."""
    if value is None:
        return ""
    return f"{value / UNITS[unit]:.3g} {unit}".rstrip()


def _all_of(workload: str, measurements: Sequence[Measurement]) -> str:
    """Write all that was measured under a workload: the medians of the repeats."""
    found = [one for one in measurements if one.workload == workload]
    names = [name for name in FIGURES if any(name in one.figures for one in found)]
    lines = [["system", "parameters", "repeats", *map(_title, names)]]
    for system, parameters in _kinds(found):
        same = [one for one in found if (one.system, one.parameters) == (system, parameters)]
        said = ", ".join(f"{name} {value}" for name, value in parameters.items())
        figures = [shown(name, median_of(same, name)) for name in names]
        lines.append([system, said, str(len(same)), *figures])
    return f"## {workload}\n\n{table(lines)}"


FIGURES = (  # in this order, where they were measured
    *("rate_per_s", "tokens_per_s", "p50_s", "p90_s", "p99_s", "p999_s", "max_s"),
    *("ttft_p50_s", "ttft_p99_s", "itl_p50_s", "itl_p99_s", "added_itl_p50_s", "added_itl_p99_s"),
    *("seconds_s", "cpu_s_per_call", "cpu_s_per_token", "rss_bytes", "bytes_per_stream", "client_cpu"),
)


def shown(name: str, value: float | None) -> str:
    """Write a figure as its name says; nothing for None."""
    if value is None:
        return ""
    if "bytes" in name:
        return f"{value / 1e6:.3g} MB" if value >= 1e6 else f"{value / 1e3:.3g} KB"
    if name.endswith("_per_s") or not (name.endswith("_s") or name.startswith("cpu_s")):
        return number(float(f"{value:.3g}"))
    return duration(value)


def _title(name: str) -> str:
    """Write a figure's name without its unit, which is beside each value."""
    for unit, per in (("cpu_s_per_", "CPU per "), ("_per_s", "/s"), ("_s", "")):
        if name.startswith(unit) or name.endswith(unit):
            name = name.replace(unit, per)
            break
    return name.replace("_", " ")


def table(lines: Sequence[Sequence[str]]) -> str:
    first, *others = (f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([first, "|" + " --- |" * len(lines[0]), *others])


# --- of measurements


def _workloads(measurements: Sequence[Measurement]) -> list[str]:
    return list(dict.fromkeys(one.workload for one in measurements))


def _kinds(measurements: Sequence[Measurement]) -> list[tuple[str, Parameters]]:
    """Give each system with each of its parameters once."""
    kinds: list[tuple[str, Parameters]] = []
    for one in measurements:
        if (one.system, one.parameters) not in kinds:
            kinds.append((one.system, one.parameters))
    return sorted(kinds, key=lambda kind: kind[0])


def _busy_clients(measurements: Sequence[Measurement]) -> list[str]:
    """Name the measurements whose client may have measured itself."""
    busy = [one for one in measurements if one.figures.get("client_cpu", 0.0) > BUSY]
    where = ", ".join(dict.fromkeys(f"{one.workload} of {one.system}" for one in busy))
    said = f"The client kept a processor busy for more than {BUSY:.0%} of the time, and may be what was measured, in: "
    return [f"{said}{where}."] if busy else []


def _rounded(one: Measurement) -> Measurement:
    figures = {name: float(f"{value:.{DIGITS}g}") for name, value in one.figures.items() if math.isfinite(value)}
    return msgspec.structs.replace(one, figures=figures)


def _finite(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def commit() -> tuple[str, bool]:
    """Give the commit that was measured, and whether files differ from it; those of no repository have none."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    return git("rev-parse", "--short=12", "HEAD") or "unknown", bool(git("status", "--porcelain", "--", "*.py"))
