"""What a connection does when its client leaves, sends ahead, or does not read."""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from chains_stream.gateway import connection
from chains_stream.gateway.exchange import OWN_REQUEST
from chains_stream.gateway.server import Server
from tests.sample import Seen
from tests.serving import WAIT, Pause, RawClient, RequestLog, Slow, request_log, serving

JSON = "content-type: application/json"


@pytest.fixture(autouse=True)
def nothing_seen() -> Iterator[None]:
    Seen.reset()
    yield
    Seen.reset()


@pytest.fixture
def log() -> Iterator[RequestLog]:
    with request_log() as handler:
        yield handler


def post(body: bytes, *headers: str, version: str = "1.1", path: str = "/run_remote") -> bytes:
    lines = [f"POST {path} HTTP/{version}", "host: t", JSON, f"content-length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


@asynccontextmanager
async def running(app: ASGIApp) -> AsyncIterator[Server]:
    server = Server("127.0.0.1", 0, 1.0)
    await server.start(app)
    try:
        yield server
    finally:
        await server.stop()


# --- clients that leave


async def test_who_leaves_while_it_has_sent_ahead_stops_its_call() -> None:
    async with serving(Pause) as served, served.connect() as client:
        await client.send_raw(post(b'{"name":"A","then":"never"}') + post(b'{"name":"B","then":"never"}'))
        await Seen.until("A waits")
        await client.leave()
        await Seen.until("A closed")
        assert (await served.call(name="C", then="C waits")).text == "first\nlast\n"
    assert Seen.counts["B waits"] == 0


async def test_who_shuts_its_sending_side_down_has_left() -> None:
    async with serving(Pause) as served, served.connect() as client:
        await client.send({"name": "A", "then": "never"})
        await Seen.until("A waits")
        client.writer.write_eof()
        await Seen.until("A closed")
        assert (await client.read_all()).endswith(b"first\n\r\n")


async def test_what_was_sent_ahead_is_not_begun_for_who_has_left(log: RequestLog) -> None:
    """Here the leaving is only noticed by the answer: so much was sent ahead that no more is read."""
    async with serving(Slow) as served, served.connect() as client:
        await client.send_raw(post(b'{"name":"A"}') + post(b'{"name":"B"%b}' % (b" " * 400_000)))
        await Seen.until("A began")
        client.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        await client.leave()
        Seen.note("go")
        await log.wait(1)
        assert (await served.call(name="C")).json() == "C"  # one at a time: B would have come before
    assert Seen.counts["B began"] == 0
    assert len(log.lines) == 2


async def test_a_request_whose_client_has_left_has_no_body() -> None:
    seen: list[object] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope[OWN_REQUEST].on_leave = lambda: Seen.note("gone")
        Seen.note("began")
        await Seen.until("gone")
        seen.append(scope[OWN_REQUEST].whole_body())
        seen.append((await receive())["type"])
        Seen.note("ended")

    async with running(app) as server, RawClient(server.url) as client:
        await client.send_raw(post(b"{}"))
        await Seen.until("began")
        await client.leave()
        await Seen.until("ended")
    assert seen == [None, "http.disconnect"]


@pytest.mark.parametrize("at_once", [False, True])
async def test_there_is_nothing_to_break_off_once_the_client_has_left(*, at_once: bool) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope[OWN_REQUEST].on_leave = lambda: Seen.note("gone")
        Seen.note("began")
        await Seen.until("gone")
        await asyncio.sleep(0)  # until the socket is closed, behind what noted it
        scope[OWN_REQUEST].break_off(at_once=at_once)
        Seen.note("ended")

    async with running(app) as server, RawClient(server.url) as client:
        await client.send_raw(post(b"{}", version="1.0"))
        await Seen.until("began")
        await client.leave()
        await Seen.until("ended", seconds=2.0)


# --- how much is taken


async def test_a_read_may_end_behind_the_line_of_a_chunk() -> None:
    """It begins behind one too, and is larger than a head may be."""
    received: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        Seen.note("began")
        more, size = True, 0
        while more:
            message = await receive()
            more, size = message["more_body"], size + len(message["body"])
            Seen.note(f"{size}")
        received.append(size)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    chunk = b"a" * 70_000
    async with running(app) as server, RawClient(server.url) as client:
        await client.send_raw(b"POST / HTTP/1.1\r\nhost: t\r\ntransfer-encoding: chunked\r\n\r\n11170\r\n")
        await Seen.until("began")
        for number in (1, 2, 3):
            await client.send_raw(chunk + b"\r\n11170\r\n")
            await Seen.until(f"{70_000 * number}")
        await client.send_raw(chunk + b"\r\n0\r\n\r\n")
        assert (await client.read_answer()).startswith(b"HTTP/1.1 200 ")
    assert received == [280_000]


# --- who asks before it sends its body


@pytest.mark.parametrize(
    ("status", "request_"),
    [
        (404, post(b"", "expect: 100-continue", path="/nowhere")),
        (405, post(b"", "expect: 100-continue", path="/healthz")),
        (406, post(b"", "expect: 100-continue", "accept: image/png")),
        (415, post(b"", "expect: 100-continue").replace(b"application/json", b"text/plain")),
    ],
)
async def test_who_is_refused_before_it_sends_its_body_begins_anew(status: int, request_: bytes) -> None:
    """What it sends next could be the body or another request."""
    async with serving(Pause) as served, served.connect() as client:
        await client.send_raw(request_.replace(b"content-length: 0", b"content-length: 400"))
        answer = await client.read_all()
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert b"\r\nconnection: close\r\n" in answer


async def test_an_older_client_is_not_told_to_go_on() -> None:
    """HTTP/1.0 has no answer that another one follows."""
    body = b'{"name":"old","then":"old waits"}'
    async with serving(Pause) as served, served.connect() as client:
        head, _, content = post(body, "expect: 100-continue", version="1.0").partition(b"\r\n\r\n")
        await client.send_raw(head + b"\r\n\r\n")
        await client.send_raw(content)
        answer = await client.read_all()
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b"first\nlast\n")


# --- when the server stops


async def test_what_is_sent_ahead_of_a_server_that_stops_is_not_begun(log: RequestLog) -> None:
    async with serving(Slow) as served, served.connect() as client, served.connect() as other:
        await client.send({"name": "A"})
        await Seen.until("A began")
        head, _, body = post(b'{"name":"B"}', "expect: 100-continue").rpartition(b"\r\n\r\n")
        await other.send_raw(head + b"\r\n\r\n")
        await other.read_until(b" 100 Continue\r\n\r\n")
        stopping = asyncio.ensure_future(served.server.stop())
        await asyncio.wait([stopping], timeout=0)
        await client.send_raw(post(b'{"name":"late"}'))
        await other.send_raw(body + post(b'{"name":"late"}'))
        Seen.note("go")
        for client_, name in ((client, b"A"), (other, b"B")):
            answer = await client_.read_all()
            assert answer.count(b"HTTP/1.1 ") == 1
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert b"\r\nconnection: close\r\n" in answer
            assert answer.endswith(b'"%b"' % name)
        await stopping
    assert Seen.counts["late began"] == 0
    assert len(log.lines) == 2


# --- who does not read


@pytest.mark.parametrize("keeps_alive", [False, True])
async def test_who_does_not_take_an_answer_is_dropped_whatever_the_app(
    monkeypatch: pytest.MonkeyPatch, *, keeps_alive: bool
) -> None:
    for name in ("SWEEP", "KEEP_ALIVE", "TAKEN_WITHIN"):
        monkeypatch.setattr(connection, name, 0.1)
    app = PlainTextResponse(b"a" * 8_000_000)
    headers = () if keeps_alive else ("connection: close",)
    async with running(app) as server, RawClient(server.url) as client:
        await client.send_raw(post(b"", *headers))
        await client.read_until(b"\r\n\r\n")
        assert server._listener is not None
        async with asyncio.timeout(WAIT):
            await server._listener.idle()
        assert len(await client.read_all()) < 8_000_000


async def test_who_still_sends_can_read_why_it_is_refused() -> None:
    async with serving(Pause, max_body_bytes=1_000) as served, served.connect() as client:
        await client.send_raw(post(b"").replace(b"content-length: 0", b"content-length: 9000000"))
        head = await client.read_until(b"\r\n\r\n")
        for _ in range(20):  # at a closed socket this would be a reset
            await client.send_raw(b"a" * 100_000)
        assert (await client.read_all()).endswith(b"}")
    assert head.startswith(b"HTTP/1.1 413 ")
