"""Posting to real servers: which address is connected to, whose certificate is asked for, and how long it may take."""

import asyncio
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from chains_stream.errors import InvalidArgumentError
from chains_stream.posting import ANSWER_BYTES, Poster
from tests.receiver import OK, Post, Receiver, answer, receiving


class Names:
    """A name service that gives other addresses each time it is asked."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.asked: list[str] = []
        self._answers = answers

    def __call__(self, host: str, _port: int) -> Sequence[str]:
        self.asked.append(host)
        return self._answers[min(len(self.asked), len(self._answers)) - 1]


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as receiver:
        yield receiver


@pytest.fixture
async def poster() -> AsyncIterator[Callable[..., Poster]]:
    async with AsyncExitStack() as stack:

        def make(**options: object) -> Poster:
            poster = Poster(**options)  # type: ignore[arg-type] # a test's own
            stack.push_async_callback(poster.close)
            return poster

        yield make


async def test_the_address_that_was_checked_is_connected_to(
    receiver: Receiver, poster: Callable[..., Poster], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name is looked up once: a second answer, into our own network, is never asked for."""
    monkeypatch.setattr("chains_stream.posting.is_public", lambda address: address == "127.0.0.1")
    names = Names(["127.0.0.1"], ["127.0.0.2"])
    said = await poster(resolve=names).post(f"http://hooks.test:{receiver.port}/a?b=c", b"{}", {"webhook-id": "1"})
    assert said.status == 204
    assert names.asked == ["hooks.test"]
    [post] = receiver.posts
    assert (post.path, post.headers["host"], post.body) == ("/a?b=c", f"hooks.test:{receiver.port}", b"{}")


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["8.8.8.8", "10.0.0.1"], ["::1"], ["64:ff9b::7f00:1"]])
async def test_a_name_with_an_address_of_the_own_network_is_refused(
    receiver: Receiver, poster: Callable[..., Poster], addresses: Sequence[str]
) -> None:
    with pytest.raises(InvalidArgumentError, match=r"hooks\.test, which is not an address of the public internet"):
        await poster(resolve=Names(addresses)).post(f"http://hooks.test:{receiver.port}/", b"", {})
    assert receiver.posts == []


async def test_the_next_address_is_tried_if_one_takes_no_connection(
    receiver: Receiver, poster: Callable[..., Poster]
) -> None:
    names = Names(["::1", "127.0.0.1"])  # the receiver listens on one of them
    said = await poster(resolve=names, allow_private=True).post(f"http://hooks.test:{receiver.port}/", b"x", {})
    assert said.status == 204
    said = await poster(resolve=Names(["::1"]), allow_private=True).post(f"http://t:{receiver.port}/", b"x", {})
    assert said.status is None
    assert said.said.startswith("ConnectError")


async def test_a_name_that_nobody_knows_is_no_answer(poster: Callable[..., Poster]) -> None:
    def unknown(_host: str, _port: int) -> Sequence[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    said = await poster(resolve=unknown).post("http://hooks.test/", b"", {})
    assert said.status is None
    assert "Name or service not known" in said.said


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of hooks.test, which signs itself."""
    folder = tmp_path_factory.mktemp("tls")
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    subject = ("-subj", "/CN=hooks.test", "-addext", "subjectAltName=DNS:hooks.test", "-days", "2")
    files = ("-keyout", "key.pem", "-out", "cert.pem")
    subprocess.run(["openssl", "req", "-x509", *curve, *files, *subject], cwd=folder, check=True, capture_output=True)
    return folder


async def test_tls_verifies_the_name_and_not_the_address(certificate: Path, poster: Callable[..., Poster]) -> None:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    client = ssl.create_default_context(cafile=str(certificate / "cert.pem"))
    trusting = poster(resolve=Names(["127.0.0.1"]), allow_private=True, tls=client)
    async with receiving(server) as receiver:
        assert (await trusting.post(f"https://hooks.test:{receiver.port}/", b"1", {})).status == 204
        # At the same address, right after: the connection of one host never serves another.
        other = await trusting.post(f"https://other.test:{receiver.port}/", b"2", {})
        assert other.status is None
        assert "CERTIFICATE_VERIFY_FAILED" in other.said
        distrusting = poster(resolve=Names(["127.0.0.1"]), allow_private=True)
        assert (await distrusting.post(f"https://hooks.test:{receiver.port}/", b"3", {})).status is None
    assert [post.body for post in receiver.posts] == [b"1"]


async def test_no_answer_is_waited_for_without_end(receiver: Receiver, poster: Callable[..., Poster]) -> None:
    never = asyncio.Event()

    async def hang(_post: Post) -> bytes:
        await never.wait()
        return OK

    receiver.answers = hang
    said = await poster(allow_private=True, time_limit=0.2).post(receiver.url, b"", {})
    assert (said.status, said.said) == (None, "no answer within 0.2 s")


@pytest.mark.parametrize("length", [10 * ANSWER_BYTES, 1 << 40])
async def test_an_answer_is_not_read_without_end(
    receiver: Receiver, poster: Callable[..., Poster], length: int
) -> None:
    """Its status counts, whatever follows, or does not."""

    async def endless(_post: Post) -> bytes:
        head = f"HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n"
        return head.encode() + b"x" * (2 * ANSWER_BYTES)

    receiver.answers = endless
    began = time.monotonic()
    said = await poster(allow_private=True).post(receiver.url, b"", {})
    assert (said.status, said.said) == (200, "200 OK")
    assert time.monotonic() - began < 5


async def test_a_status_counts_though_its_answer_breaks_off(receiver: Receiver, poster: Callable[..., Poster]) -> None:
    async def broken(_post: Post) -> bytes:
        return b"HTTP/1.1 202 Accepted\r\ncontent-length: 10\r\n\r\nhalf"

    receiver.answers = broken
    assert (await poster(allow_private=True).post(receiver.url, b"", {})).status == 202


async def test_an_answer_that_is_no_http_is_none(receiver: Receiver, poster: Callable[..., Poster]) -> None:
    async def nonsense(_post: Post) -> bytes:
        return b"hello\r\n\r\n"

    receiver.answers = nonsense
    said = await poster(allow_private=True).post(receiver.url, b"", {})
    assert said.status is None
    assert said.said.startswith("RemoteProtocolError")


async def test_a_receiver_sets_no_cookies(receiver: Receiver, poster: Callable[..., Poster]) -> None:
    async def cookie(_post: Post) -> bytes:
        return answer("200 OK", "set-cookie: a=b")

    receiver.answers = cookie
    posting = poster(allow_private=True)
    for _ in range(2):
        await posting.post(receiver.url, b"", {})
    assert all("cookie" not in post.headers for post in receiver.posts)
