"""A benchmark from end to end: systems in processes of their own, one Kafka, a table. It asserts nothing of times."""

from contextlib import ExitStack
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.bench import Bench
from benchmarks.workloads import unary

pytestmark = pytest.mark.kafka


def test_a_row_of_the_table_is_measured(kafka_url: str, tmp_path: Path) -> None:
    bench = Bench(kafka_url, 1, quick=True, seconds=0.3)
    with ExitStack() as stack:
        for system in (unary.floor(bench, stack), unary.chains(bench, stack)):
            unary.closed(bench, system, 0, unary.SMALL, 1)
    assert {one.system for one in bench.measurements} == {"floor", "chains"}
    for one in bench.measurements:
        assert one.figures["calls"] > 0
        assert one.figures["cpu_s_per_call"] > 0
    rows = {row.name: row for row in report.write(bench.measurements, tmp_path).rows}
    assert len(rows["unary p50 at 1"].values) == 1
    assert rows["unary rate at 256"].met is None
    assert "unary" in (tmp_path / "report.md").read_text()
