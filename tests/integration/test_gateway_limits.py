"""A gateway under more load than it takes: what is shed, how, and that nothing of it stays behind."""

import asyncio
import json
import time
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import pytest

import chains_stream as chains
from chains_stream.errors import OverloadedError
from chains_stream.gateway import exchange
from chains_stream.gateway.exchange import DISCARDED, PIECE
from tests.sample import Seen
from tests.serving import Greet, RawClient, RequestLog, Say, Served, Slow, problem_of, request_log, serving

MB = 1 << 20


@pytest.fixture(autouse=True)
def nothing_seen() -> Iterator[None]:
    Seen.reset()
    yield
    Seen.reset()


@pytest.fixture
def log() -> Iterator[RequestLog]:
    with request_log() as handler:
        yield handler


@asynccontextmanager
async def held(served: Served, *names: str, **headers: str) -> AsyncIterator[None]:
    """Requests that have been published and wait; they are let go at the end of the block, and have to be answered."""
    requests = await served.follow(served.topic)
    waiting = []
    for name in names:
        waiting.append(asyncio.ensure_future(post(served, name, **headers)))
        await requests.fetch()
    try:
        yield
    finally:
        Seen.note("go")
        answers = await asyncio.gather(*waiting, return_exceptions=True)
    assert [answer.json() if isinstance(answer, httpx.Response) else answer for answer in answers] == list(names)


async def post(served: Served, name: str, **headers: str) -> httpx.Response:
    named = {header.replace("_", "-"): value for header, value in headers.items()}
    return await served.http.post("/run_remote", json={"name": name}, headers=named)


def shed(response: httpx.Response) -> str:
    """Check that a response turns a request away, and give what it says."""
    problem = problem_of(response, 429)
    assert problem["code"] == "overloaded"
    assert problem["retry_after"] == int(response.headers["retry-after"]) == 1
    return str(problem["detail"])


def announcing(size: int, *headers: str) -> bytes:
    """Write the head of a request whose body is still to come."""
    lines = ["host: t", "content-type: application/json", f"content-length: {size}", *headers]
    return "\r\n".join(["POST /run_remote HTTP/1.1", *lines, "", ""]).encode()


async def count_of(served: Served, reason: str) -> float:
    text = (await served.http.get("/metrics")).text
    (line,) = [line for line in text.splitlines() if line.startswith(f'chains_shed_total{{reason="{reason}"}}')]
    return float(line.split()[-1])


# --- requests


async def test_more_requests_than_it_takes_are_shed_until_one_has_ended() -> None:
    async with serving(Slow, max_requests=2) as served:
        before = await count_of(served, "requests")
        async with held(served, "first", "second"):
            for _ in range(3):
                response = await post(served, "third")
                assert "2 requests" in shed(response)
                assert "CHAINS_MAX_REQUESTS" in response.text
            assert (await served.http.get("/healthz")).status_code == 200  # whoever watches it is not shed
        assert (await post(served, "later")).json() == "later"
        assert await count_of(served, "requests") == before + 3
    assert Seen.counts["third began"] == 0


async def test_our_own_client_sees_an_error_that_it_may_repeat() -> None:
    async with serving(Slow, max_requests=1) as served, chains.connect(served.url, Slow) as slow:
        async with held(served, "first"):
            with pytest.raises(OverloadedError) as caught:
                await slow.run_remote(name="second")
        assert (caught.value.retry_after, caught.value.retryable) == (1, True)


@pytest.mark.parametrize("how", ["answered", "refused", "failed", "late", "left"])
async def test_a_place_is_free_again_however_a_request_ends(how: str) -> None:
    async with serving(Slow, max_requests=1, max_requests_per_key=1) as served:
        match how:
            case "answered":
                async with held(served, "first"):
                    pass
            case "refused":
                problem_of(await served.http.post("/run_remote", content=b"x=1"), 415)
            case "failed":
                problem_of(await served.http.post("/run_remote", json={"nam": 1}), 400)
            case "late":
                problem_of(await post(served, "first", x_request_timeout="0.1"), 504)
            case _:
                with request_log() as log:
                    async with served.connect() as client:
                        await client.send({"name": "first"})
                        await Seen.until("first began")
                    await log.wait()
        Seen.note("go")
        assert (await post(served, "second")).json() == "second"


async def test_a_shed_request_keeps_its_connection() -> None:
    async with serving(Slow, max_requests=1) as served, served.connect() as client:
        async with held(served, "first"):
            for _ in range(3):
                await client.send({"name": "second"})
                answer = await client.read_answer()
                assert answer.startswith(b"HTTP/1.1 429 ")
                assert b"connection: close" not in answer
        await client.send({"name": "third"}, "connection: close")
        assert (await client.read_all()).endswith(b'"third"')


@pytest.mark.parametrize(
    "head",
    [
        announcing(DISCARDED + 1),
        announcing(100, "expect: 100-continue"),
        announcing(0).replace(b"content-length: 0", b"transfer-encoding: chunked"),
    ],
    ids=["large", "expecting", "chunked"],
)
async def test_a_client_that_is_still_sending_is_answered_and_cut_off(head: bytes) -> None:
    async with serving(Slow, max_requests=1) as served, served.connect() as client, held(served, "first"):
        await client.send_raw(head)
        answer = await client.read_all()
    assert answer.startswith(b"HTTP/1.1 429 ")
    assert b"\r\nconnection: close\r\n" in answer


# --- of one key


async def test_a_key_that_has_as_many_as_it_may_leaves_the_others_theirs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    async with serving(Slow, max_requests_per_key=2) as served:
        before = await count_of(served, "key")
        async with held(served, "first", "second", authorization="Bearer hush"):
            response = await post(served, "third", authorization="Bearer hush")
            assert "2 requests with the same credential" in shed(response)
            assert "hush" not in response.text
            # The credential is the first of the two headers, whatever the other says.
            shed(await post(served, "third", authorization="Bearer hush", x_api_key="other"))
            others = [
                asyncio.ensure_future(post(served, "other", authorization="Bearer other")),
                asyncio.ensure_future(post(served, "other", x_api_key="hush")),
                asyncio.ensure_future(post(served, "other")),
            ]
        assert [(await other).json() for other in others] == ["other"] * 3
        assert (await post(served, "later", authorization="Bearer hush")).json() == "later"
        assert await count_of(served, "key") == before + 2
    assert "hush" not in caplog.text


async def test_those_without_a_key_share_one() -> None:
    async with serving(Slow, max_requests_per_key=1) as served, held(served, "first"):
        shed(await post(served, "second"))


async def test_no_key_has_a_limit_unless_one_is_set() -> None:
    async with serving(Slow) as served, held(served, "first", "second", "third", x_api_key="k"):
        pass


# --- bytes


async def test_bodies_count_as_far_as_they_are_here_until_they_are_published() -> None:
    async with serving(Greet, max_buffered_bytes=MB, max_body_bytes=MB, max_record_bytes=2 * MB) as served:
        before = await count_of(served, "bytes")
        async with served.connect() as slow:
            head, rest = _nearly_all(MB - 100)
            await slow.send_raw(head)
            await _until_bytes_are_held(served, 300)
            assert "CHAINS_MAX_BUFFERED_BYTES" in shed(await served.call(name="x" * 300))
            assert (await served.call(name="x")).status_code == 200  # there is room for a small one
            assert await count_of(served, "bytes") >= before + 1
            await slow.send_raw(rest)
            assert (await slow.read_until(b"\r\n")).startswith(b"HTTP/1.1 200 ")
        assert (await served.call(name="x" * 300)).status_code == 200


async def test_a_request_under_way_does_not_count_any_more() -> None:
    names = [20 * str(number) for number in range(4)]
    async with serving(Slow, max_buffered_bytes=40, max_body_bytes=40) as served, held(served, *names):
        pass


async def test_a_body_of_unknown_length_counts_as_far_as_it_is_here() -> None:
    size = 64 << 10
    async with serving(Greet, max_buffered_bytes=MB, max_body_bytes=MB) as served, served.connect() as slow:
        await slow.send_raw(_nearly_all(MB - size)[0])
        await _until_bytes_are_held(served, size + 300)
        async with served.connect() as client:
            await client.send_raw(announcing(0).replace(b"content-length: 0", b"transfer-encoding: chunked"))
            piece = b"%x\r\n%b\r\n" % (size // 2, b"x" * (size // 2))
            await client.send_raw(piece * 3)  # and there is more to come
            answer = await client.read_all()
        assert answer.startswith(b"HTTP/1.1 429 ")
        assert b"\r\nconnection: close\r\n" in answer
        await slow.leave()


async def test_the_largest_body_is_taken_though_the_limit_of_all_is_lower() -> None:
    async with serving(Greet, max_buffered_bytes=100, max_body_bytes=1_000) as served:
        assert (await served.call(name="x" * 500)).status_code == 200
        problem_of(await served.call(name="x" * 1_000), 413)


async def test_senders_that_send_nothing_hold_nothing() -> None:
    async with AsyncExitStack() as stack:
        served = await stack.enter_async_context(serving(Slow, max_buffered_bytes=MB, max_body_bytes=MB))
        for _ in range(8):
            client = await stack.enter_async_context(served.connect())
            await client.send_raw(announcing(MB, "expect: 100-continue"))
            await client.read_until(b"100 Continue\r\n\r\n")  # its body is waited for
        async with held(served, "x" * (MB // 2), "y" * (MB // 2)):
            pass


async def test_a_sender_whose_body_has_no_room_is_told_before_it_sends() -> None:
    async with serving(Greet, max_buffered_bytes=MB, max_body_bytes=MB) as served, served.connect() as slow:
        await slow.send_raw(_nearly_all(MB)[0])
        await _until_bytes_are_held(served, 300)
        async with served.connect() as client:
            await client.send_raw(announcing(MB, "expect: 100-continue"))
            assert (await client.read_all()).startswith(b"HTTP/1.1 429 ")


async def test_a_sender_that_falls_silent_is_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "BODY_IDLE_SECONDS", 0.5)
    async with serving(Greet, max_buffered_bytes=MB, max_body_bytes=MB) as served, served.connect() as client:
        await client.send_raw(_nearly_all(MB)[0])
        await _until_bytes_are_held(served, 300)
        answer = await client.read_all()
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'"code":"body-too-slow"' in answer
        assert (await served.call(name="x" * 300)).status_code == 200


async def test_a_sender_that_dribbles_is_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "BODY_IDLE_SECONDS", 0.5)
    monkeypatch.setattr(exchange, "BODY_SECONDS", 1.0)
    async with serving(Greet) as served, served.connect() as client:
        began = time.monotonic()
        await client.send_raw(announcing(MB))
        answer = asyncio.ensure_future(client.read_all())
        while not answer.done():
            await client.send_raw(b" ")
            await asyncio.wait([answer], timeout=0.1)
        assert (await answer).startswith(b"HTTP/1.1 408 ")
        assert 0.9 < time.monotonic() - began < 5


def _nearly_all(size: int) -> tuple[bytes, bytes]:
    """Write a request with a body of `size` bytes, in two parts: the second is 200 bytes."""
    body = b'{"name": "%b"}' % (b"a" * (size - 12))
    return announcing(size) + body[:-200], body[-200:]


# --- answers that nobody reads


async def test_a_result_keeps_its_place_and_its_bytes_until_it_is_taken(log: RequestLog) -> None:
    times = MB // len("Hello, x!") - 100
    async with serving(Greet, max_requests=2, max_buffered_bytes=MB, max_body_bytes=MB) as served:
        async with served.connect(narrow=True) as client:
            await client.send({"name": "x", "times": times})
            await client.read_until(b"\r\n\r\n")
            # There is a place for another one, but not for as many bytes.
            assert "CHAINS_MAX_BUFFERED_BYTES" in shed(await served.call(name="x", times=times))
            assert (await served.call(name="x")).json() == "Hello, x!"
            assert [line["status"] for line in await log.wait(2)] == [429, 200]
            async with asyncio.timeout(10):
                assert await client.reader.readexactly(times * 9 + 2) == b'"%b"' % (b"Hello, x!" * times)
            await log.wait(3)
        assert len((await served.call(name="x", times=times)).json()) == 9 * times


@pytest.mark.parametrize(
    ("entrypoint", "arguments"),
    [
        (Greet, {"times": MB}),
        (Greet, {"times": (PIECE - 100) // len("Hello, world!")}),  # one piece, and the last
        (Say, {"texts": ["x" * (PIECE - 100)]}),
    ],
    ids=["large", "small", "stream"],
)
async def test_what_is_not_taken_is_broken_off_at_its_deadline(
    entrypoint: type[Any], arguments: dict[str, Any], log: RequestLog
) -> None:
    server = serving(entrypoint, max_requests=1, max_record_bytes=64 * MB)
    async with server as served, served.connect(narrow=True) as client:
        await client.send(arguments, "x-request-timeout: 1")
        await client.read_until(b"\r\n\r\n")
        shed(await served.call(**arguments))
        _, line = await log.wait(2)
        assert (line["status"], line["error"]) == (200, "deadline-exceeded")
        assert 900 < line["duration_ms"] < 5_000
        with pytest.raises(ConnectionResetError):
            await client.read_all()


async def test_an_error_that_is_not_taken_keeps_its_place_for_a_while(
    log: RequestLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "TAKEN_WITHIN", 1.0)
    async with serving(Say, max_requests=1) as served, served.connect(narrow=True) as client:
        await client.send({"texts": [], "fail": "x" * PIECE})
        await client.read_until(b"\r\n\r\n")
        shed(await served.call(texts=[]))
        _, line = await log.wait(2)
        assert line["status"] == 500
        with pytest.raises(ConnectionResetError):
            await client.read_all()


async def _until_bytes_are_held(served: Served, size: int = 200) -> None:
    """Wait until the gateway has no room for a body of that size."""
    async with asyncio.timeout(10):
        while (await served.call(name="x" * size)).status_code != 429:
            pass


# --- what stays behind


async def test_memory_does_not_grow_with_what_is_shed() -> None:
    body = json.dumps({"name": "x" * DISCARDED}).encode()

    async def shed_some(client: RawClient, number: int) -> None:
        """Send what would be 64 KiB a request, each with a key of its own, if it were kept."""
        await client.send_raw(announcing(DISCARDED, f"authorization: Bearer {number}") + body[:DISCARDED])
        assert b" 429 " in await client.read_answer()

    async with serving(Slow, max_requests=1) as served, served.connect() as client, held(served, "first"):
        for number in range(50):
            await shed_some(client, number)
        tracemalloc.start()
        try:
            for number in range(1_000):
                await shed_some(client, number)
            grown, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert grown < MB // 2  # of the 64 MB that came


# --- affinity


class Recorder:
    """Notes the affinity of what is published."""

    def __init__(self, served: Served) -> None:
        self.seen: list[bytes | None] = []
        self._open = served.caller.open

    async def open(self, topic: str, arguments: bytes, scope: Any, *rest: Any, **options: Any) -> Any:
        self.seen.append(scope.affinity)
        return await self._open(topic, arguments, scope, *rest, **options)


@pytest.mark.parametrize(
    ("value", "affinity"),
    [(b"user-7", b"user-7"), ("Zoë".encode(), "Zoë".encode()), (b"k" * 256, b"k" * 256), (None, None)],
)
async def test_an_affinity_key_goes_with_the_request(
    value: bytes | None, affinity: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(Greet) as served:
        recorder = Recorder(served)
        monkeypatch.setattr(served.caller, "open", recorder.open)
        headers = {} if value is None else {b"chains-affinity-key": value}
        assert (await served.http.post("/run_remote", headers=headers)).status_code == 200
    assert recorder.seen == [affinity]


@pytest.mark.parametrize("value", [b"", b"k" * 257, b"\xff\xfe"])
async def test_a_wrong_affinity_key(value: bytes) -> None:
    async with serving(Greet) as served:
        response = await served.http.post("/run_remote", headers={b"chains-affinity-key": value})
    problem = problem_of(response, 400)
    assert problem["code"] == "invalid-header"
    assert "chains-affinity-key" in problem["detail"]
