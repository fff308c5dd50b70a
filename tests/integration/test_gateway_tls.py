"""The gateway over TLS: what holds without it holds with it, and its certificate can be replaced."""

import asyncio
import base64
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from chains_stream.errors import ChainsUsageError
from chains_stream.gateway import connection, exchange, server, tls
from chains_stream.gateway.tls import Tls
from chains_stream.settings import Settings
from tests.sample import Seen
from tests.serving import Greet, Pause, Pieces, RawClient, RequestLog, Served, problem_of, request_log, serving

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


class Authority:
    """Makes certificates for 127.0.0.1, and puts them into two files."""

    def __init__(self, folder: Path) -> None:
        self.certfile, self.keyfile = folder / "cert.pem", folder / "key.pem"
        self._ca = trustme.CA()
        self.trust = ssl.create_default_context()
        self._ca.configure_trust(self.trust)
        self.issue()

    def issue(self, kind: trustme.KeyType = trustme.KeyType.ECDSA) -> None:
        made = self._ca.issue_cert("127.0.0.1", key_type=kind)
        self.certfile.write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
        self.keyfile.write_bytes(made.private_key_pem.bytes())

    @property
    def settings(self) -> dict[str, Any]:
        return {"tls_certfile": str(self.certfile), "tls_keyfile": str(self.keyfile)}

    def encrypt_key(self, password: str) -> None:
        key = serialization.load_pem_private_key(self.keyfile.read_bytes(), None)
        encryption = serialization.BestAvailableEncryption(password.encode())
        form = serialization.PrivateFormat.TraditionalOpenSSL
        self.keyfile.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, encryption))


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@asynccontextmanager
async def secured(authority: Authority, entrypoint: type[Any], **settings: Any) -> AsyncIterator[Served]:
    async with serving(entrypoint, trust=authority.trust, **authority.settings, **settings) as served:
        yield served


def session(client: RawClient) -> ssl.SSLObject:
    found = client.writer.get_extra_info("ssl_object")
    assert isinstance(found, ssl.SSLObject)
    return found


async def test_requests_and_streams(authority: Authority) -> None:
    async with secured(authority, Pieces) as served:
        assert served.url.startswith("https://127.0.0.1:")
        data = bytes(range(256)) * 4096
        arguments = {"data": base64.b64encode(data).decode(), "size": 10_000}
        response = await served.http.post("/run_remote", json=arguments)
        assert response.content == data
        assert (await served.http.get("/openapi.json")).status_code == 200
        problem_of(await served.http.post("/run_remote", json={}), 400)


async def test_tls_is_1_2_or_newer_and_speaks_http_1_1(authority: Authority) -> None:
    async with secured(authority, Greet) as served:
        authority.trust.set_alpn_protocols(["h2", "http/1.1"])
        async with served.connect() as client:
            assert session(client).version() == "TLSv1.3"
            assert session(client).selected_alpn_protocol() == "http/1.1"
        authority.trust.maximum_version = ssl.TLSVersion.TLSv1_2
        async with served.connect() as client:
            assert session(client).version() == "TLSv1.2"
            await client.send({}, "connection: close")
            assert b"Hello, world!" in await client.read_all()
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            old.minimum_version = ssl.TLSVersion.TLSv1_1
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        old.set_ciphers("DEFAULT:@SECLEVEL=0")
        with pytest.raises((ssl.SSLError, ConnectionError)):
            async with RawClient(served.url, trust=old):
                pass


async def test_plain_http_gets_no_answer_and_does_no_harm(authority: Authority) -> None:
    async with secured(authority, Greet) as served:
        async with RawClient(served.url) as client:
            await client.send({})
            assert b"HTTP" not in await client.read_all()
        assert (await served.call()).json() == "Hello, world!"


async def test_a_new_certificate_is_for_new_connections_and_breaks_no_old_one(authority: Authority) -> None:
    async with secured(authority, Pause) as served:
        assert served.server.tls is not None
        async with served.connect() as old:
            before = session(old).getpeercert(binary_form=True)
            await old.send({"name": "n"})
            await old.read_until(b"first")
            authority.issue()
            served.server.tls.reload()
            async with served.connect() as new:
                assert session(new).getpeercert(binary_form=True) != before
            Seen.note("go")
            await old.read_until(b"last")


@pytest.mark.parametrize("kinds", [("ECDSA", "RSA"), ("RSA", "ECDSA")], ids=" to ".join)
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_certificate_with_another_kind_of_key_replaces_the_old_one(
    authority: Authority, kinds: tuple[str, str], version: ssl.TLSVersion
) -> None:
    authority.trust.maximum_version = version
    first, second = (trustme.KeyType[kind] for kind in kinds)
    authority.issue(first)
    async with secured(authority, Greet) as served:
        assert served.server.tls is not None
        async with served.connect():
            pass
        authority.issue(second)
        served.server.tls.reload()
        expected = ssl.PEM_cert_to_DER_cert(authority.certfile.read_text())
        async with served.connect() as client:
            assert session(client).getpeercert(binary_form=True) == expected
            assert session(client).selected_alpn_protocol() in (None, "http/1.1")


async def test_a_wrong_new_certificate_leaves_the_old_one(authority: Authority) -> None:
    async with secured(authority, Greet) as served:
        found = served.server.tls
        assert found is not None
        async with served.connect() as client:
            before = session(client).getpeercert(binary_form=True)
        kept = authority.keyfile.read_bytes()
        authority.issue()
        authority.keyfile.write_bytes(kept)
        with pytest.raises(ChainsUsageError, match="does not belong"):
            found.reload()
        async with served.connect() as client:
            assert session(client).getpeercert(binary_form=True) == before


async def test_an_encrypted_key_and_its_password(authority: Authority) -> None:
    authority.encrypt_key("hunter2")
    async with secured(authority, Greet, tls_key_password="hunter2") as served:
        assert (await served.call()).json() == "Hello, world!"


@pytest.mark.parametrize(
    ("change", "settings", "said"),
    [
        ("", {"tls_certfile": "/no/such.pem"}, "CHAINS_TLS_CERTFILE: can't read /no/such.pem: No such file"),
        ("", {"tls_keyfile": "/no/such.pem"}, "CHAINS_TLS_KEYFILE: can't read /no/such.pem: No such file"),
        ("", {"tls_certfile": None}, "CHAINS_TLS_KEYFILE: there is no certificate to it"),
        ("", {"tls_keyfile": None}, "hold no certificate with its key in PEM"),
        ("swap", {}, "CHAINS_TLS_KEYFILE: the key in .* does not belong to the certificate in"),
        ("empty", {}, "hold no certificate with its key in PEM"),
        ("encrypt", {}, "CHAINS_TLS_KEY_PASSWORD: the key in .* is encrypted, and a password is needed"),
        ("encrypt", {"tls_key_password": "wrong"}, "is encrypted, and a password does not open it"),
    ],
)
def test_wrong_files_are_one_clear_line(authority: Authority, change: str, settings: dict[str, Any], said: str) -> None:
    if change == "swap":
        kept = authority.keyfile.read_bytes()
        authority.issue()
        authority.keyfile.write_bytes(kept)
    elif change == "empty":
        authority.certfile.write_bytes(b"")
    elif change == "encrypt":
        authority.encrypt_key("hunter2")
    with pytest.raises(ChainsUsageError, match=said) as caught:
        Tls.of(Settings.of(**authority.settings | settings))
    assert "\n" not in str(caught.value)


# --- what is bounded against slow clients


async def test_a_client_that_does_not_begin_is_closed(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HANDSHAKE_SECONDS", 0.2)
    async with secured(authority, Greet) as served, RawClient(served.url) as client:
        assert await client.read_all() == b""


async def test_a_head_that_does_not_arrive_closes_the_connection(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "SWEEP", 0.05)
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.2)
    monkeypatch.setattr(connection, "KEEP_ALIVE", 0.2)
    async with secured(authority, Greet) as served:
        async with served.connect() as silent:
            assert await silent.read_all() == b""
        async with served.connect() as slow:
            await slow.send_raw(b"POST /run_remote HT")
            assert await slow.read_all() == b""
        async with served.connect() as idle:
            await idle.send({})
            assert b"Hello" in await idle.read_all()


async def test_a_body_that_does_not_arrive_is_told_so(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "BODY_IDLE_SECONDS", 0.2)
    async with secured(authority, Greet) as served, served.connect() as slow:
        await slow.send_raw(
            b"POST /run_remote HTTP/1.1\r\nhost: t\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{"
        )
        assert (await slow.read_all()).startswith(b"HTTP/1.1 408 ")


async def test_a_body_that_is_too_large_is_refused_and_what_is_malformed_too(authority: Authority) -> None:
    async with secured(authority, Greet, max_body_bytes=1000) as served:
        response = await served.http.post("/run_remote", json={"name": 100_000 * "x"})
        problem_of(response, 413)
        async with served.connect() as client:
            await client.send_raw(b"\x00\x01\x02\r\n\r\n")
            assert (await client.read_all()).startswith(b"HTTP/1.1 400 ")


async def test_a_client_that_does_not_read_holds_a_stream_back_and_is_let_go(
    authority: Authority, log: RequestLog
) -> None:
    arguments = {"data": 100_000 * "A", "size": 75_000, "repeat": 400}
    async with secured(authority, Pieces, deadline=2.0, stream_window_bytes=MB) as served:
        async with served.connect(narrow=True) as client:
            await client.send(arguments)
            await client.read_until(b"\r\n\r\n")
            (line,) = await log.wait()
            assert line["error"] == "deadline-exceeded"
            assert Seen.counts["pieces"] < 100  # of 400: what nobody takes is not made
        assert (await served.http.get("/healthz")).status_code == 200


async def test_a_client_that_leaves_ends_its_request(authority: Authority, log: RequestLog) -> None:
    async with secured(authority, Pause) as served:
        async with served.connect() as client:
            await client.send({"name": "n"})
            await client.read_until(b"first")
        (line,) = await log.wait()
        assert line["status"] == 499
        await Seen.until("n closed")


async def test_stopping_lets_running_requests_finish(authority: Authority) -> None:
    async with secured(authority, Pause) as served, served.connect() as idle:
        await idle.send_raw(b"GET /healthz HTTP/1.1\r\nhost: t\r\n\r\n")
        await idle.read_until(b"ok")
        async with served.http.stream("POST", "/run_remote", json={"name": "n"}) as response:
            parts = response.aiter_text()
            assert await anext(parts) == "first\n"
            stopping = asyncio.ensure_future(served.server.stop())
            await idle.read_all()
            Seen.note("go")
            assert await anext(parts) == "last\n"
        await stopping
        with pytest.raises(httpx.ConnectError):
            await served.http.get("/healthz")


async def test_stopping_does_not_wait_for_a_client_that_is_silent(authority: Authority) -> None:
    async with secured(authority, Greet) as served:
        host, _, port = served.url.rpartition("//")[2].rpartition(":")
        with socket.create_connection((host, int(port))) as silent:
            context = authority.trust
            with context.wrap_socket(silent, server_hostname=host, do_handshake_on_connect=False) as half:
                await asyncio.to_thread(half.do_handshake)
                async with asyncio.timeout(tls.SHUTDOWN_SECONDS + 2):
                    await served.server.stop()
