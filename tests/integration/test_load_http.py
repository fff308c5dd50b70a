"""The HTTP client that makes load: what it counts, and what it makes of servers that behave badly."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from chains_stream.errors import ChainsUsageError
from chains_stream.load import FailedError, calls, closed_loop
from chains_stream.load_http import Client

HEAD = b"HTTP/1.1 200 OK\r\nServer: test\r\n"


class Server:
    """Answers each request with the same pieces, written one by one."""

    def __init__(self, pieces: Sequence[bytes], *, closes: bool = False) -> None:
        self.requests: list[bytes] = []
        self.connections = 0
        self._pieces = pieces
        self._closes = closes

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                self.requests.append(head + await reader.readexactly(length))
                for piece in self._pieces:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0)
                if self._closes:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has gone
        finally:
            writer.close()


@asynccontextmanager
async def served(server: Server) -> AsyncIterator[Client]:
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    async with listening:
        port = listening.sockets[0].getsockname()[1]
        async with Client(f"http://127.0.0.1:{port}/below/", path="/run_remote") as client:
            yield client


def chunked(kind: str, *chunks: bytes) -> bytes:
    body = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in (*chunks, b""))
    return HEAD + f"Content-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n".encode() + body


def split(answer: bytes, size: int) -> list[bytes]:
    return [answer[start : start + size] for start in range(0, len(answer), size)]


async def count(client: Client) -> int:
    return sum([arrived async for arrived in client.stream(b"{}")])


async def test_a_request_is_a_post_of_json() -> None:
    server = Server([HEAD + b"Content-Type: application/json\r\nContent-Length: 2\r\n\r\n42"])
    async with served(server) as client:
        answer = await client.post(b'{"n": 1}')
    assert answer == (200, "application/json", b"42")
    head, _, body = server.requests[0].partition(b"\r\n\r\n")
    assert body == b'{"n": 1}'
    assert head.startswith(b"POST /below/run_remote HTTP/1.1\r\nhost: 127.0.0.1:")
    assert b"content-type: application/json" in head


async def test_connections_are_used_again() -> None:
    server = Server([HEAD + b"Content-Length: 2\r\n\r\n42"])
    async with served(server) as client:
        result = await closed_loop(calls(lambda: client.call(b"{}")), in_flight=3, count=30)
    assert (result.completed, len(server.requests), server.connections) == (30, 30, 3)


@pytest.mark.parametrize("ending", [b"Connection: close\r\nContent-Length: 2\r\n\r\n42", b"\r\n42"])
async def test_an_answer_may_end_with_its_connection(ending: bytes) -> None:
    server = Server([HEAD + ending], closes=True)
    async with served(server) as client:
        assert [(await client.post(b"{}")).content for _ in range(3)] == [b"42"] * 3
    assert server.connections == 3


EVENTS = (
    b"retry: 1000\n\nid: 0\ndata: 1\n\n",
    b":\n\n",
    b"id: 1\ndata: 2\n\nid: 2\ndata: 3\n\n",
    b"event: message\r\ndata: 4\r\n\r\n",
    b"data: [DONE]\n\n",
    b'event: done\ndata: {"chunks":3}\n\n',
)


@pytest.mark.parametrize("size", [1, 2, 7, 100_000])
@pytest.mark.parametrize(
    ("kind", "chunks", "tokens"),
    [
        ("application/x-ndjson", (b'"a"\n', b'"b"\n"c"\n', b'"d', b'"\n'), 4),
        ("Text/Event-Stream; charset=utf-8", EVENTS, 4),
        ("text/plain; charset=utf-8", (b"some ", b"words"), 2),
    ],
)
async def test_tokens_are_counted_however_they_arrive(
    kind: str, chunks: tuple[bytes, ...], tokens: int, size: int
) -> None:
    server = Server(split(chunked(kind, *chunks), size))
    async with served(server) as client:
        assert [await count(client), await count(client)] == [tokens, tokens]
        assert (await client.post(b"{}")).content == b"".join(chunks)
    assert server.connections == 1


PROBLEM = b'{"title": "Failed", "status": 500, "code": "remote"}'


@pytest.mark.parametrize(
    ("kind", "chunks"),
    [
        ("application/x-ndjson", (b"1\n", b'{"error":' + PROBLEM + b"}\n")),
        ("text/event-stream", (b"data: 1\n\n", b"event: error\ndata: " + PROBLEM + b"\n\n")),
    ],
)
async def test_a_stream_that_fails_is_a_failure_of_its_kind(kind: str, chunks: tuple[bytes, ...]) -> None:
    seen = 0
    async with served(Server([chunked(kind, *chunks)])) as client:
        with pytest.raises(FailedError, match=r"^stream failed remote$"):
            async for arrived in client.stream(b"{}"):
                seen += arrived
    assert seen == 1


@pytest.mark.parametrize("way", ["call", "stream"])
async def test_a_status_of_failure_is_a_failure_with_the_problem_s_code(way: str) -> None:
    body = b'{"title": "Busy", "status": 429, "code": "overloaded"}'
    head = b"HTTP/1.1 429 Too Many Requests\r\nContent-Type: application/problem+json\r\nContent-Length: %d\r\n\r\n"
    async with served(Server([head % len(body) + body])) as client:
        with pytest.raises(FailedError, match=r"^HTTP 429 overloaded$"):
            await (client.call(b"{}") if way == "call" else count(client))
        assert (await client.post(b"{}")).status == 429


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"", "connection broke"),
        (HEAD + b"Content-Length: 10\r\n\r\n42", "connection broke"),
        (chunked("text/plain", b"some")[:-5], "connection broke"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nwhat\r\n", "malformed HTTP"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "malformed HTTP"),
        (b"x" * 100_000, "malformed HTTP"),
    ],
)
async def test_an_answer_that_is_none_is_a_failure(answer: bytes, kind: str) -> None:
    async with served(Server([answer], closes=True)) as client:
        with pytest.raises(FailedError, match=f"^{kind}$"):
            await client.call(b"{}")


async def test_a_stream_that_is_left_closes_its_connection() -> None:
    server = Server([chunked("text/plain", b"some")[:-5]])
    async with served(server) as client:
        answer = await client.first(b"{}")
        assert (answer.status, answer.content_type) == (200, "text/plain")
        await client.first(b"{}")
    assert server.connections == 2


@pytest.mark.parametrize(
    "url",
    ["127.0.0.1:8000", "ftp://here", "http://", "http://here:many", "http://[1", "http://a b/", "http://a/\r\nx:"],
)
def test_what_is_no_url_is_a_mistake(url: str) -> None:
    with pytest.raises(ChainsUsageError):
        Client(url)
