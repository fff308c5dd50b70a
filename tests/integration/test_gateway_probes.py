"""What watchers of a process see: `/metrics`, and a `/healthz` that says why."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import httpx
import pytest

import chains_stream as chains
from chains_stream.brokers.memory import MemoryBroker
from chains_stream.brokers.memory_reading import MemoryReader
from chains_stream.cli.health import Health
from chains_stream.errors import BrokerError
from chains_stream.gateway import probes
from tests.sample import Seen
from tests.serving import WAIT, Greet, Slow, request_log, serving


@pytest.fixture(autouse=True)
def nothing_seen() -> Iterator[None]:
    Seen.reset()
    yield
    Seen.reset()


class Ailing(chains.ChainletBase):
    """Is as healthy as a test says."""

    state = "well"

    async def is_healthy(self) -> bool:
        match type(self).state:
            case "raising":
                raise RuntimeError("out of\nmemory")
            case "hanging":
                await asyncio.Event().wait()
        return type(self).state == "well"

    async def run_remote(self) -> None: ...


class Top(chains.ChainletBase):
    """Never says how it is."""

    def __init__(self, below: Ailing = chains.depends(Ailing)) -> None:
        self._below = below

    async def is_healthy(self) -> bool:
        await asyncio.Event().wait()
        return True

    async def run_remote(self) -> None: ...


class Stuck(chains.ChainletBase):
    """Has a synchronous check, which does not answer until a test says so."""

    asked = 0
    released = threading.Event()

    def is_healthy(self) -> bool:
        type(self).asked += 1
        return type(self).released.wait(10)

    async def run_remote(self) -> None: ...


@asynccontextmanager
async def watching() -> AsyncIterator[tuple[Health, httpx.AsyncClient]]:
    """A worker's health server, and a client of it."""
    health = Health("127.0.0.1", 0)
    url = await health.start()
    try:
        async with httpx.AsyncClient(base_url=url, timeout=WAIT, trust_env=False) as http:
            yield health, http
    finally:
        await health.stop()


async def samples(http: httpx.AsyncClient) -> dict[str, float]:
    """Read what `/metrics` says, as a scraper does."""
    response = await http.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    lines = [line for line in response.text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


# --- metrics


async def test_a_gateway_counts_its_requests_by_route_and_status() -> None:
    async with serving(Greet) as served:
        before = await samples(served.http)
        with request_log() as log:
            await served.call(name="Ada")
            await served.call(name="Ada")
            await served.call(name=7)
            await served.http.get("/nowhere/secret?token=secret")
            await log.wait(4)
        after = await samples(served.http)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert grown('chains_http_requests_total{route="/run_remote",status="200"}') == 2
    assert grown('chains_http_requests_total{route="/run_remote",status="400"}') == 1
    assert grown('chains_http_requests_total{route="unknown",status="404"}') == 1
    assert grown('chains_http_seconds_count{route="/run_remote"}') == 3
    assert 0 < grown('chains_http_seconds_sum{route="/run_remote"}') < WAIT
    assert not [name for name in after if "secret" in name]
    for name in ("process_resident_memory_bytes", "process_cpu_seconds_total", "process_open_fds"):
        assert after[name] > 0
    assert [name for name in after if name.startswith("python_info")]


async def test_what_is_in_flight_goes_up_and_down() -> None:
    async with serving(Slow) as served:
        with request_log() as log:
            requests = await served.follow(served.topic)
            held = []
            for _ in range(3):
                held.append(asyncio.ensure_future(served.call(name="held")))
                await requests.fetch()
            during = (await samples(served.http))["chains_http_requests_in_flight"]
            Seen.note("go")
            await asyncio.gather(*held)
            await log.wait(4)
            after = (await samples(served.http))["chains_http_requests_in_flight"]
    assert during - after == 3


async def test_what_was_never_shed_is_there_as_zero_or_more() -> None:
    async with serving(Greet, workers=False) as served:
        found = await samples(served.http)
    assert {f'chains_shed_total{{reason="{reason}"}}' for reason in ("requests", "key", "bytes")} <= found.keys()


async def test_a_worker_shows_its_metrics() -> None:
    async with serving(Greet), watching() as (_, http):
        found = await samples(http)
    assert {"process_resident_memory_bytes", "chains_calls_in_flight"} <= found.keys()


# --- health


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What keeps the embedded broker from moving on; nothing while it is empty."""
    reasons: list[str] = []
    monkeypatch.setattr(MemoryBroker, "trouble", lambda _: reasons[0] if reasons else None)
    return reasons


async def test_a_gateway_says_what_keeps_its_broker_from_moving_on(stuck: list[str]) -> None:
    async with serving(Greet) as served:
        assert (await served.http.get("/healthz")).json() == {"status": "ok"}
        stuck.append("no answer to a fetch for 60 s")
        response = await served.http.get("/healthz")
        assert response.status_code == 503
        assert response.headers["content-type"] == "application/json"
        assert response.json() == {"status": "unhealthy", "reason": "no answer to a fetch for 60 s"}
        stuck.clear()
        assert (await served.http.get("/healthz")).status_code == 200


async def test_a_gateway_that_can_read_no_answers_is_unhealthy() -> None:
    async with serving(Greet) as served:
        reader = served.caller._reader
        assert isinstance(reader, MemoryReader)
        reader.fail(BrokerError("the disk is full"))
        assert (await served.call()).status_code == 503
        response = await served.http.get("/healthz")
    assert response.status_code == 503
    assert response.json() == {
        "status": "unhealthy",
        "reason": "answers can't be read any more: the disk is full",
    }


async def test_a_process_that_can_read_no_control_messages_is_unhealthy() -> None:
    async with serving(Greet) as served, watching() as (health, http):
        assert served.hosted is not None
        health.watch(served.hosted, served.broker, served.caller)
        assert (await http.get("/healthz")).status_code == 200
        reader = served.caller.control._reader
        assert isinstance(reader, MemoryReader)
        reader.fail(BrokerError("the disk is full"))
        with pytest.raises(BrokerError):
            await served.caller.control.failed()
        for client in (http, served.http):
            response = await client.get("/healthz")
            assert response.status_code == 503
            assert response.json()["reason"] == "the control topic can't be read any more: the disk is full"


async def test_a_worker_is_well_while_it_starts_and_ready_once_it_has(stuck: list[str]) -> None:
    async with serving(Greet) as served, watching() as (health, http):
        assert served.hosted is not None
        assert (await http.get("/healthz")).json() == {"status": "ok"}
        assert (await http.get("/readyz")).status_code == 503
        health.watch(served.hosted, served.broker, served.caller)
        assert (await http.get("/readyz")).json() == {"status": "ok"}
        stuck.append("no fetch for 60 s")
        response = await http.get("/healthz")
        assert (response.status_code, response.json()["reason"]) == (503, "no fetch for 60 s")
        health.leave()
        assert (await http.get("/readyz")).json() == {"status": "not ready"}


async def test_a_worker_that_is_ending_is_not_ill() -> None:
    async with serving(Greet) as served, watching() as (health, http):
        assert served.hosted is not None
        health.watch(served.hosted, served.broker, served.caller)
        health.leave()
        await served.hosted.drain()
        await served.caller.close()
        assert (await http.get("/healthz")).json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ("ill", "Ailing.is_healthy said no"),
        ("raising", "Ailing.is_healthy raised RuntimeError"),
        ("hanging", "Ailing.is_healthy did not answer within 0.05 s"),
    ],
)
async def test_a_chainlet_that_is_not_healthy_is_named(
    state: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "HEALTHY_WITHIN", 0.05)
    async with serving(Ailing) as served, watching() as (health, http):
        assert served.hosted is not None
        health.watch(served.hosted, served.broker, served.caller)
        assert (await http.get("/healthz")).json() == {"status": "ok"}
        monkeypatch.setattr(Ailing, "state", state)
        response = await http.get("/healthz")
        assert response.status_code == 503
        assert response.json() == {"status": "unhealthy", "reason": reason}
        monkeypatch.undo()


async def test_a_check_that_blocks_keeps_nothing_else_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stuck, "asked", 0)
    monkeypatch.setattr(Stuck, "released", threading.Event())
    async with serving(Stuck) as served, watching() as (health, http):
        assert served.hosted is not None
        health.watch(served.hosted, served.broker, served.caller)
        monkeypatch.setattr(probes, "HEALTHY_WITHIN", 0.1)
        for _ in range(3):
            response = await http.get("/healthz")
            assert response.status_code == 503
            assert response.json()["reason"] == "Stuck.is_healthy did not answer within 0.1 s"
        assert Stuck.asked == 1  # and there is one thread that waits
        monkeypatch.setattr(probes, "HEALTHY_WITHIN", WAIT)
        probe = asyncio.ensure_future(http.get("/healthz"))
        for _ in range(5):
            assert (await http.get("/readyz")).status_code == 200
        assert not probe.done()
        Stuck.released.set()
        assert (await probe).json() == {"status": "ok"}
        assert Stuck.asked == 2


async def test_all_chainlets_are_asked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "HEALTHY_WITHIN", 1.0)
    async with serving(Top) as served, watching() as (health, http):
        assert served.hosted is not None
        health.watch(served.hosted, served.broker, served.caller)
        monkeypatch.setattr(Ailing, "state", "hanging")
        began = time.monotonic()
        response = await http.get("/healthz")
        assert 0.9 < time.monotonic() - began < 1.8
    late = "is_healthy did not answer within 1 s"
    assert response.json()["reason"] == f"Ailing.{late}; Top.{late}"
