"""What the plots show: figures of a workload against one of its parameters, for each of the systems."""

import statistics
from collections.abc import Callable, Sequence

import msgspec

from benchmarks.measurement import Measurement, Parameters
from benchmarks.targets import BYTES
from chains_stream.cli.figures import duration, number
from chains_stream.cli.plot import Axis, Line, draw


class Picture(msgspec.Struct, frozen=True, kw_only=True):
    """One plot, with a line for each system and figure; the second figure is dashed."""

    name: str
    title: str
    workload: str
    by: str
    figures: tuple[str, ...]
    x: str
    y: str
    where: Parameters = {}
    show: Callable[[float], str] = duration


SYSTEMS = (
    "chains",
    "floor",
    "ray",
    "fastapi",
    "faststream",
    "asgi",
    "relay",
    "engine",
    "relay_http",
    "floor_send",
)  # by colour
LATENCY, FIRST, GAP = ("p50_s", "p99_s"), ("ttft_p50_s", "ttft_p99_s"), ("itl_p50_s", "itl_p99_s")

PICTURES = (
    Picture(
        name="unary-latency-rate",
        title="Unary calls of 1 KB: latency against rate, open loop",
        workload="unary",
        by="rate_per_s",
        figures=LATENCY,
        x="calls due a second",
        y="latency",
        where={"bytes": BYTES, "loop": "open"},
    ),
    Picture(
        name="unary-throughput",
        title="Unary calls of 1 KB: throughput against concurrency",
        workload="unary",
        by="in_flight",
        figures=("rate_per_s",),
        x="calls in flight",
        y="calls a second",
        where={"bytes": BYTES},
        show=number,
    ),
    Picture(
        name="unary-latency",
        title="Unary calls of 1 KB: latency against concurrency",
        workload="unary",
        by="in_flight",
        figures=LATENCY,
        x="calls in flight",
        y="latency",
        where={"bytes": BYTES},
    ),
    Picture(
        name="streams-throughput",
        title="Streams as fast as they go: throughput",
        workload="streams",
        by="readers",
        figures=("tokens_per_s",),
        x="readers",
        y="tokens a second",
        show=number,
    ),
    Picture(
        name="streams-first-token",
        title="Streams as fast as they go: time to first token",
        workload="streams",
        by="readers",
        figures=FIRST,
        x="readers",
        y="time to first token",
    ),
    Picture(
        name="streams-inter-token",
        title="Streams as fast as they go: time between tokens",
        workload="streams",
        by="readers",
        figures=GAP,
        x="readers",
        y="time between tokens",
    ),
    Picture(
        name="paced-first-token",
        title="Streams of 50 tokens/s: time to first token",
        workload="paced",
        by="readers",
        figures=FIRST,
        x="readers",
        y="time to first token",
        where={"tokens_per_s": 50},
    ),
    Picture(
        name="paced-inter-token",
        title="Streams of 50 tokens/s: how far a gap is from the engine's",
        workload="paced",
        by="readers",
        figures=("added_itl_p50_s", "added_itl_p99_s"),
        x="readers",
        y="difference",
        where={"tokens_per_s": 50},
    ),
)


def plots(measurements: Sequence[Measurement]) -> dict[str, str]:
    """Draw what was measured at several places of an axis, as SVG by name."""
    drawn = {}
    for picture in PICTURES:
        lines = _lines(picture, measurements)
        if any(len(line.points) > 1 for line in lines):
            axes = Axis(picture.x, number), Axis(picture.y, picture.show)
            drawn[picture.name] = draw(picture.title, *axes, lines)
    return drawn


def _lines(picture: Picture, measurements: Sequence[Measurement]) -> list[Line]:
    found = [
        one
        for one in measurements
        if one.workload == picture.workload
        and picture.where.items() <= one.parameters.items()
        and picture.by in one.parameters
    ]
    lines = []
    for system in sorted({one.system for one in found}, key=SYSTEMS.index):
        for place, figure in enumerate(picture.figures):
            points = _points([one for one in found if one.system == system], picture.by, figure)
            what = f" {figure.split('_')[-2]}" if len(picture.figures) > 1 else ""
            lines.append(Line(f"{system}{what}", points, SYSTEMS.index(system), dashed=place > 0))
    return lines


def _points(measurements: Sequence[Measurement], by: str, figure: str) -> list[tuple[float, float]]:
    at = sorted({float(one.parameters[by]) for one in measurements})
    medians = [(x, median_of([one for one in measurements if one.parameters[by] == x], figure)) for x in at]
    return [(x, y) for x, y in medians if y is not None]


def median_of(measurements: Sequence[Measurement], figure: str) -> float | None:
    """Give the median of a figure over those that have it; None if none has."""
    values = [one.figures[figure] for one in measurements if figure in one.figures]
    return statistics.median(values) if values else None
