"""Lines in a plot, as SVG: small files without a library, readable on a light page and on a dark one."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 80, 570, 40, 345  # of the area that the axes bound; the legend is right of it
# Told apart by most colour-blind people, and of a lightness that stands out from white and from black.
COLOURS = ("#0b84d8", "#e0620d", "#1a9e6c", "#c05cb0", "#b8860b", "#6f7fd8", "#d0404f", "#7d8590", "#8f5b2e", "#2aa3b5")
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#24292f}.title{font-size:15px}.grid{stroke:#24292f;stroke-opacity:.15}"
    ".frame{stroke:#24292f;stroke-opacity:.5;fill:none}"
    "@media(prefers-color-scheme:dark){text{fill:#d0d7de}.grid,.frame{stroke:#d0d7de}}"
)


class Line(NamedTuple):
    """One line, through points from left to right. Lines of one system share a colour, and may be dashed."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    dashed: bool = False


class Axis(NamedTuple):
    """What an axis shows; a logarithmic one leaves out what is not above 0."""

    label: str
    show: Callable[[float], str]
    log: bool = True


class _Scale:
    """From values to pixels, with ticks at round values."""

    def __init__(self, axis: Axis, values: Sequence[float], start: int, end: int) -> None:
        self._log = axis.log
        ticks = _round_on_log(min(values), max(values)) if axis.log else _round(max(values))
        self._low, self._high = self._place(ticks[0]), self._place(ticks[-1])
        self._start, self._end = start, end
        self.ticks = ticks

    def _place(self, value: float) -> float:
        return math.log10(value) if self._log else value

    def __call__(self, value: float) -> float:
        share = (self._place(value) - self._low) / (self._high - self._low)
        return round(self._start + share * (self._end - self._start), 1)


def draw(title: str, x: Axis, y: Axis, lines: Sequence[Line]) -> str:
    """Draw lines, those without a point left out, as the text of an SVG file."""
    shown = [line._replace(points=_shown(line.points, x, y)) for line in lines]
    shown = [line for line in shown if line.points]
    points = [point for line in shown for point in line.points]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">',
        f"<style>{STYLE}</style>",
        _text(LEFT, 22, title, "start", ' class="title"'),
        _text((LEFT + RIGHT) / 2, HEIGHT - 12, x.label),
        f'<g transform="rotate(-90)">{_text(-(TOP + BOTTOM) / 2, 16, y.label)}</g>',
    ]
    if points:
        across = _Scale(x, [point[0] for point in points], LEFT, RIGHT)
        up = _Scale(y, [point[1] for point in points], BOTTOM, TOP)
        for tick in across.ticks:
            parts.append(_grid(across(tick), TOP, across(tick), BOTTOM))
            parts.append(_text(across(tick), BOTTOM + 18, x.show(tick)))
        for tick in up.ticks:
            parts.append(_grid(LEFT, up(tick), RIGHT, up(tick)))
            parts.append(_text(LEFT - 8, up(tick) + 4, y.show(tick), "end"))
        for number, line in enumerate(shown):
            parts.extend(_line(line, across, up, TOP + 12 + 20 * number))
    parts.append(f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{RIGHT - LEFT}" height="{BOTTOM - TOP}"/>')
    return "\n".join([*parts, "</svg>", ""])


def _shown(points: Sequence[tuple[float, float]], x: Axis, y: Axis) -> list[tuple[float, float]]:
    return sorted(point for point in points if (point[0] > 0 or not x.log) and (point[1] > 0 or not y.log))


def _line(line: Line, across: _Scale, up: _Scale, legend: float) -> list[str]:
    """Draw a line, its points, and its place in the legend."""
    colour = COLOURS[line.colour % len(COLOURS)]
    dashes = ' stroke-dasharray="5 4"' if line.dashed else ""
    style = f'fill="none" stroke="{colour}" stroke-width="2"{dashes}'
    places = [(across(x), up(y)) for x, y in line.points]
    path = " ".join(f"{x:g},{y:g}" for x, y in places)
    dots = "".join(f'<circle cx="{x:g}" cy="{y:g}" r="2.5" fill="{colour}"/>' for x, y in places)
    key = f'<path d="M{RIGHT + 14} {legend:g}h24" {style}/>{_text(RIGHT + 44, legend + 4, line.name, "start")}'
    return [f'<polyline points="{path}" {style}/>', dots, key]


def _grid(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<path class="grid" d="M{x1:g} {y1:g}L{x2:g} {y2:g}"/>'


def _text(x: float, y: float, text: str, anchor: str = "middle", more: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{more}>{escape(text)}</text>'


def _round(high: float) -> list[float]:
    """Give ticks from 0 up to `high` at least: four to eight, 1, 2 or 5 times a power of ten apart."""
    if high <= 0:
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(high))
    step = next(share * power for share in (0.1, 0.2, 0.5, 1, 2) if high / (share * power) <= 7)  # noqa: PLR2004 - ticks
    return [number * step for number in range(math.ceil(high / step - 1e-9) + 1)]


def _round_on_log(low: float, high: float) -> list[float]:
    """Give ticks that enclose both: of 1, 2, 5 in each decade, or powers of ten alone where it is many decades."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    digits = (1, 2, 5) if last - first <= 3 else (1,)  # noqa: PLR2004 - ticks
    found = [digit * 10.0**power for power in range(first, last + 1) for digit in digits]
    start = max(number for number, tick in enumerate(found) if tick <= low * (1 + 1e-9))
    end = min(number for number, tick in enumerate(found) if tick >= high * (1 - 1e-9))
    return found[start : max(end, start + 1) + 1]
