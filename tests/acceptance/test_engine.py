"""A Chainlet whose engine dies: its process ends in order, and others go on with its requests."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.acceptance.command import HERE, Commands

ENGINE = str(HERE / "chains" / "engine.py")
BELOW = str(HERE / "chains" / "engine_below.py")
WHOLE = [f"{number}" for number in range(6)]


def ask(url: str, folder: Path) -> httpx.Response:
    headers = {"accept": "application/x-ndjson"}
    return httpx.post(f"{url}/run_remote", json={"folder": str(folder)}, headers=headers, timeout=60)


@pytest.mark.kafka
def test_another_worker_goes_on_with_what_the_dead_one_has_begun(
    start: Commands, kafka_url: str, namespace: str, tmp_path: Path
) -> None:
    common = ("--broker", kafka_url, "--namespace", namespace)
    first = start("worker", ENGINE, *common)
    gateway = start("gateway", ENGINE, "--port", "0", *common)
    url = gateway.ready()
    first.ready()
    (tmp_path / "die").touch()
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(ask, url, tmp_path)
        assert first.wait() == 1
        start("worker", ENGINE, *common).ready()
        assert answer.result(60).text.split() == WHOLE
    assert (tmp_path / "died at 0").exists()
    errors = first.stderr.text().splitlines()
    assert errors[-1] == "error: Engine can't serve any more: its core was killed"
    assert not any("Traceback" in line for line in errors)
    printed = [line for line in first.stdout.text().splitlines() if "engine has" in line]
    assert printed == ["the engine has begun", "the engine has ended"]


@pytest.mark.kafka
def test_what_waits_above_a_dead_one_is_answered_before_the_process_ends(
    start: Commands, kafka_url: str, namespace: str, tmp_path: Path
) -> None:
    common = ("--broker", kafka_url, "--namespace", namespace)
    variables = {"CHAINS_PARTITIONS": "1", "CHAINS_GRACE_PERIOD": "300"}
    gateway = start("gateway", BELOW, "--port", "0", *common, variables=variables)
    first = start("worker", BELOW, *common, variables=variables)
    url = gateway.ready()
    first.ready()
    (tmp_path / "die").touch()
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(httpx.post, f"{url}/run_remote", json={"folder": str(tmp_path)}, timeout=60)
        first.logged("request.left")
        start("worker", BELOW, *common, variables=variables).ready()
        assert answer.result(60).json() == "answered"
    assert first.wait() == 1


def test_the_one_process_of_a_chain_ends_and_says_so(start: Commands, tmp_path: Path) -> None:
    server = start("run", ENGINE, "--port", "0")
    url = server.ready()
    assert ask(url, tmp_path).text.split() == WHOLE
    (tmp_path / "die").touch()
    assert "no answer from the core" in ask(url, tmp_path).text, "nobody else could run it"
    assert server.wait() == 1
    assert server.stderr.text().splitlines()[-1] == "error: Engine can't serve any more: its core was killed"
    assert "the engine has ended" in server.stdout.text()
