"""The report of the benchmarks, and what it calls a regression."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree as ET

import msgspec
import pytest

from benchmarks import quick, report
from benchmarks.measurement import Measurement, Pick, Row
from benchmarks.pictures import plots
from benchmarks.quick import Committed, Ratio
from benchmarks.targets import ROWS, WATCHED

RATE = Row(
    name="rate",
    compared="calls/s over the floor's",
    figure="rate_per_s",
    measured=Pick("unary", "chains", {"in_flight": 256}),
    over=Pick("unary", "floor", {"in_flight": 256}),
    target=0.7,
    direction="at_least",
)
ADDED = Row(
    name="added",
    compared="what is added to the engine",
    figure="p50_s",
    measured=Pick("paced", "chains"),
    over=Pick("paced", "relay"),
    less=(Pick("paced", "engine"), Pick("paced", "engine")),
    target=3,
    direction="at_most",
)
MEMORY = Row(
    name="memory",
    compared="RSS of a worker",
    figure="rss_bytes",
    measured=Pick("memory", "chains", {"process": "worker"}),
    target=70e6,
    direction="at_most",
    unit="MB",
)


def unary(system: str, rates: Sequence[float]) -> list[Measurement]:
    return [
        Measurement("unary", system, repeat, {"in_flight": 256, "bytes": 1000}, {"rate_per_s": rate})
        for repeat, rate in enumerate(rates)
    ]


def paced(system: str, seconds: float) -> Measurement:
    return Measurement("paced", system, 0, {"readers": 256}, {"p50_s": seconds})


def memory(megabytes: float) -> list[Measurement]:
    return [Measurement("memory", "chains", 0, {"process": "worker"}, {"rss_bytes": megabytes * 1e6})]


def test_a_ratio_is_the_median_of_those_within_each_repeat() -> None:
    """The machine was slow in one repeat, for both: that is no noise."""
    found = RATE.outcome(unary("chains", [800, 75, 900]) + unary("floor", [1000, 100, 1000]))
    assert found.values == [0.8, 0.75, 0.9]
    assert (found.value, found.met) == (0.8, True)
    assert found.noise == pytest.approx(0.075)


def test_a_repeat_that_lacks_one_of_the_two_does_not_count() -> None:
    found = RATE.outcome(unary("chains", [600, 800]) + unary("floor", [1000]))
    assert (found.values, found.met) == ([0.6], False)


def test_what_was_not_measured_is_neither_met_nor_missed() -> None:
    found = RATE.outcome(unary("floor", [1000]))
    assert found.met is None
    assert math.isnan(found.value)


def test_two_measurements_that_match_are_a_mistake() -> None:
    both = unary("chains", [1]) + unary("chains", [2]) + unary("floor", [1])
    with pytest.raises(ValueError, match="2 measurements of repeat 0 match, name more parameters"):
        RATE.outcome(both)


def test_where_only_what_is_added_counts_the_engine_is_taken_off_both() -> None:
    found = ADDED.outcome([paced("chains", 0.025), paced("relay", 0.022), paced("engine", 0.02)])
    assert found.value == pytest.approx(2.5)
    assert found.met


def test_a_rival_that_adds_nothing_is_met_by_adding_nothing() -> None:
    engine = paced("engine", 0.02)
    assert ADDED.outcome([paced("chains", 0.019), paced("relay", 0.02), engine]).value == 0
    found = ADDED.outcome([paced("chains", 0.021), paced("relay", 0.02), engine])
    assert (found.value, found.met) == (math.inf, False)


def test_the_report_says_what_is_met_and_what_is_not(tmp_path: Path) -> None:
    measured = unary("chains", [600, 650, 640]) + unary("floor", [1000, 1000, 1000]) + memory(65)
    written = report.write(measured, tmp_path / "new", (RATE, ADDED, MEMORY))
    text = (tmp_path / "new" / "report.md").read_text(encoding="utf-8")
    assert "| calls/s over the floor's | 0.64 | ± 0.025 | ≥ 0.7 | **NOT met** |" in text
    assert "| RSS of a worker | 65 MB | ± 0 MB | ≤ 70 MB | met |" in text
    assert "| what is added to the engine |  |  | ≤ 3 | not measured |" in text
    assert "| system | parameters | repeats | rate/s |" in text
    assert "| floor | in_flight 256, bytes 1000 | 3 | 1,000 |" in text
    assert written.head.commit in text
    assert f"Python {written.head.machine.python}" in text
    assert "share one machine" in text
    again = msgspec.json.decode((tmp_path / "new" / "report.json").read_bytes(), type=report.Report)
    assert again == written
    assert [row.met for row in again.rows] == [False, None, True]


def test_a_client_that_measured_itself_is_named(tmp_path: Path) -> None:
    busy = Measurement("unary", "floor", 0, {"in_flight": 256}, {"rate_per_s": 1.0, "client_cpu": 0.95})
    written = report.write([busy], tmp_path, ())
    assert "may be what was measured, in: unary of floor." in written.head.caveats[-1]


def test_plots_have_a_line_for_each_system() -> None:
    measured = [
        Measurement("streams", system, repeat, {"readers": readers}, {"ttft_p50_s": 0.001 * readers, "ttft_p99_s": 0.1})
        for system in ("asgi", "chains")
        for readers in (1, 8, 64)
        for repeat in range(3)
    ]
    drawn = plots(measured)
    assert list(drawn) == ["streams-first-token"]
    root = ET.fromstring(drawn["streams-first-token"])
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"chains p50", "chains p99", "asgi p50", "asgi p99", "1 ms", "100 ms", "readers"} <= set(texts)
    lines = list(root.iter("{http://www.w3.org/2000/svg}polyline"))
    assert [len(line.attrib["points"].split()) for line in lines] == [3] * 4
    assert ["stroke-dasharray" in line.attrib for line in lines] == [False, True, False, True]


def test_every_target_has_a_name_of_its_own() -> None:
    rows = (*ROWS, *WATCHED)
    assert len({row.name for row in rows}) == len(rows)
    assert all(len(row.less) in (0, 1 if row.over is None else 2) for row in rows)


def test_a_quick_run_watches_rows_with_a_target_and_others() -> None:
    watched = {row.name for row in quick.QUICK}
    assert {
        "unary p50 at 1",
        "unary rate at 256",
        "streams",
        "embedded CPU",
        "fused hops",
        "unary CPU at 256",
    } <= watched
    assert "unary rate, Ray Serve" not in watched


# --- regressions


def committed(path: Path, measured: Sequence[Measurement], capsys: pytest.CaptureFixture[str]) -> Path:
    assert quick.check(measured, accept=True, path=path / "quick.json", rows=(RATE, MEMORY)) == 0
    assert capsys.readouterr().out == f"wrote 2 ratios to {path / 'quick.json'}\n"
    return path / "quick.json"


def test_ratios_as_committed_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured = unary("chains", [800, 760, 840]) + unary("floor", [1000] * 3) + memory(60)
    path = committed(tmp_path, measured, capsys)
    slightly = unary("chains", [790, 720, 730]) + unary("floor", [1000] * 3) + memory(61)
    assert quick.check(slightly, accept=False, path=path, rows=(RATE, MEMORY)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "rate: 0.73 ± 0.035, committed 0.8 ± 0.04: ok",
        "memory: 61 MB ± 0 MB, committed 60 MB ± 0 MB: ok",
    ]


def test_a_ratio_that_is_worse_by_more_than_its_noise_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = committed(tmp_path, unary("chains", [800, 760, 840]) + unary("floor", [1000] * 3) + memory(60), capsys)
    slower = unary("chains", [700, 690, 710]) + unary("floor", [1000] * 3) + memory(64)
    assert quick.check(slower, accept=False, path=path, rows=(RATE, MEMORY)) == 1
    first, second, last = capsys.readouterr().out.splitlines()
    assert first == "rate: 0.7 ± 0.01, committed 0.8 ± 0.04: WORSE"
    assert second == "memory: 64 MB ± 0 MB, committed 60 MB ± 0 MB: WORSE"
    assert last.startswith("2 of 2 are not as committed")


def test_what_becomes_better_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = committed(tmp_path, unary("chains", [800]) + unary("floor", [1000]) + memory(60), capsys)
    faster = unary("chains", [1200]) + unary("floor", [1000]) + memory(30)
    assert quick.check(faster, accept=False, path=path, rows=(RATE, MEMORY)) == 0


def test_a_row_that_is_no_longer_measured_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = committed(tmp_path, unary("chains", [800]) + unary("floor", [1000]) + memory(60), capsys)
    assert quick.check(memory(60), accept=False, path=path, rows=(RATE, MEMORY)) == 1
    assert "rate: not measured" in capsys.readouterr().out
    before = path.read_bytes()
    assert quick.check(memory(60), accept=True, path=path, rows=(RATE, MEMORY)) == 1
    assert path.read_bytes() == before


def test_without_committed_ratios_it_says_how_to_write_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quick.check(memory(60), accept=False, path=tmp_path / "none.json", rows=(MEMORY,)) == 1
    assert "--accept" in capsys.readouterr().out


def test_times_of_another_machine_are_not_compared() -> None:
    row = msgspec.structs.replace(MEMORY, name="time", figure="cpu_s_per_call", unit="µs", target=60e-6)
    measured = [Measurement("memory", "chains", 0, {"process": "worker"}, {"cpu_s_per_call": 80e-6})]
    there = Committed("64 of another", {"time": Ratio(50e-6, 1e-6)})
    fails, line = quick.verdict(row.outcome(measured), there, "2 of ours")
    assert (fails, line) == (
        False,
        "time: 80 µs ± 0 µs, committed 50 µs ± 1 µs: not compared, as that was another machine (64 of another)",
    )
    fails, _ = quick.verdict(row.outcome(measured), there, "64 of another")
    assert fails


def test_the_readme_shows_the_report_that_is_committed() -> None:
    root = Path(__file__).resolve().parents[2]
    text = (root / "benchmarks" / "results" / "report.md").read_text(encoding="utf-8")
    table = text[text.index("\n|  |") : text.index("\n\n- ")].strip().splitlines()
    assert len(table) > 10
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert [line for line in table if line not in readme.splitlines()] == []
    drawn = {path.name for path in (root / "benchmarks" / "results").glob("*.svg")}
    assert drawn == set(re.findall(r"benchmarks/results/([\w-]+\.svg)", readme))
