"""What `chains bench` measured: the table, the JSON, and what to bear in mind when reading them."""

import os
import platform
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

from chains_stream.cli.plot import Axis, Line, draw
from chains_stream.load import Percentiles, Result

PACKAGES = ("chains-stream", "aiokafka", "msgspec", "starlette", "httptools", "uvloop")
BUSY = 0.7  # cores: a client this busy adds to what it measures


class Machine(msgspec.Struct, frozen=True):
    """Where and with what something was measured."""

    date: str
    system: str
    processor: str
    processors: int
    memory_bytes: int
    python: str
    versions: dict[str, str]

    @classmethod
    def here(cls, packages: Iterable[str] = PACKAGES) -> "Machine":
        """Describe this one, with the versions of those packages that are installed."""
        return cls(
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            system=platform.platform(),
            processor=_processor(),
            processors=os.cpu_count() or 1,
            memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            python=platform.python_version(),
            versions={name: found for name in packages if (found := _version(name))},
        )

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        memory = f"{self.memory_bytes / 2**30:.0f} GiB"
        return (
            f"{versions}, Python {self.python}\n"
            f"{self.processors} processors, {self.processor}, {memory}, {self.system}; {self.date}"
        )


class Report(msgspec.Struct, kw_only=True):
    """All of one command.

    Attributes:
        target: the URL or the file.
        where: what is loaded, in words.
        shared: whether the client runs on the same machine.
        streams: whether the answers are streams.
        loads: what each load gave, in the order of the runs.
        sweep: what each step of the sweep gave.
        knee_per_s: the highest rate of the sweep that was sustained.
        caveats: what to bear in mind.
        complete: False if the command was stopped.
    """

    machine: Machine
    target: str
    where: str
    shared: bool
    streams: bool = False
    loads: list[Result] = []
    sweep: list[Result] = []
    knee_per_s: float | None = None
    caveats: list[str] = []
    complete: bool = False

    @property
    def failed(self) -> Counter[str]:
        """Count the failures of all loads but the sweep, which goes on until something fails."""
        found: Counter[str] = Counter()
        for load in self.loads:
            found.update(load.failed)
            if self.complete and load.unfinished:
                found["no answer in time"] += load.unfinished
        return found

    def table(self) -> str:
        """Write the table, with head and caveats."""
        parts = [f"{self.where}\n{self.machine}"]
        by_rate = sorted(self.sweep, key=lambda step: step.offered_per_s or 0.0)
        for title, loads in (("", self.loads), ("Sweep", by_rate)):
            if loads:
                rows = [_of_streams(load) if self.streams else _of_calls(load) for load in loads]
                parts.append("\n".join(filter(None, [title, *aligned(rows)])))
        if self.sweep:
            parts.append(self._knee())
        if self.caveats:
            parts.append("\n".join(f"- {caveat}" for caveat in self.caveats))
        if not self.complete:
            parts.append("Stopped before the end.")
        return "\n\n".join(parts)

    def _knee(self) -> str:
        tried = max((step.offered_per_s or 0.0 for step in self.sweep), default=0.0)
        if self.knee_per_s is None:
            return "No rate of the sweep was sustained."
        return f"Sustained up to {number(self.knee_per_s)}/s; the highest rate that was tried is {number(tried)}/s."


def caveats(report: Report) -> list[str]:
    """Say what to bear in mind when reading the figures."""
    loads, found = [*report.loads, *report.sweep], []
    if report.shared:
        found.append(f"Client and server share the {report.machine.processors} processors of this machine.")
    if loads and all(load.loop == "closed" for load in loads):
        found.append("A closed loop hides what a stall costs: nobody sends while it lasts. See --rate and --sweep.")
    if any(load.loop == "open" for load in loads):
        found.append("In an open loop, latency counts from the moment when a request was due.")
    busiest = max((load.client_cpu for load in loads), default=0.0)
    if busiest > BUSY:
        found.append(f"The client kept {busiest:.1f} processors busy: it may have measured itself.")
    overflow = sum(load.overflow for load in report.loads)
    if overflow:
        found.append(f"{number(overflow)} requests were due and not sent, as too many were in flight.")
    if report.failed:
        found.append(f"Failed, and in no latency: {kinds(report.failed)}.")
    return found


def plots(report: Report) -> dict[str, str]:
    """Draw what takes several loads to see, as SVG by name."""
    closed = [load for load in report.loads if load.loop == "closed"]
    opened = [load for load in [*report.loads, *report.sweep] if load.loop == "open"]
    rate, level = Axis("due a second", number), Axis("streams at once" if report.streams else "in flight", number)
    time, unit = Axis("latency", duration), "tokens" if report.streams else "answers"
    found = {}
    if len(opened) > 1:
        found["latency-rate"] = draw("Latency against rate", rate, time, _shares(opened, "latency", "offered_per_s"))
    if len(closed) > 1:
        each = "tokens_per_s" if report.streams else "rate_per_s"
        line = Line(f"{unit} a second", [(load.in_flight, getattr(load, each)) for load in closed], 0)
        many = Axis(f"{unit} a second", number, log=False)
        found["throughput"] = draw("Throughput against concurrency", level, many, [line])
        found["latency"] = draw("Latency against concurrency", level, time, _shares(closed, "latency", "in_flight"))
    if len(closed) > 1 and report.streams:
        first, gap = _shares(closed, "first_token", "in_flight"), _shares(closed, "inter_token", "in_flight")
        found["first-token"] = draw("Time to first token", level, time, first)
        found["inter-token"] = draw("Time between tokens", level, time, gap)
    return found


def _shares(loads: Sequence[Result], of: str, by: str) -> list[Line]:
    """Give a line for each percentile."""
    pairs = [(getattr(load, by), getattr(load, of).shares) for load in loads if getattr(load, of)]
    return [
        Line(name, [(at, shares[name]) for at, shares in pairs], colour) for colour, name in enumerate(_SHARES[:-1])
    ]


def kinds(failed: Counter[str]) -> str:
    """Name what failed, the most frequent first."""
    return ", ".join(f"{number(count)} by {kind}" for kind, count in failed.most_common())


# --- rows: cells with their titles

Cell = tuple[str, str]
_SHARES = ("p50", "p90", "p99", "p99.9", "max")


def _load(load: Result) -> list[Cell]:
    if load.offered_per_s is None:
        return [("loop", "closed"), ("in flight", number(load.in_flight)), ("due/s", "")]
    return [("loop", "open"), ("in flight", f"≤ {number(load.in_flight)}"), ("due/s", number(load.offered_per_s))]


def _of_calls(load: Result) -> list[Cell]:
    shares = load.latency.shares if load.latency else dict.fromkeys(_SHARES)
    return [
        *_load(load),
        ("answers/s", number(load.rate_per_s)),
        *((name, "" if share is None else duration(share)) for name, share in shares.items()),
        *_faults(load),
    ]


def _of_streams(load: Result) -> list[Cell]:
    return [
        *_load(load),
        ("streams/s", number(load.rate_per_s)),
        ("tokens/s", number(load.tokens_per_s)),
        *_short("first token", load.first_token),
        *_short("gap", load.inter_token),
        *_short("whole", load.latency),
        *_faults(load),
    ]


def _short(name: str, found: Percentiles | None) -> list[Cell]:
    return [(f"{name} p50", _share(found, "p50")), ("p99", _share(found, "p99"))]


def _faults(load: Result) -> list[Cell]:
    failed = sum(load.failed.values()) + load.unfinished
    return [("failed", number(failed)), ("client CPU", f"{load.client_cpu:.0%}")]


def _share(found: Percentiles | None, name: str) -> str:
    return "" if found is None else duration(getattr(found, name))


def aligned(rows: Sequence[Sequence[Cell]]) -> list[str]:
    """Set rows of the same columns under their titles, to the right."""
    lines = [[title for title, _ in rows[0]], *([cell for _, cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def number(value: float) -> str:
    """Write a number as a person reads it: three digits that count, and all of a large one."""
    return f"{value:,.0f}" if value >= 99.95 or value == int(value) else f"{value:.3g}"  # noqa: PLR2004 - digits


def duration(seconds: float) -> str:
    """Write a time as a person reads it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{number(seconds / size)} {unit}"
    return f"{number(seconds * 1e6)} µs" if seconds else "0"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """Name the processor: Linux tells in a file, and others in different ways or not at all."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()
