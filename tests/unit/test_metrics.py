"""What a process counts, and what it costs those who don't ask."""

import asyncio
import logging
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from prometheus_client import REGISTRY

from chains_stream.cli import lag


@pytest.mark.parametrize("module", ["chains_stream", "chains_stream.cli"])
def test_it_is_imported_by_those_alone_who_serve(module: str) -> None:
    code = f"import sys, {module}; print('prometheus_client' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"


def test_counting_starts_nothing() -> None:
    code = "import threading, chains_stream.metrics; print(threading.active_count())"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "1"


async def test_a_blocked_loop_is_measured_and_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lag, "INTERVAL", 0.01)
    monkeypatch.setattr(lag, "BLOCKED", 0.2)
    before = _sum()
    watch = asyncio.create_task(lag.watch_loop())
    with caplog.at_level(logging.WARNING, logger=lag.__name__):
        while _count() == 0 or not caplog.records:
            await asyncio.sleep(0.02)  # so that the watch is under way, and has its turn afterwards
            if not caplog.records:
                time.sleep(0.5)  # noqa: ASYNC251 - the mistake under test
    watch.cancel()
    with suppress(asyncio.CancelledError):
        await watch
    event = caplog.records[0].msg
    assert isinstance(event, dict)
    assert event["event"] == "loop.blocked"
    assert event["seconds"] >= 0.4
    assert _sum() - before >= 0.4


def _sum() -> float:
    return REGISTRY.get_sample_value("chains_loop_lag_seconds_sum") or 0.0


def _count() -> float:
    return REGISTRY.get_sample_value("chains_loop_lag_seconds_count") or 0.0
