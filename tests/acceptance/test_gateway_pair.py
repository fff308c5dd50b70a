"""Two gateways of one Chain on Kafka: what one has begun the other goes on with, also when the first is killed."""

import asyncio
import json
import signal
import subprocess
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

import httpx
import pytest

from tests.acceptance.command import DEADLINE, HERE, Command, Commands

FILE = str(HERE / "chains" / "pair.py")
STREAMS = 50
WORDS = 1_500  # more than are on their way to a reader: a worker waits for one, and goes on for the next

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(180)]

Pair = tuple[Command, str, str]  # the first gateway, and the URLs of both


@pytest.fixture
def pair(start: Commands, kafka_url: str, namespace: str) -> Pair:
    common = ("--broker", kafka_url, "--namespace", namespace)
    worker = start("worker", FILE, *common)
    first, second = [start("gateway", FILE, "--port", "0", *common) for _ in range(2)]
    worker.ready()
    return first, first.ready(), second.ready()


class Reader:
    """Reads one stream of events, and goes on with it elsewhere when it breaks off."""

    def __init__(self, http: httpx.AsyncClient, name: str) -> None:
        self.words: list[str] = []
        self.done: dict[str, int] | None = None
        self.reading = asyncio.Event()
        self._http = http
        self._name = name
        self._id = ""

    @property
    def whole(self) -> bool:
        return self.words == [f"{self._name} {number}\n" for number in range(WORDS)] and self.done == {"chunks": WORDS}

    async def begin(self, url: str) -> None:
        body = {"name": self._name, "words": WORDS, "pause": 0.02}
        headers = {"accept": "text/event-stream"}
        async with self._http.stream("POST", f"{url}/run_remote", json=body, headers=headers) as answer:
            self._id = answer.headers["x-request-id"]
            with suppress(httpx.TransportError):
                await self._read(answer)

    async def go_on(self, url: str) -> None:
        headers = {"last-event-id": str(len(self.words) - 1)} if self.words else {}
        path = f"{url}/async_request/{self._id}/events"
        async with self._http.stream("GET", path, headers=headers) as answer:
            answer.raise_for_status()
            await self._read(answer)

    async def _read(self, answer: httpx.Response) -> None:
        async with aclosing(events(answer)) as found:
            async for kind, number, data in found:
                if kind == "done":
                    self.done = json.loads(data)
                    return
                assert kind == "message", data
                assert number == len(self.words), "each once, in order"
                self.words.append(json.loads(data))
                if len(self.words) == WORDS // 10:
                    self.reading.set()


async def events(answer: httpx.Response) -> AsyncGenerator[tuple[str, int, str], None]:
    kind, number, data = "message", -1, ""
    async for line in answer.aiter_lines():
        name, _, value = line.partition(": ")
        match name:
            case "event":
                kind = value
            case "id":
                number = int(value)
            case "data":
                data = value
            case "" if data:
                yield kind, number, data
                kind, number, data = "message", -1, ""


async def kill_amid_streams(first: Command, url: str, other: str) -> list[Reader]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=DEADLINE, limits=limits, trust_env=False) as http:
        readers = [Reader(http, f"r{number}") for number in range(STREAMS)]
        async with asyncio.TaskGroup() as beginning:
            for reader in readers:
                beginning.create_task(reader.begin(url))
            await asyncio.gather(*(reader.reading.wait() for reader in readers))
            first.send(signal.SIGKILL)
        assert all(reader.done is None for reader in readers), "it was killed amid them all"
        await asyncio.gather(*(reader.go_on(other) for reader in readers))
        return readers


def test_a_gateway_that_is_killed_loses_no_stream(pair: Pair) -> None:
    first, url, other = pair
    readers = asyncio.run(kill_amid_streams(first, url, other))
    assert [reader._name for reader in readers if not reader.whole] == []


def curl(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = ["curl", "-sS", "-N", "--max-time", "60", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=DEADLINE)


def test_with_curl(pair: Pair) -> None:
    _, url, other = pair
    body = json.dumps({"name": "c", "words": 3})
    made = curl("-i", f"{url}/run_remote", "--json", body)
    head, _, text = made.stdout.partition("\n\n" if "\n\n" in made.stdout else "\r\n\r\n")
    request_id = next(line.split(": ")[1].strip() for line in head.splitlines() if line.startswith("x-request-id"))
    assert text == "c 0\nc 1\nc 2\n"
    again = curl("-H", "Last-Event-ID: 1", f"{other}/async_request/{request_id}/events")
    assert again.stdout == 'retry: 1000\n\nid: 2\ndata: "c 2\\n"\n\nevent: done\ndata: {"chunks":3}\n\n'
    accepted = json.loads(curl(f"{url}/async_run_remote", "--json", body).stdout)
    report = curl("-H", "Prefer: wait=20", f"{other}/async_request/{accepted['request_id']}").stdout
    assert json.loads(report)["result"] == ["c 0\n", "c 1\n", "c 2\n"]
    endless = json.loads(curl(f"{url}/async_run_remote", "--json", json.dumps({"name": "e", "words": 10**9})).stdout)
    gone = curl("-X", "DELETE", f"{other}/async_request/{endless['request_id']}").stdout
    assert json.loads(gone)["status"] == "CANCELED"
