"""HTTP itself: what is a request and what is none, how much of one is taken, and how answers are framed."""

import gc
import json
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from chains_stream.gateway import connection
from chains_stream.gateway.connection import MAX_AHEAD, MAX_HEAD
from chains_stream.gateway.exchange import Exchange
from chains_stream.gateway.request import Request
from chains_stream.gateway.server import Server
from chains_stream.gateway.streaming import Stream
from tests.sample import Seen
from tests.serving import Greet, RawClient, Say, Served, Slow, serving

JSON = "content-type: application/json"


@pytest.fixture(autouse=True)
def nothing_seen() -> Iterator[None]:
    Seen.reset()
    yield
    Seen.reset()


@pytest.fixture
async def greet() -> AsyncIterator[Served]:
    async with serving(Greet) as served:
        yield served


def post(*headers: str, body: bytes = b"", version: str = "1.1") -> bytes:
    return "\r\n".join([f"POST /run_remote HTTP/{version}", *headers, "", ""]).encode() + body


async def answer_to(served: Served, *parts: bytes) -> tuple[int, bytes, bytes]:
    """Send parts one by one, and give the status, the head and the body of all that comes until the connection ends."""
    async with served.connect() as client:
        for part in parts:
            await client.send_raw(part)
        head, _, body = (await client.read_all()).partition(b"\r\n\r\n")
    return int(head.split(b" ", 2)[1]), head, body


def names_of(answers: bytes) -> list[bytes]:
    return re.findall(rb'"Hello, (\w+)!"', answers)


# --- what is no request


@pytest.mark.parametrize(
    "request_",
    [
        post("host: t", JSON, "content-length: 2", "transfer-encoding: chunked", body=b"0\r\n\r\n"),
        post("host: t", JSON, "transfer-encoding: chunked", "content-length: 2", body=b"0\r\n\r\n"),
        post("host: t", JSON, "content-length: 2", "content-length: 2", body=b"{}"),
        post("host: t", JSON, "content-length: 2, 2", body=b"{}"),
        post("host: t", JSON, "content-length: +2", body=b"{}"),
        post("host: t", JSON, "content-length: -2", body=b"{}"),
        post("host: t", JSON, "transfer-encoding: gzip, chunked", body=b"0\r\n\r\n"),
        post("host: t", JSON, "transfer-encoding: chunked, chunked", body=b"0\r\n\r\n"),
        post("host: t", JSON, "transfer-encoding: xchunked", body=b"0\r\n\r\n"),
        post("host: t", JSON, "transfer-encoding: chunked", body=b"0x0\r\n\r\n"),
        post("host: t", JSON, "transfer-encoding: chunked", body=b"0\n\n"),
        post(JSON, "transfer-encoding: chunked", version="1.0", body=b"0\r\n\r\n"),
        post("host: t", JSON, "content-length: " + "0" * 5_000 + "2", body=b"{}"),
        post("host: t", "x: a\r\n b"),
        post("host: t", "x : a"),
        post("host: t", "x: a\0b"),
        post("host: t", "x: a\rb"),
        post("host: t", "x"),
        post(),
        post("host: t", "host: t"),
        post("host: t", "host: u", version="1.0"),
        post("host: t", version="0.9"),
        post("host: t", version="2.0"),
        b"POST /run_remote\r\n\r\n",
        b"POST /run_remote HTTP/1.1\nhost: t\n\n",
        b"POST /run remote HTTP/1.1\r\nhost: t\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
async def test_what_could_be_read_in_two_ways_is_refused(greet: Served, request_: bytes) -> None:
    status, head, body = await answer_to(greet, request_ + post("host: t"))
    assert status == 400
    problem = json.loads(body)  # and nothing behind it: no second request was seen
    assert (problem["status"], problem["code"]) == (400, "invalid-http")
    assert problem["detail"]
    assert f"x-request-id: {problem['request_id']}".encode() in head
    assert b"\r\nconnection: close" in head
    assert (await greet.call()).status_code == 200


async def test_what_can_only_be_read_in_one_way_is_taken(greet: Served) -> None:
    chunks = b"2;a=b\r\n{}\r\n0\r\nx: y\r\n\r\n"
    for request in (
        post("Host:t", "CONTENT-TYPE:\tapplication/json \t", "Content-Length:2", "connection: close", body=b"{}"),
        post("host: t", JSON, "transfer-encoding: Chunked", "connection: close", body=chunks),
        b"\r\n" + post("host: t", "connection: close"),
        post("host: t", "connection: close").replace(b"/run_remote", b"http://t/run_remote?q"),
        post("host: t", "connection: close").replace(b"/run_remote", b"/run%5fremote"),
        post("host: t", version="1.0"),
        post(version="1.0"),
    ):
        status, _, body = await answer_to(greet, request)
        assert (status, body) == (200, b'"Hello, world!"')


async def test_a_body_that_turns_out_malformed_is_told_so(greet: Served) -> None:
    head = post("host: t", JSON, "transfer-encoding: chunked")
    status, _, body = await answer_to(greet, head, b"1\r\n{\r\n", b"zz\r\n")
    assert (status, json.loads(body)["code"]) == (400, "invalid-http")


async def test_what_comes_behind_a_good_request_does_not_take_its_answer() -> None:
    async with serving(Slow) as served, served.connect() as client:
        await client.send({"name": "good"})
        await Seen.until("good began")
        await client.send_raw(b"\0\0\0\r\n\r\n")
        Seen.note("go")
        answers = await client.read_all()
    assert answers.startswith(b"HTTP/1.1 200 ")
    assert answers.endswith(b'\r\n\r\n"good"')


async def test_what_comes_behind_a_last_request_is_ignored(greet: Served) -> None:
    status, _, body = await answer_to(greet, post("host: t", "connection: close") + post("host: t") + b"\0")
    assert (status, body) == (200, b'"Hello, world!"')


async def test_what_was_sent_ahead_with_a_malformed_body_is_not_begun() -> None:
    async with serving(Slow) as served, served.connect() as client:
        await client.send({"name": "good"})
        await Seen.until("good began")
        await client.send_raw(post("host: t", JSON, "transfer-encoding: chunked", body=b"1\r\n{\r\nzz\r\n"))
        Seen.note("go")
        answers = await client.read_all()
    assert answers.count(b"HTTP/1.1 ") == 1
    assert answers.endswith(b'\r\n\r\n"good"')


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
async def test_an_upgrade_is_declined_by_going_on(greet: Served, *, chunked: bool, split: bool) -> None:
    """As `java.net.http` and `curl --http2` ask for, with a body too."""
    upgrade = ("host: t", "connection: upgrade, http2-settings", "upgrade: h2c", "http2-settings: x")
    body = b'{"name":"first"}'
    framing = "transfer-encoding: chunked" if chunked else f"content-length: {len(body)}"
    content = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if chunked else body
    async with greet.connect() as client:
        await client.send_raw(post(*upgrade, JSON, framing, body=content[:4] if split else content))
        if split:
            await client.send_raw(content[4:])
        assert names_of(await client.read_answer()) == [b"first"]
        await client.send_raw(post(*upgrade) + post("host: t", "connection: close"))
        assert names_of(await client.read_all()) == [b"world", b"world"]


async def test_the_body_of_an_upgrade_is_no_request(greet: Served) -> None:
    inner = post("host: t", "connection: close")
    head = post("host: t", "connection: upgrade", "upgrade: h2c", JSON, f"content-length: {len(inner)}")
    async with greet.connect() as client:
        await client.send_raw(head + inner)
        answers = await client.read_answer()
        await client.send_raw(post("host: t", "connection: close"))
        answers += await client.read_all()
    assert re.findall(rb"HTTP/1.1 (\d+) ", answers) == [b"400", b"200"]


# --- how much of one is taken


@pytest.mark.parametrize(
    "parts",
    [
        [post("host: t", "x: " + "a" * MAX_HEAD)],
        [post("host: t", *(f"x{number}: {'a' * 1000}" for number in range(70)))],
        [post("host: t", *["a:"] * (MAX_HEAD // 32))],
        [post("host: t").replace(b"/run_remote", b"/" + b"a" * MAX_HEAD)],
        [b"POST /run_remote HTTP/1.1\r\nhost: t\r\nx: ", *[b"a" * 8_000] * 40],
        [b"POST /run_remote HTTP/1.1\r\nhost: t\r\n", *[b"a" * 8_000] * 40],
    ],
    ids=["value", "many", "many tiny", "url", "endless value", "endless name"],
)
async def test_a_head_over_the_limit_is_refused(greet: Served, parts: list[bytes]) -> None:
    async with greet.connect() as client:
        for part in parts:
            await client.send_raw(part)
        answer = await client.read_until(b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert b"application/problem+json" in answer


async def test_a_head_within_the_limit_is_taken(greet: Served) -> None:
    status, _, _ = await answer_to(greet, post("host: t", "connection: close", "x: " + "a" * (MAX_HEAD - 200)))
    assert status == 200


async def test_trailers_over_the_limit_end_the_connection(greet: Served) -> None:
    head = post("host: t", JSON, "transfer-encoding: chunked", body=b"2\r\n{}\r\n0\r\nx: ")
    async with greet.connect() as client:
        await client.send_raw(head)
        for _ in range(20):
            await client.send_raw(b"a" * 8_000)
        answer = await client.read_until(b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 431 ")


async def test_a_body_in_many_small_chunks_is_taken(greet: Served) -> None:
    name = b"a" * 20_000
    body = b"".join(b"1\r\n%c\r\n" % byte for byte in b'{"name":"%b"}' % name) + b"0\r\n\r\n"
    status, _, answer = await answer_to(
        greet, post("host: t", JSON, "transfer-encoding: chunked", "connection: close", body=body)
    )
    assert (status, answer) == (200, b'"Hello, %b!"' % name)


async def test_requests_may_be_sent_ahead_as_far_as_there_is_room() -> None:
    async with serving(Slow) as served, served.connect() as client:
        await client.send({"name": "first"})
        await Seen.until("first began")
        bodies = [b'{"name":"n%d"}' % number for number in range(MAX_AHEAD + 10)]
        await client.send_raw(
            b"".join(post("host: t", JSON, f"content-length: {len(body)}", body=body) for body in bodies)
        )
        Seen.note("go")
        answers = await client.read_all()
    assert re.findall(rb'\r\n\r\n"(\w+)"', answers) == [b"first", *(b"n%d" % number for number in range(MAX_AHEAD))]
    assert answers.count(b"\r\nconnection: close\r\n") == 1
    assert answers.rpartition(b"HTTP/1.1 200 ")[2].count(b"\r\nconnection: close\r\n") == 1


@pytest.mark.parametrize("sent", [b"", b"POST /run_remote HTTP/1.1\r\nhost: "])
async def test_who_sends_no_head_in_time_is_let_go(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SWEEP", 0.05)
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.2)
    async with serving(Slow) as served, served.connect() as client, served.connect() as other:
        await other.send({"name": "long"})
        await client.send_raw(sent)
        assert await client.read_all() == b""
        Seen.note("go")
        assert b'"long"' in await other.read_answer()


async def test_an_idle_connection_is_closed_and_one_in_use_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SWEEP", 0.05)
    monkeypatch.setattr(connection, "KEEP_ALIVE", 0.2)
    async with serving(Slow) as served, served.connect() as idle, served.connect() as busy:
        await idle.send_raw(b"GET /healthz HTTP/1.1\r\nhost: t\r\n\r\n")
        assert b" 200 " in await idle.read_answer()
        await busy.send({"name": "long"})
        assert await idle.read_all() == b""
        Seen.note("go")
        assert b'"long"' in await busy.read_answer()


async def test_a_request_leaves_nothing_for_the_garbage_collector() -> None:
    """With thousands of them a second the collector would run all the time."""
    async with serving(Say) as served:
        for accept in ("text/plain", "text/event-stream"):
            for texts in (["a"], ["a", 1]):  # well, and badly
                await served.call(accept, texts=texts)
        gc.collect()
        gc.disable()
        try:
            for accept in ("text/plain", "text/event-stream"):
                for texts in (["a"], ["a", 1]):
                    await served.call(accept, texts=texts)
                async with served.connect() as client:
                    await client.send({"texts": ["a"]}, f"accept: {accept}", "connection: close")
                    await client.read_all()
            left = [
                type(found).__name__ for found in gc.get_objects() if isinstance(found, Exchange | Request | Stream)
            ]
        finally:
            gc.enable()
    assert not left


# --- how answers are framed


class App:
    """Does what a test says, as an app that is not ours might."""

    def __init__(self, *messages: dict[str, Any], error: Exception | None = None) -> None:
        self._messages = messages
        self._error = error

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        for message in self._messages:
            await send(message)
        if self._error is not None:
            raise self._error


def start(*headers: tuple[bytes, bytes], status: int = 200) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": headers}


def body(data: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


async def answered(app: App, request: bytes = b"GET / HTTP/1.1\r\nhost: t\r\nconnection: close\r\n\r\n") -> bytes:
    server = Server("127.0.0.1", 0, 1.0)
    url = await server.start(app)
    try:
        async with RawClient(url) as client:
            await client.send_raw(request)
            return await client.read_all()
    finally:
        await server.stop()


async def test_an_answer_of_unknown_length_is_in_chunks_or_ends_with_the_connection() -> None:
    app = App(start(), body(b"ab", more=True), body(b"", more=True), body(b"c"))
    answer = await answered(app)
    assert b"\r\ntransfer-encoding: chunked\r\n" in answer
    assert answer.endswith(b"\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n")
    answer = await answered(app, b"GET / HTTP/1.0\r\n\r\n")
    assert b"transfer-encoding" not in answer
    assert answer.endswith(b"\r\n\r\nabc")


async def test_an_answer_without_a_body_has_none() -> None:
    for status in (204, 304):
        assert (await answered(App(start(status=status), body(b"abc")))).endswith(b"connection: close\r\n\r\n")
    request = b"HEAD / HTTP/1.1\r\nhost: t\r\nconnection: close\r\n\r\n"
    answer = await answered(App(start((b"content-length", b"3")), body(b"abc")), request)
    assert b"content-length: 3\r\n" in answer
    assert answer.endswith(b"\r\n\r\n")


async def test_an_answer_has_a_date() -> None:
    answer = await answered(App(start((b"content-length", b"0")), body(b"")))
    assert re.search(rb"\r\ndate: \w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT\r\n", answer)


async def test_a_header_cannot_begin_another_line() -> None:
    for length in ((), ((b"content-length", b"3"),)):
        answer = await answered(App(start((b"x", b"a\r\nset-cookie: b"), *length), body(b"")))
        assert answer.startswith(b"HTTP/1.1 500 ")
        assert b"set-cookie" not in answer
        assert answer.endswith(b"\r\n\r\n")
        assert answer.count(b"\r\n\r\n") == 1  # nothing behind the head


@pytest.mark.parametrize("parts", [[b"abcd"], [b"ab"], [b"ab", b"cd"]])
async def test_a_body_of_another_length_than_was_said_is_no_whole_answer(
    parts: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    pieces = [body(part, more=part is not parts[-1]) for part in parts]
    answer = await answered(App(start((b"content-length", b"3")), *pieces))
    assert len(answer.partition(b"\r\n\r\n")[2]) < 3
    assert "http.app_failed" in caplog.text


async def test_an_app_that_fails_is_told_to_the_log_and_not_to_the_client(caplog: pytest.LogCaptureFixture) -> None:
    answer = await answered(App(error=RuntimeError("secret")))
    assert answer.startswith(b"HTTP/1.1 500 ")
    assert b"secret" not in answer
    assert "secret" in caplog.text
    answer = await answered(App(start(), body(b"ab", more=True), error=RuntimeError("in the middle")))
    assert answer.endswith(b"\r\n\r\n2\r\nab\r\n")  # and no end
    assert await answered(App(start())) == b""  # it said no more, and nothing has gone out
