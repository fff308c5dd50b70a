"""Overload and its traces, as an operator sees them: what `chains` serves on `/metrics`, and says in its log."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from tests.acceptance.command import Commands, until

BLOCKING = """\
import time
import chains_stream as chains

@chains.mark_entrypoint
class Block(chains.ChainletBase):
    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=8))
    async def run_remote(self, seconds: float = 0.0) -> str:
        time.sleep(seconds)
        return "done"
"""

GATE = """\
import asyncio, pathlib
import chains_stream as chains

@chains.mark_entrypoint
class Wait(chains.ChainletBase):
    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=8))
    async def run_remote(self, name: str) -> str:
        pathlib.Path(name).touch()
        while not pathlib.Path("go").exists():
            await asyncio.sleep(0.01)
        return name
"""


def sample(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics", timeout=30).text.splitlines()
    return next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} "))


def test_a_chainlet_that_blocks_the_event_loop_is_told(start: Commands, tmp_path: Path) -> None:
    (tmp_path / "chain.py").write_text(BLOCKING)
    server = start("run", "chain.py", "--port", "0", cwd=tmp_path)
    url = server.ready()
    assert httpx.post(f"{url}/run_remote", json={"seconds": 1.5}, timeout=30).json() == "done"
    line = server.logged("loop.blocked")
    found = re.search(r"seconds=(\d+\.\d)", line)
    assert found is not None, line
    assert float(found[1]) >= 1.0
    assert "warning" in line
    assert sample(url, "chains_loop_lag_seconds_sum") >= 1.0
    assert sample(url, 'chains_http_requests_total{route="/run_remote",status="200"}') == 1
    assert server.stop() == 0


def test_the_limits_that_an_operator_sets(start: Commands, tmp_path: Path) -> None:
    (tmp_path / "chain.py").write_text(GATE)
    limits = {"CHAINS_MAX_REQUESTS": "3", "CHAINS_MAX_REQUESTS_PER_KEY": "2"}
    server = start("run", "chain.py", "--port", "0", cwd=tmp_path, variables=limits)
    url = server.ready()

    def ask(name: str, key: str) -> httpx.Response:
        return httpx.post(f"{url}/run_remote", json={"name": name}, headers={"x-api-key": key}, timeout=60)

    with ThreadPoolExecutor(3) as threads:
        try:
            running = []
            for name, key in (("a", "ada"), ("b", "ada")):
                running.append(threads.submit(ask, name, key))
                until((tmp_path / name).exists)
            refused = ask("c", "ada")
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert "CHAINS_MAX_REQUESTS_PER_KEY" in refused.json()["detail"]
            running.append(threads.submit(ask, "d", "bob"))
            until((tmp_path / "d").exists)
            refused = ask("e", "eve")
            assert refused.status_code == 429
            assert "(CHAINS_MAX_REQUESTS)" in refused.json()["detail"]
        finally:
            (tmp_path / "go").touch()
    assert [one.result().json() for one in running] == ["a", "b", "d"]
    assert ask("later", "ada").json() == "later"
    assert not (tmp_path / "c").exists()
    assert sample(url, 'chains_shed_total{reason="key"}') == 1
    assert sample(url, 'chains_shed_total{reason="requests"}') == 1
    assert server.stop() == 0
    assert "ada" not in server.stderr.text()
