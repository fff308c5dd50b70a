"""Posting to URLs that strangers name: they must not lead into our own network.

A name is resolved here, its addresses are checked, and the connection goes to one of those, so that a second look-up
can't give another. What is not for the public internet is refused, by the registries of special-purpose addresses that
IANA keeps (RFC 6890).
"""

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import NamedTuple

import httpx

from chains_stream.errors import InvalidArgumentError

TIME_LIMIT = 15.0  # seconds, from the look-up of the name to the end of the answer
CONNECT_LIMIT = 5.0  # seconds, until the next address is tried
MAX_ADDRESSES = 4  # of a host that are tried
ANSWER_BYTES = 16 << 10  # of an answer that are read, so that its sender sees it taken
URL_LENGTH = 2048
# Look-ups at once. The name is that of the threads a command leaves behind when they are stuck: see `cli.process`.
THREADS, THREAD_NAME = 64, "chains-thread-dns"
MAX_PORT = 65_535

_NOT_PUBLIC = tuple(
    map(
        ipaddress.IPv4Network,
        (
            "0.0.0.0/8",
            "10.0.0.0/8",
            "100.64.0.0/10",  # shared, behind a carrier's NAT
            "127.0.0.0/8",
            "169.254.0.0/16",  # link-local: the metadata of cloud machines
            "172.16.0.0/12",
            "192.0.0.0/24",
            "192.0.2.0/24",
            "192.88.99.0/24",
            "192.168.0.0/16",
            "198.18.0.0/15",
            "198.51.100.0/24",
            "203.0.113.0/24",
            "224.0.0.0/3",  # multicast, reserved, broadcast
        ),
    )
)
_PUBLIC_6 = ipaddress.IPv6Network("2000::/3")  # the rest is local, reserved, or not yet given out
_NOT_PUBLIC_6 = tuple(map(ipaddress.IPv6Network, ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")))
# Those that end with an IPv4 address: mapped, and what DNS64 makes of any host in a network without IPv4.
_EMBEDDING = tuple(map(ipaddress.IPv6Network, ("::ffff:0:0/96", "64:ff9b::/96")))

_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}|[0-9A-Fa-f:.]+", re.ASCII)

Resolve = Callable[[str, int], Sequence[str]]


class Answer(NamedTuple):
    """What came of a post: the status and the `Retry-After` of the answer, or None and why there was none, in words."""

    status: int | None
    said: str
    retry_after: str | None = None


def check_url(url: str, *, allow_private: bool = False) -> None:
    """Refuse a URL that can't be posted to, without looking up its host. Raises InvalidArgumentError, a 400."""
    parsed = _parse(url)
    host = parsed.raw_host.decode("ascii")
    if allow_private:
        return
    bare = host.rstrip(".").lower()
    if bare == "localhost" or bare.endswith(".localhost"):
        raise _refused(host)
    try:
        # Also the forms of one number, or of fewer than four, that a look-up takes for an address.
        literal = host if ":" in host else socket.inet_ntoa(socket.inet_aton(bare))
    except OSError:
        return  # a name, which is checked when it is looked up
    if not is_public(literal):
        raise _refused(host)


def host_of(url: str) -> str:
    """Give the host that a URL names, for logs, which must show nothing else of it."""
    try:
        return httpx.URL(url).raw_host.decode("ascii")
    except (httpx.InvalidURL, UnicodeError):
        return "?"


def is_public(address: str) -> bool:
    """Tell whether an address is one of the public internet: a host's, and not private, local, or set apart."""
    parsed = ipaddress.ip_address(address)
    if isinstance(parsed, ipaddress.IPv6Address) and any(parsed in network for network in _EMBEDDING):
        parsed = ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)
    if isinstance(parsed, ipaddress.IPv4Address):
        return not any(parsed in network for network in _NOT_PUBLIC)
    return parsed in _PUBLIC_6 and not any(parsed in network for network in _NOT_PUBLIC_6)


class Poster:
    """Posts bodies, each over a connection of its own: one that was checked for a host must not serve another.

    `tls` verifies the hosts; `resolve` gives the addresses of a host and port, and may block, or raise OSError.
    """

    def __init__(
        self,
        *,
        allow_private: bool = False,
        time_limit: float = TIME_LIMIT,
        tls: ssl.SSLContext | None = None,
        resolve: Resolve | None = None,
    ) -> None:
        self._allow_private = allow_private
        self._time_limit = time_limit
        self._resolve = resolve or _look_up
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix=THREAD_NAME)
        # Not a client: that keeps cookies, and logs URLs whole.
        self._transport = httpx.AsyncHTTPTransport(
            verify=tls or httpx.create_ssl_context(),
            trust_env=False,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        )

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        await self._transport.aclose()

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        """Post a body; follow no redirect. Raises InvalidArgumentError for a URL, or an address, that is refused."""
        parsed = _parse(url)
        answer: Answer | None = None
        limit = asyncio.timeout(self._time_limit)
        try:
            async with limit:
                addresses = await self._addresses(parsed)
                response = await self._connect(parsed, addresses, body, headers)
                try:
                    answer = _answer(response)
                    await _drain(response)
                finally:
                    await response.aclose()
        except TimeoutError as error:
            said = f"no answer within {self._time_limit:g} s" if limit.expired() else str(error)
            return answer or Answer(None, said)
        except (OSError, httpx.TransportError, UnicodeError) as error:
            return answer or Answer(None, f"{type(error).__name__}: {error}")
        return answer

    async def _addresses(self, url: httpx.URL) -> Sequence[str]:
        """Look a host up, and check all its addresses. Raises OSError, InvalidArgumentError."""
        host = url.raw_host.decode("ascii")
        port = url.port or (443 if url.scheme == "https" else 80)
        found = await asyncio.get_running_loop().run_in_executor(self._threads, self._resolve, host, port)
        if not self._allow_private and not all(map(is_public, found)):
            raise _refused(host)
        return found[:MAX_ADDRESSES]

    async def _connect(
        self, url: httpx.URL, addresses: Sequence[str], body: bytes, headers: Mapping[str, str]
    ) -> httpx.Response:
        """Send to the first of the addresses that takes a connection. Raises httpx.TransportError."""
        named = {"host": url.netloc.decode("ascii"), "connection": "close", **headers}
        extensions = {
            "sni_hostname": url.raw_host.decode("ascii"),  # whose certificate is asked for, and verified
            "timeout": {"connect": CONNECT_LIMIT, "read": None, "write": None, "pool": None},
        }
        failed: httpx.TransportError = httpx.ConnectError("the host has no address")
        for address in addresses:
            request = httpx.Request(
                "POST", url.copy_with(host=address), headers=named, content=body, extensions=extensions
            )
            try:
                return await self._transport.handle_async_request(request)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                failed = error
        raise failed


def _parse(url: str) -> httpx.URL:
    if len(url) > URL_LENGTH:
        raise InvalidArgumentError(
            f"the URL of a webhook may have {URL_LENGTH} characters, and this one has {len(url)}"
        )
    unreadable = InvalidArgumentError(
        "the URL of a webhook must be one that can be read"
    )  # unsaid: it may hold secrets
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, UnicodeError):
        raise unreadable from None
    host = parsed.raw_host.decode("ascii")
    if host and _HOST.fullmatch(host) is None:
        raise unreadable
    if parsed.scheme not in ("http", "https") or not host:
        raise InvalidArgumentError("the URL of a webhook must be http:// or https:// and a host")
    if parsed.port is not None and not 0 < parsed.port <= MAX_PORT:
        raise InvalidArgumentError(f"the port in the URL of a webhook is from 1 to {MAX_PORT}, and not {parsed.port}")
    if parsed.userinfo:
        raise InvalidArgumentError("the URL of a webhook must hold no credentials: it is signed instead")
    return parsed


def _refused(host: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"webhooks don't go to {host}, which is not an address of the public internet (CHAINS_WEBHOOK_ALLOW_PRIVATE)"
    )


def _look_up(host: str, port: int) -> Sequence[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[4][0]) for address in found))


def _answer(response: httpx.Response) -> Answer:
    try:
        said = f"{response.status_code} {HTTPStatus(response.status_code).phrase}"
    except ValueError:
        said = str(response.status_code)
    return Answer(response.status_code, said, response.headers.get("retry-after"))


async def _drain(response: httpx.Response) -> None:
    """Read an answer, of which the head alone matters, though not without end."""
    size = 0
    async for part in response.aiter_raw():
        size += len(part)
        if size >= ANSWER_BYTES:
            return
