"""Streams over HTTP: their three forms, how each tells an end from a break, slow readers, and clients that leave."""

import asyncio
import base64
import gc
import json
import logging
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any, NamedTuple

import httpx
import msgspec
import pytest

from chains_stream.calls import Call
from chains_stream.control import Cancel, Message
from chains_stream.gateway import streaming
from chains_stream.messages import Chunk, Done
from tests.sample import Counting, Leaf, Relay, Seen
from tests.serving import (
    Pause,
    Pieces,
    RequestLog,
    Say,
    SayParts,
    Served,
    Slow,
    problem_of,
    request_log,
    serving,
)

EVENTS, LINES = "text/event-stream", "application/x-ndjson"
ODD = ["two\nlines\r\n", "", "Zoë 🌍", "\u2028 \u2029 \x85 \x00 \x1e", "data: x\n\nevent: done\n", '"quoted" \\']


@pytest.fixture(autouse=True)
def nothing_seen() -> Iterator[None]:
    Seen.reset()
    yield
    Seen.reset()


@pytest.fixture
def log() -> Iterator[RequestLog]:
    with request_log() as handler:
        yield handler


@pytest.fixture
async def say() -> AsyncIterator[Served]:
    async with serving(Say) as served:
        yield served


@pytest.fixture
async def relay() -> AsyncIterator[Served]:
    async with serving(Relay) as served:
        yield served


@pytest.fixture
async def pause() -> AsyncIterator[Served]:
    async with serving(Pause) as served:
        yield served


class Event(NamedTuple):
    event: str
    id: str
    data: Any


def events_of(text: str) -> list[Event]:
    """Read server-sent events, strictly: a line is a comment, or a field that we use."""
    found = []
    blocks = text.split("\n\n")
    assert blocks.pop() == "", "the last event is whole"
    for block in blocks:
        lines = [line for line in block.split("\n") if not line.startswith(":")]
        fields = dict(line.split(": ", 1) for line in lines)
        assert len(fields) == len(lines)
        assert fields.keys() <= {"id", "event", "data", "retry"}
        if "data" in fields:
            found.append(Event(fields.get("event", "message"), fields.get("id", ""), json.loads(fields["data"])))
    return found


# --- the forms


@pytest.mark.parametrize(
    ("entrypoint", "accept", "content_type"),
    [
        (Say, None, "text/plain; charset=utf-8"),
        (Say, "text/html, */*;q=0.8", "text/plain; charset=utf-8"),
        (Say, "application/json", "text/plain; charset=utf-8"),
        (Say, EVENTS, EVENTS),
        (Say, f"text/plain;q=0.5, {LINES}", LINES),
        (Pieces, None, "application/octet-stream"),
        (Pieces, EVENTS, EVENTS),
        (SayParts, None, LINES),
        (SayParts, "application/json", LINES),
        (SayParts, EVENTS, EVENTS),
    ],
)
async def test_the_form_is_what_the_client_accepts(
    entrypoint: type[Any], accept: str | None, content_type: str
) -> None:
    arguments = (
        {"texts": []} if entrypoint is Say else {"parts": []} if entrypoint is SayParts else {"data": "", "size": 1}
    )
    async with serving(entrypoint) as served:
        headers = {"accept": accept} if accept else {}
        response = await served.http.post("/run_remote", json=arguments, headers=headers)
    assert (response.status_code, response.headers["content-type"]) == (200, content_type)
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-request-id"]


async def test_nothing_acceptable() -> None:
    async with serving(SayParts) as served:
        problem = problem_of(await served.call("text/plain", parts=[]), 406)
        assert problem["offered"] == [LINES, EVENTS]
        assert all(kind in problem["detail"] for kind in problem["offered"])
    async with serving(Leaf) as served:
        problem = problem_of(await served.call(EVENTS, item={"name": "a"}), 406)
        assert problem["offered"] == ["application/json"]


async def test_events(say: Served) -> None:
    response = await say.call(EVENTS, texts=ODD)
    assert response.text.startswith("retry: 1000\n\n")
    events = events_of(response.text)
    assert events[:-1] == [Event("message", str(number), text) for number, text in enumerate(ODD)]
    assert events[-1] == Event("done", "", {"chunks": len(ODD)})
    # So that clients that split lines as Unicode does read the same.
    assert len(response.text.splitlines()) == len(response.text.split("\n")) - 1


async def test_lines(say: Served) -> None:
    response = await say.call(LINES, texts=ODD)
    assert [json.loads(line) for line in response.text.splitlines()] == ODD
    assert response.text.endswith("\n")


async def test_raw_text(say: Served) -> None:
    response = await say.call(texts=ODD)
    assert response.content == "".join(ODD).encode()


async def test_raw_bytes_may_be_cut_within_a_character() -> None:
    data = "Zoë 🌍 naïve".encode()
    async with serving(Pieces) as served, served.connect() as client:
        await client.send({"data": _base64(data), "size": 1}, "connection: close")
        head, _, body = (await client.read_all()).partition(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in head.lower()
    assert _unchunked(body) == data


async def test_structs_are_lines() -> None:
    parts = [{"text": "a\nb", "number": 1}, {"text": "", "number": None}]
    async with serving(SayParts) as served:
        response = await served.call(parts=parts)
    assert [json.loads(line) for line in response.text.splitlines()] == parts


@pytest.mark.parametrize(
    ("accept", "text"), [(EVENTS, 'event: done\ndata: {"chunks":0}\n\n'), (LINES, ""), ("*/*", "")]
)
async def test_an_empty_stream(say: Served, accept: str, text: str) -> None:
    response = await say.call(accept, texts=[])
    assert (response.status_code, response.text.removeprefix("retry: 1000\n\n")) == (200, text)


@pytest.mark.parametrize("accept", ["text/plain", EVENTS, LINES])
async def test_many_long_streams_at_once_are_whole_and_in_order(relay: Served, accept: str) -> None:
    async def read(upto: int) -> list[str]:
        text = (await relay.call(accept, upto=upto)).text
        match accept:
            case "text/event-stream":
                events = events_of(text)
                assert [event.id for event in events[:-1]] == [str(number) for number in range(upto)]
                assert events.pop() == Event("done", "", {"chunks": upto})
                return [event.data for event in events]
            case "application/x-ndjson":
                return [json.loads(line) for line in text.splitlines()]
            case _:
                return [f"{part};" for part in text.split(";")[:-1]]

    streams = await asyncio.gather(*(read(1_000 + number) for number in range(8)))
    assert streams == [[f"{item};" for item in range(1_000 + number)] for number in range(8)]


@pytest.mark.parametrize("accept", ["text/plain", EVENTS, LINES])
async def test_the_first_chunk_goes_out_at_once(pause: Served, accept: str) -> None:
    async with pause.http.stream("POST", "/run_remote", json={"name": "n"}, headers={"accept": accept}) as response:
        parts = response.aiter_text()
        got = await anext(parts)
        while "first" not in got:
            got += await anext(parts)
        assert "last" not in got
        Seen.note("go")
        got += "".join([part async for part in parts])
    assert "last" in got


async def test_a_comment_keeps_a_silent_stream_open(pause: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "HEARTBEAT", 0.02)
    async with pause.connect() as client:
        await client.send({"name": "n"}, f"accept: {EVENTS}", "connection: close")
        text = b""
        while text.count(b"\n:\n\n") < 3:
            text += await client.read_until(b"\n\n")
        Seen.note("go")
        text += await client.read_all()
    text = _unchunked(text.partition(b"\r\n\r\n")[2])
    events = events_of(text.decode())
    assert [event.data for event in events] == ["first\n", "last\n", {"chunks": 2}]


class Fed:
    """Answers with a call that a test feeds, as if a worker did."""

    def __init__(self, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: asyncio.Queue[Call] = asyncio.Queue()
        self._open = served.caller.open
        monkeypatch.setattr(served.caller, "open", self.open)

    async def open(self, *arguments: Any, **options: Any) -> Call:
        call = await self._open(*arguments, **options)
        self.calls.put_nowait(call)
        return call


def feed(call: Call, values: list[Any], first: int = 0, *, end: bool = True) -> None:
    """Feed chunks to a call, all at once."""
    for sequence, value in enumerate(values, first):
        call.feed(Chunk(call.id, 1, sequence, msgspec.Raw(msgspec.msgpack.encode(value))))
    if end:
        call.feed(Done(call.id, 1, first + len(values), msgspec.Raw(b"\xc0")))


@pytest.mark.parametrize(
    ("accept", "part"),
    [("text/plain", b"first\nnext\nlast\n"), (LINES, b'"first\\n"\n"next\\n"\n"last\\n"\n'), (EVENTS, b"id: 0\n")],
)
async def test_chunks_that_are_there_at_once_are_one_write(
    accept: str, part: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(Say, workers=False) as served, served.connect() as client:
        fed = Fed(served, monkeypatch)
        await client.send({"texts": []}, f"accept: {accept}", "connection: close")
        feed(await fed.calls.get(), ["first\n", "next\n", "last\n"])
        body = (await client.read_all()).partition(b"\r\n\r\n")[2]
    size, _, rest = body.partition(b"\r\n")
    piece = rest[: int(size, 16)]
    assert part in piece
    assert piece.count(b"first") == piece.count(b"next") == piece.count(b"last") == 1


@pytest.mark.parametrize("accept", ["text/plain", EVENTS, LINES])
async def test_what_comes_before_a_wrong_chunk_is_written(accept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(Say, workers=False) as served, served.connect() as client:
        fed = Fed(served, monkeypatch)
        await client.send({"texts": []}, f"accept: {accept}", "connection: close")
        feed(await fed.calls.get(), ["good", 7, "behind"])
        answer = await client.read_all()
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"good" in answer
    assert b"behind" not in answer
    assert (b"invalid-result" in answer) is (accept != "text/plain")
    assert answer.endswith(b"0\r\n\r\n") is (accept != "text/plain")  # raw ends in a break


async def test_a_wrong_first_chunk_has_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(Say, workers=False) as served, served.connect() as client:
        fed = Fed(served, monkeypatch)
        await client.send({"texts": []}, f"accept: {EVENTS}", "connection: close")
        feed(await fed.calls.get(), [7, "behind"])
        assert (await client.read_all()).startswith(b"HTTP/1.1 500 ")


async def test_a_large_bunch_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{number}:" + "x" * 1_000 for number in range(500)]
    async with serving(Say, workers=False) as served:
        fed = Fed(served, monkeypatch)
        answer = asyncio.ensure_future(served.call(EVENTS, texts=[]))
        feed(await fed.calls.get(), texts)
        events = events_of((await answer).text)
    assert [event.data for event in events[:-1]] == texts
    assert [event.id for event in events[:-1]] == [str(number) for number in range(500)]


async def test_an_idle_stream_costs_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 200
    async with AsyncExitStack() as stack:
        served = await stack.enter_async_context(serving(Say, workers=False))
        fed = Fed(served, monkeypatch)

        async def open_one() -> None:
            client = await stack.enter_async_context(served.connect())
            headers = [f"x-header-{number}: {'x' * 100}" for number in range(20)]
            await client.send({"texts": []}, f"accept: {EVENTS}", *headers)
            feed(await fed.calls.get(), ["first"], end=False)
            await client.read_until(b"first")

        for _ in range(20):
            await open_one()
        tracemalloc.start()
        try:
            for _ in range(count):
                await open_one()
            gc.collect()
            snapshot = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, "*/chains_stream/*")])
        finally:
            tracemalloc.stop()
    # With what the embedded broker keeps of a request.
    assert sum(trace.size for trace in snapshot.traces) / count < 9_000


# --- failures


@pytest.mark.parametrize("accept", ["text/plain", EVENTS, LINES])
async def test_a_failure_before_the_first_chunk_has_its_status(say: Served, accept: str) -> None:
    problem = problem_of(await say.call(accept, texts=[], fail="nothing came"), 500)
    assert problem["detail"] == "nothing came"
    problem_of(await say.call(accept, texts=[1]), 400)


async def test_events_end_with_the_problem(say: Served) -> None:
    response = await say.call(EVENTS, texts=["a", "b"], fail="broke\noff")
    *chunks, last = events_of(response.text)
    assert [event.data for event in chunks] == ["a", "b"]
    assert last.event == "error"
    assert (last.data["status"], last.data["detail"]) == (500, "broke\noff")
    assert last.data["request_id"] == response.headers["x-request-id"]
    assert last.data["error"]["hops"][0][0] == "Say"


async def test_lines_end_with_the_problem() -> None:
    async with serving(SayParts) as served:
        response = await served.call(parts=[{"text": "a"}], fail="broke\u2028off")
    *chunks, last = [json.loads(line) for line in response.text.splitlines()]
    assert chunks == [{"text": "a", "number": None}]
    assert last["error"]["detail"] == "broke\u2028off"
    assert last["error"]["error"]["exception_cls_name"] == "ValueError"


async def test_raw_breaks_the_connection_after_all_its_chunks(
    say: Served, log: RequestLog, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [f"{number}," * 100 for number in range(200)]
    got = b""
    async with say.http.stream("POST", "/run_remote", json={"texts": texts, "fail": "broke off"}) as response:
        assert response.status_code == 200
        with pytest.raises(httpx.RemoteProtocolError, match="incomplete chunked read"):
            async for part in response.aiter_raw():
                got += part
    assert got.decode() == "".join(texts)
    (line,) = await log.wait()
    assert (line["status"], line["error"]) == (200, "remote")
    assert not [
        record for record in caplog.records if record.exc_info or record.name.startswith(("uvicorn", "asyncio"))
    ]


async def test_raw_resets_a_connection_whose_close_would_be_an_end(say: Served) -> None:
    """HTTP/1.0 has no chunks: its answers end with the connection."""
    async with say.connect() as client:
        await client.send({"texts": ["whole"]}, version="1.0")
        assert (await client.read_all()).endswith(b"\r\n\r\nwhole")
    async with say.connect() as client:
        await client.send({"texts": ["part"], "fail": "broke off"}, version="1.0")
        with pytest.raises(ConnectionResetError):
            await client.read_all()


async def test_the_deadline_in_the_middle_of_a_stream(pause: Served) -> None:
    response = await pause.http.post(
        "/run_remote", json={"name": "late"}, headers={"accept": EVENTS, "x-request-timeout": "0.3"}
    )
    first, last = events_of(response.text)
    assert first.data == "first\n"
    assert (last.event, last.data["status"], last.data["code"]) == ("error", 504, "deadline-exceeded")
    await Seen.until("late closed")


# --- clients that leave


async def test_a_client_that_leaves_a_unary_call_stops_it(log: RequestLog, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(Leaf) as served:
        async with served.connect() as client:
            await client.send({"item": {"name": "left"}, "mode": "hang"})
            await Seen.until("left began")
        await Seen.until("left stopped")
        (line,) = await log.wait()
        assert (line["status"], line["route"]) == (499, "/run_remote")
        assert (await served.call(item={"name": "next"})).status_code == 200
    assert not [record for record in caplog.records if record.exc_info or record.levelno > logging.INFO]


def is_cancel(value: bytes) -> bool:
    return isinstance(msgspec.msgpack.decode(value, type=Message), Cancel)


async def test_a_client_that_leaves_the_queue_is_not_served() -> None:
    async with serving(Slow, partitions=1) as served:
        requests = await served.follow(served.topic)
        cancellations = await served.follow(f"{served.settings.namespace}.control")
        first = asyncio.ensure_future(served.call(name="first"))
        await Seen.until("first began")
        await requests.fetch()
        async with served.connect() as client:
            await client.send({"name": "queued"})
            await requests.fetch()
        while not any(is_cancel(record.value) for record in await cancellations.fetch()):
            pass  # a report of the worker's load
        Seen.note("go")
        assert (await first).json() == "first"
        assert (await served.call(name="behind")).json() == "behind"
    assert Seen.counts["queued began"] == 0


@pytest.mark.parametrize("accept", ["text/plain", EVENTS, LINES])
async def test_a_client_that_leaves_a_stream_stops_its_generator(relay: Served, accept: str) -> None:
    async with relay.connect() as client:
        await client.send({"upto": 1_000_000_000, "name": "endless"}, f"accept: {accept}")
        await client.read_until(b"99;")
    await Seen.until("endless closed")


async def test_a_client_that_leaves_a_silent_stream_stops_it(pause: Served) -> None:
    async with pause.connect() as client:
        await client.send({"name": "silent"})
        await client.read_until(b"first")
        await Seen.until("silent waits")
    await Seen.until("silent closed")


async def test_a_slow_reader_holds_its_stream_back_and_no_other() -> None:
    size, window = 64 << 10, 4
    async with serving(Pieces, stream_window=window) as served, served.connect() as client:
        endless: dict[str, Any] = {"data": _base64(b"x" * size), "size": size, "repeat": 1_000_000}
        await client.send({**endless, "name": "held back"})
        await client.read_until(b"x")
        # Others run to their end meanwhile, so time enough has passed for the endless one to overrun.
        for _ in range(5):
            response = await served.call(**{**endless, "repeat": 40})
            assert len(response.content) == 40 * size
        produced = Seen.counts["held back"]
        # What fits into the sockets of both sides, the outbox, the window, and the broker's hands.
        assert produced * size < 16 << 20
        taken = 0
        while taken < 20 << 20:
            taken += len(await client.reader.read(1 << 20))
        assert Seen.counts["held back"] > produced
        await client.leave()
        await Seen.until("held back closed")


async def test_a_reader_that_takes_nothing_is_cut_off_after_its_deadline(log: RequestLog) -> None:
    size = 64 << 10
    async with serving(Pieces) as served, served.connect() as client:
        arguments = {"data": _base64(b"x" * size), "size": size, "repeat": 1_000_000, "name": "stuck"}
        await client.send(arguments, f"accept: {EVENTS}", "x-request-timeout: 0.5")
        (line,) = await log.wait()
        with pytest.raises(ConnectionResetError):
            await client.read_all()
    assert (line["status"], line["error"]) == (200, "deadline-exceeded")
    assert line["duration_ms"] < 5_000


async def test_int_chunks_count() -> None:
    async with serving(Counting) as served:
        assert (await served.call(upto=3)).text == "0\n1\n2\n"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _unchunked(body: bytes) -> bytes:
    """Undo the chunked transfer coding."""
    data = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        if int(size, 16) == 0:
            assert body == b"\r\n"
            return data
        data, body = data + body[: int(size, 16)], body[int(size, 16) + 2 :]
    raise AssertionError("the body has no end")
