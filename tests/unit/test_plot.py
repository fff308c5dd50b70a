"""Plots as SVG, and how figures are written for people."""

from collections.abc import Sequence
from xml.etree import ElementTree as ET

import pytest

from chains_stream.cli.figures import aligned, duration, number
from chains_stream.cli.plot import HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, Line, draw

SVG = "{http://www.w3.org/2000/svg}"
TIME = Axis("latency", duration)
RATE = Axis("calls a second", number)


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(svg).iter(f"{SVG}text")]


def places(svg: str) -> list[list[tuple[float, float]]]:
    lines = ET.fromstring(svg).iter(f"{SVG}polyline")
    return [[_place(pair) for pair in line.attrib["points"].split()] for line in lines]


def _place(pair: str) -> tuple[float, float]:
    x, y = pair.split(",")
    return float(x), float(y)


def test_a_plot_says_what_it_shows() -> None:
    found = texts(draw("A < B & C", RATE, TIME, [Line("p50", [(10, 0.001), (100, 0.01)], 0)]))
    assert {"A < B & C", "latency", "calls a second", "p50", "10", "20", "50", "100", "1 ms", "10 ms"} <= set(found)


def test_points_lie_between_the_axes_from_left_to_right() -> None:
    lines = [Line("a", [(300, 0.9), (1, 0.0004), (20, 0.02)], 0), Line("b", [(7, 0.5)], 1)]
    for x, y in ((RATE, TIME), (RATE._replace(log=False), TIME._replace(log=False))):
        first, second = places(draw("", x, y, lines))
        assert [len(first), len(second)] == [3, 1]
        assert first == sorted(first)
        assert [point[1] for point in first] == sorted((point[1] for point in first), reverse=True)
        assert all(LEFT <= x <= RIGHT and TOP <= y <= HEIGHT for x, y in first + second)


@pytest.mark.parametrize(
    ("points", "ticks"),
    [
        ([(1, 35_000)], ["0", "5,000", "10,000", "15,000", "20,000", "25,000", "30,000", "35,000"]),
        ([(1, 1)], ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        ([(1, 0)], ["0", "1"]),
    ],
)
def test_a_linear_axis_begins_at_0_and_has_round_ticks(points: Sequence[tuple[float, float]], ticks: list[str]) -> None:
    found = texts(draw("", RATE, Axis("", number, log=False), [Line("a", points, 0)]))
    assert [text for text in found if text in ticks][-len(ticks) :] == ticks


def test_what_has_no_logarithm_is_left_out() -> None:
    drawn = draw("", RATE, TIME, [Line("gap", [(1, 0.0), (10, 0.5)], 0), Line("none", [(1, 0.0)], 1)])
    assert [len(line) for line in places(drawn)] == [1]
    assert "none" not in texts(drawn)


def test_a_plot_of_nothing_is_empty() -> None:
    drawn = draw("Nothing", RATE, TIME, [])
    assert places(drawn) == []
    assert ET.fromstring(drawn).attrib["width"] == str(WIDTH)


def test_many_decades_have_ticks_at_powers_of_ten() -> None:
    found = texts(draw("", RATE, TIME, [Line("a", [(1, 1e-6), (2, 5)], 0)]))
    assert {"1 µs", "10 µs", "100 µs", "1 ms", "10 ms", "100 ms", "1 s", "10 s"} <= set(found)
    assert "20 ms" not in found


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0"), (4.2e-6, "4.2 µs"), (1e-3, "1 ms"), (0.1234, "123 ms"), (2.5, "2.5 s"), (99, "99 s")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.1234, "0.123"), (28.51, "28.5"), (99.97, "100"), (12345.6, "12,346")]
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_cells_stand_under_their_titles() -> None:
    assert aligned([[("a", "1"), ("long", "2")], [("a", "100"), ("long", "")]]) == ["  a  long", "  1     2", "100"]
