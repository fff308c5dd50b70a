"""The server: its address, and how it stops."""

import asyncio
import re
import socket
from collections.abc import Iterator

import httpx
import pytest
from starlette.responses import PlainTextResponse

from chains_stream.errors import ChainsUsageError
from chains_stream.gateway.server import Server
from tests.sample import Seen
from tests.serving import Greet, Pause, RequestLog, Slow, problem_of, request_log, serving

APP = PlainTextResponse("here")


@pytest.fixture(autouse=True)
def nothing_seen() -> Iterator[None]:
    Seen.reset()
    yield
    Seen.reset()


@pytest.fixture
def log() -> Iterator[RequestLog]:
    with request_log() as handler:
        yield handler


@pytest.mark.parametrize(
    ("host", "url"), [("127.0.0.1", "127.0.0.1"), ("localhost", "localhost"), ("0.0.0.0", "127.0.0.1")]
)
async def test_port_0_picks_a_free_one(host: str, url: str) -> None:
    server = Server(host, 0, 1.0)
    bound = await server.bind()
    assert re.fullmatch(rf"http://{url}:\d+", bound)
    with pytest.raises(httpx.ConnectError):  # nothing is served yet
        await _get(bound)
    assert await server.start(APP) == bound
    assert await _get(bound) == "here"
    await server.stop()
    with pytest.raises(httpx.ConnectError):
        await _get(bound)


async def test_ipv6() -> None:
    server = Server("::1", 0, 1.0)
    try:
        url = await server.start(APP)
    except ChainsUsageError:
        pytest.skip("this machine has no IPv6")
    assert url.startswith("http://[::1]:")
    assert await _get(url) == "here"
    await server.stop()


@pytest.mark.parametrize("listening", [True, False])
async def test_a_port_in_use_is_one_clear_line(*, listening: bool) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        if listening:
            other.listen()
        port = other.getsockname()[1]
        server = Server("127.0.0.1", port, 1.0)
        with pytest.raises(ChainsUsageError) as caught:
            await server.start(APP)
        await server.stop()
    assert str(caught.value) == f"port {port} on 127.0.0.1 is in use: choose another with --port"


async def test_a_port_that_is_taken_between_bind_and_start() -> None:
    first = Server("127.0.0.1", 0, 1.0)
    port = int((await first.bind()).rpartition(":")[2])
    second = Server("127.0.0.1", port, 1.0)
    await second.bind()  # allowed, as neither listens
    await second.start(APP)
    with pytest.raises(ChainsUsageError, match="is in use"):
        await first.start(APP)
    await first.stop()
    await second.stop()


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.1", "not an address", "x" * 70])
async def test_a_host_that_is_not_here_is_one_clear_line(host: str) -> None:
    with pytest.raises(ChainsUsageError) as caught:
        await Server(host, 0, 1.0).start(APP)
    assert str(caught.value).startswith(f"{host} is not ")
    assert "--host" in str(caught.value)
    assert "\n" not in str(caught.value)


async def test_stopping_lets_running_requests_finish() -> None:
    async with serving(Pause) as served, served.connect() as idle:
        await idle.send_raw(b"GET /healthz HTTP/1.1\r\nhost: t\r\n\r\n")
        await idle.read_until(b"ok")
        async with served.http.stream("POST", "/run_remote", json={"name": "n"}) as response:
            parts = response.aiter_text()
            assert await anext(parts) == "first\n"
            await Seen.until("n waits")
            stopping = asyncio.ensure_future(served.server.stop())
            await idle.read_all()  # an idle connection is closed at once
            with pytest.raises(httpx.ConnectError):
                await _get(served.url)
            Seen.note("go")
            assert await anext(parts) == "last\n"
        await stopping


async def test_what_is_not_done_within_the_grace_period_is_told_so_and_not_cancelled(log: RequestLog) -> None:
    async with serving(Slow, grace_period=0.3) as served:
        running = asyncio.ensure_future(served.call(name="long"))
        await Seen.until("long began")
        await served.server.stop()
        response = await running
        problem = problem_of(response, 503)
        assert problem["code"] == "gateway"
        assert response.headers["retry-after"] == "1"
        (line,) = await log.wait()
        assert line["status"] == 503
        # It runs on: what comes next on the same topic is not served before it.
        assert Seen.counts["long stopped"] == 0


@pytest.mark.parametrize(
    ("accept", "end"),
    [("text/event-stream", "event: error\ndata: "), ("application/x-ndjson", '{"error":'), ("*/*", "")],
)
async def test_a_stream_that_is_not_done_within_the_grace_period(accept: str, end: str) -> None:
    async with serving(Pause, grace_period=0.3) as served:
        text = ""
        async with served.http.stream(
            "POST", "/run_remote", json={"name": "long"}, headers={"accept": accept}
        ) as response:
            parts = response.aiter_text()
            text += await anext(parts)
            stopping = asyncio.ensure_future(served.server.stop())
            try:
                async for part in parts:
                    text += part
            except httpx.RemoteProtocolError:
                assert not end
            else:
                assert end
        await stopping
        assert "first" in text
        assert "last" not in text
        assert end in text
        assert Seen.counts["long closed"] == 0


async def _get(url: str) -> str:
    async with httpx.AsyncClient(trust_env=False) as http:
        return (await http.get(url)).text


async def test_who_has_only_just_connected_is_heard_before_the_server_stops() -> None:
    async with serving(Greet) as served, served.connect() as client:
        await served.call()  # over a connection that came later: so the first one is accepted
        stopping = asyncio.create_task(served.server.stop())
        await asyncio.sleep(0)  # it has begun
        await client.send({})
        assert (await client.read_answer()).startswith(b"HTTP/1.1 200 OK")
        await stopping
