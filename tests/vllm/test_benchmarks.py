"""The script that measures an engine on a GPU, here with a tiny model on a CPU: it runs, checks, and reports."""

import json
from pathlib import Path

import pytest

from benchmarks import gpu

pytestmark = pytest.mark.timeout(600)


def test_the_script_for_gpus_checks_and_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--size", "tiny", "--streams", "1", "2", "--tokens", "16", "--repeats", "1", "--results", str(tmp_path)]
    assert gpu.main(given) == 0
    report = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert set(report["checks"]) == {"greedy, by a Chainlet", "greedy, over HTTP", "resumed", "cancelling"}
    rows = {(row["streams"], row["system"]): row for row in report["rows"]}
    assert set(rows) == {(streams, name) for streams in (1, 2) for name in ("bare", "chain", "gateway")}
    assert all(row["tokens_per_s"] > 0 and row["first_p50"] > 0 for row in rows.values())
    assert (tmp_path / "gpu.md").read_text(encoding="utf-8") in capsys.readouterr().out
