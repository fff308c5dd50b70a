"""A Chain that talks, served by the command: in one process, as its author would, and in many on Kafka."""

import asyncio
import contextlib
import signal
from pathlib import Path

import msgspec
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.acceptance.command import DEADLINE, HERE, Commands, chains

COUNT = str(HERE.parents[1] / "chainlets" / "websocket_count.py")


def talk(url: str, query: str = "") -> connect:
    return connect(f"ws{url.removeprefix('http')}/websocket{query}", proxy=None, open_timeout=DEADLINE)


async def ask(websocket: ClientConnection, text: str) -> dict[str, object]:
    await websocket.send(text)
    answer: dict[str, object] = msgspec.json.decode(await websocket.recv())
    return answer


async def count(url: str) -> None:
    async with asyncio.timeout(DEADLINE), talk(url, "?top=1") as websocket:
        assert await ask(websocket, "To be, or not") == {"words": 4, "most": {"to": 1}}
        assert await ask(websocket, "to be.") == {"words": 6, "most": {"to": 2}}
    async with asyncio.timeout(DEADLINE), talk(url, "?top=many") as websocket:
        with pytest.raises(ConnectionClosed) as closed:
            await websocket.recv()
        assert closed.value.rcvd is not None
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4400, "`top` should be a number")


def test_the_example_in_one_process(start: Commands) -> None:
    command = start("run", COUNT, "--port", "0")
    url = command.ready()
    assert f"websocat ws{url.removeprefix('http')}/websocket" in command.stdout.until(
        lambda line: "ws" in line, command
    )
    asyncio.run(count(url))
    assert command.stop() == 0


def test_a_stop_closes_what_is_open(start: Commands) -> None:
    command = start("run", COUNT, "--port", "0", variables={"CHAINS_GRACE_PERIOD": "0.5"})
    url = command.ready()

    async def until_closed() -> int:
        async with asyncio.timeout(DEADLINE), talk(url) as websocket:
            await ask(websocket, "hello")
            command.send(signal.SIGTERM)
            await websocket.wait_closed()
            return websocket.close_code or 0

    assert asyncio.run(until_closed()) == 1001
    assert command.wait() == 0


def test_calling_it_says_how_it_is_called() -> None:
    done = chains("call", COUNT, "{}")
    assert (done.returncode, done.stdout) == (2, "")
    assert "open one at /websocket" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.kafka
@pytest.mark.timeout(180)
def test_many_processes_and_a_worker_that_is_killed(start: Commands, kafka_url: str, namespace: str) -> None:
    common = ("--broker", kafka_url, "--namespace", namespace)
    first = start("worker", COUNT, *common)
    gateway = start("gateway", COUNT, "--port", "0", *common)
    first.ready()
    url = gateway.ready()
    asyncio.run(count(url))

    async def lose_the_worker() -> tuple[int, dict[str, object]]:
        async with asyncio.timeout(3 * DEADLINE):
            async with talk(url) as websocket:
                await ask(websocket, "hello")
                first.send(signal.SIGKILL)
                second = start("worker", COUNT, *common)
                await asyncio.to_thread(second.ready)
                await websocket.wait_closed()
                code = websocket.close_code or 0
            async with talk(url) as websocket:
                return code, await ask(websocket, "again, again")

    code, answer = asyncio.run(lose_the_worker())
    assert code == 1012  # service restart: come again
    assert answer["words"] == 2


@pytest.mark.kafka
@pytest.mark.timeout(180)
def test_a_gateway_that_is_killed_costs_its_workers_nothing(
    start: Commands, kafka_url: str, namespace: str, tmp_path: Path
) -> None:
    """Its requests end, though nobody is left to say so."""
    file = tmp_path / "silent.py"
    file.write_text(SILENT, encoding="utf-8")
    common = ("--broker", kafka_url, "--namespace", namespace)
    worker = start("worker", str(file), *common)
    gateways = [start("gateway", str(file), "--port", "0", *common) for _ in range(2)]
    worker.ready()
    urls = [gateway.ready() for gateway in gateways]

    async def kill_one() -> str:
        async with asyncio.timeout(3 * DEADLINE):
            async with talk(urls[0]) as websocket:
                assert await websocket.recv() == "hello"
                gateways[0].send(signal.SIGKILL)
                await websocket.wait_closed()
            while True:  # there is one place, and it is free once the first has ended
                with contextlib.suppress(InvalidStatus, TimeoutError):
                    async with talk(urls[1]) as websocket:
                        return str(await websocket.recv())

    assert asyncio.run(kill_one()) == "hello"


SILENT = """\
import chains_stream as chains
from chains_stream import sessions

sessions.SILENCE = 3.0  # seconds, for a test
sessions.BEAT = 0.5

@chains.mark_entrypoint
class Silent(chains.ChainletBase):
    async def run_remote(self, websocket: chains.WebSocketProtocol) -> None:
        await websocket.send("hello")
        await websocket.receive()
"""
