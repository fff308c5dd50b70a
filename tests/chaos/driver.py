"""Steady load on two gateways, and what became of each request as its client saw it.

Requests arrive at random moments, whatever became of those before them (an open loop), each on a connection of its
own. Moments are Unix time: the processes under test run on this machine.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec

from tests.acceptance.chains.faults import item

Kind = Literal["unary", "stream", "resumable"]  # the last is a stream too, and nothing may break it off
KINDS: tuple[Kind, ...] = ("unary", "stream", "resumable")

DEADLINE = 60.0  # seconds that each request is given
PATIENCE = 5.0  # more, until a client stops waiting for an answer
LATE = "deadline-exceeded"


class Outcome(StrEnum):
    """How a request ended for its client. The last four must never be."""

    ANSWERED = "answered"
    FAILED = "failed"  # with an error that names itself
    RESET = "connection reset"
    REFUSED = "connection refused"
    LOST = "lost"  # no outcome before the deadline
    TWICE = "shown twice"  # a chunk that came before, or before its time
    WRONG = "wrong"
    TRUNCATED = "truncated"  # an end like any other, with chunks missing


@dataclass
class Request:
    """One request, and what its client saw: `failure` is the kind of its failure, None if it was answered."""

    id: str
    kind: Kind
    arguments: Mapping[str, Any]
    expected: int  # chunks, or 1
    sent: float = field(default_factory=time.time)
    ended: float = 0.0
    outcome: Outcome = Outcome.LOST
    code: str = ""
    chunks: int = 0
    detail: str = ""

    @property
    def delay(self) -> float:
        """Seconds beyond those that its work takes."""
        return self.ended - self.sent - float(self.arguments["ms"]) * self.expected / 1000

    @property
    def failure(self) -> str | None:
        if self.outcome is Outcome.ANSWERED:
            return None
        return self.code if self.outcome is Outcome.FAILED else self.outcome.value

    def end(self, outcome: Outcome, detail: str = "", code: str = "") -> None:
        self.outcome, self.detail, self.code = outcome, detail, code
        self.ended = time.time()

    def fail(self, problem: bytes) -> None:
        """End with a problem, which is JSON."""
        code = msgspec.json.decode(problem)["code"]
        self.end(Outcome.LOST if code == LATE else Outcome.FAILED, problem.decode()[:1000], code)


@dataclass(frozen=True)
class Load:
    """What is asked for: requests a second, and how much each is."""

    unary: float = 30.0
    streams: float = 4.0  # of which half are resumable
    chunks: tuple[int, int] = (20, 60)
    pause_ms: tuple[int, int] = (2, 20)  # before each chunk


class Driver:
    """Sends requests whose ids begin with `name`, to the gateway of each kind, until it is told to stop."""

    def __init__(self, name: str, urls: Mapping[Kind, str], load: Load, choice: random.Random) -> None:
        self.requests: list[Request] = []
        self._name = name
        self._urls = urls
        self._load = load
        # Of their own: nobody's choices depend on when others make theirs.
        self._choices = {kind: random.Random(choice.random()) for kind in KINDS}
        self._stopped = asyncio.Event()
        self._ended = asyncio.Condition()

    async def run(self) -> None:
        """Send until `stop`, and return when each request has an outcome."""
        streams = self._load.streams / 2
        rates: dict[Kind, float] = {"unary": self._load.unary, "stream": streams, "resumable": streams}
        async with asyncio.TaskGroup() as sending:
            for kind, rate in rates.items():
                sending.create_task(self._send_steadily(kind, rate, sending))

    def stop(self) -> None:
        self._stopped.set()

    async def answered_since(self, moment: float) -> None:
        """Wait until a request of each kind is answered that was sent after `moment`. Raises TimeoutError."""

        def holds() -> bool:
            since = {each.kind for each in self.requests if each.sent > moment and each.outcome is Outcome.ANSWERED}
            return len(since) == len(KINDS)

        async with asyncio.timeout(DEADLINE), self._ended:
            await self._ended.wait_for(holds)

    async def _send_steadily(self, kind: Kind, rate: float, sending: asyncio.TaskGroup) -> None:
        due = asyncio.get_running_loop().time()
        while not self._stopped.is_set():
            request = self._request(kind)
            self.requests.append(request)
            sending.create_task(self._send(request))
            due += self._choices[kind].expovariate(rate)
            try:
                async with asyncio.timeout_at(due):
                    await self._stopped.wait()
            except TimeoutError:
                continue

    def _request(self, kind: Kind) -> Request:
        name, choice = f"{self._name}-{kind}-{len(self.requests)}", self._choices[kind]
        if kind != "unary":
            chunks, ms = choice.randint(*self._load.chunks), choice.randint(*self._load.pause_ms)
            return Request(name, kind, {"request": name, "chunks": chunks, "ms": ms}, chunks)
        longest = choice.choices([20, 200, 2000], [50, 35, 15])[0]
        return Request(name, kind, {"request": name, "ms": choice.randint(1, longest)}, 1)

    async def _send(self, request: Request) -> None:
        try:
            async with asyncio.timeout(DEADLINE + PATIENCE):
                await _exchange(request, self._urls[request.kind])
        except TimeoutError:
            request.end(Outcome.LOST, "the client gave up")
        except ConnectionRefusedError as error:
            request.end(Outcome.REFUSED, str(error))
        except (OSError, EOFError) as error:
            request.end(Outcome.RESET, repr(error))
        async with self._ended:
            self._ended.notify_all()


async def _exchange(request: Request, url: str) -> None:
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        body = msgspec.json.encode(request.arguments)
        accept = "application/json" if request.kind == "unary" else "text/event-stream"
        head = (
            f"POST /run_remote HTTP/1.1\r\nhost: {parts.netloc}\r\naccept: {accept}\r\nconnection: close\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\nx-request-timeout: {DEADLINE:g}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        answer = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        if "transfer-encoding: chunked" in answer:
            await _read_stream(request, reader)
            return
        size = int(answer.partition("content-length: ")[2].partition("\r\n")[0])
        _read_answer(request, int(answer.split()[1]), await reader.readexactly(size))
    finally:
        writer.close()


def _read_answer(request: Request, status: int, body: bytes) -> None:
    if status != 200:
        request.fail(body)
    elif request.kind != "unary":
        request.end(Outcome.TRUNCATED, f"an empty answer: {body!r}")
    elif body != b"%d" % item(request.id, 0):
        request.end(Outcome.WRONG, f"the answer {body!r}")
    else:
        request.end(Outcome.ANSWERED)


async def _read_stream(request: Request, reader: asyncio.StreamReader) -> None:
    """Read server-sent events; the first one that tells the outcome is the last."""
    async for event in _events(reader):
        data = event.get("data", "")
        match event.get("event"):
            case "done":
                told = msgspec.json.decode(data)["chunks"]
                whole = told == request.chunks == request.expected
                request.end(Outcome.ANSWERED if whole else Outcome.TRUNCATED, "" if whole else f"done: {data}")
                return
            case "error":
                request.fail(data.encode())
                return
            case None if "id" in event:
                if (sequence := int(event["id"])) != request.chunks:
                    request.end(Outcome.TWICE, f"chunk {sequence} came after {request.chunks} chunks")
                    return
                if int(data) != item(request.id, sequence):
                    request.end(Outcome.WRONG, f"chunk {sequence} is {data}")
                    return
                request.chunks += 1
            case _:  # a comment, or how soon to connect again
                continue
    request.end(Outcome.TRUNCATED, "the body ended without `done` or `error`")


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, str]]:
    """Give the fields of each event, as soon as it is there."""
    pending = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        pending += (await reader.readexactly(size + 2))[:-2]
        *whole, pending = pending.split(b"\n\n")
        for event in whole:
            lines = (line.partition(": ") for line in event.decode().split("\n"))
            yield {name: value for name, _, value in lines}
    await reader.readexactly(2)
