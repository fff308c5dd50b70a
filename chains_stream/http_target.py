"""Calls a Chain through its gateway: what `connect` uses for an ``http://`` URL."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from types import TracebackType
from typing import Self

import httpx
import msgspec
import pydantic

from chains_stream.codec import Codec
from chains_stream.errors import (
    ChainsRuntimeError,
    GatewayError,
    RemoteErrorDetail,
    StreamInterruptedError,
    from_detail,
)
from chains_stream.log import get_logger
from chains_stream.policy import Scope, backoff

EVENTS = "text/event-stream"
RECONNECTS = 8  # in a row that bring no chunk, until a stream counts as broken

_AWAY = (httpx.codes.TOO_MANY_REQUESTS, httpx.codes.BAD_GATEWAY, httpx.codes.SERVICE_UNAVAILABLE)
_PATH = "/run_remote"

log = get_logger(__name__)


class Problem(msgspec.Struct):
    """Problem details (RFC 9457) as our gateway writes them; `error` is our own extension."""

    title: str = ""
    detail: str = ""
    status: int = 500
    code: str = ""
    error: RemoteErrorDetail | None = None

    def to_exception(self) -> Exception:
        if self.error is not None:
            return from_detail(self.error)
        return GatewayError(f"{self.status} {self.title}: {self.detail}".rstrip(": "), status=self.status)


class _AwayError(Exception):
    """A gateway that tells no more of a stream; another one, or the same a little later, may."""


class HttpTarget:
    """A gateway, called with JSON; streams come as server-sent events, which tell an end from a break."""

    def __init__(self, url: str, codec: Codec, *, key: pydantic.SecretStr | None = None) -> None:
        self._url = url.rstrip("/")
        self._codec = codec
        self._key = authorization(key)
        # The request's own deadline bounds the wait for an answer.
        self._http = httpx.AsyncClient(timeout=httpx.Timeout(None, connect=10.0), limits=httpx.Limits())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def call(self, arguments: bytes, scope: Scope, attempt: int) -> bytes:  # noqa: ARG002 - Target's
        try:
            response = await self._http.send(self._request(arguments, "application/json"))
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        _raise_for(response.status_code, response.content)
        return self._to_msgpack(response.content)

    async def stream(self, arguments: bytes, scope: Scope, attempt: int) -> AsyncGenerator[tuple[bytes], None]:  # noqa: ARG002 - Target's
        received = attempt = 0
        request_id = ""
        request = self._request(arguments, EVENTS)
        while True:
            try:
                async with aclosing(self._chunks(request, again=bool(request_id))) as parts:
                    async for part in parts:
                        if isinstance(part, str):
                            request_id = request_id or part
                            continue
                        received += 1
                        attempt = 0
                        yield (self._to_msgpack(part),)
            except httpx.TransportError as error:
                if not request_id:
                    raise self._unreachable(error) from error
                reason = f"broke the connection: {str(error) or type(error).__name__}"
            except _AwayError as away:
                reason = str(away)
            else:
                return
            # The stream may go on: its gateway was stopped or killed, and another one can tell the rest of it.
            attempt += 1
            if attempt > RECONNECTS or not request_id:
                raise StreamInterruptedError(f"{self._url} {reason}", chunks=received)
            log.info("stream.reconnect", request_id=request_id, chunks=received, attempt=attempt, reason=reason)
            await asyncio.sleep(backoff(attempt))
            request = self._rest(request_id, received)

    async def _chunks(self, request: httpx.Request, *, again: bool) -> AsyncGenerator[str | bytes, None]:
        """Give the id of a request, then its chunks. Raises _AwayError where asking again may help."""
        response = await self._http.send(request, stream=True)
        try:
            if again and response.status_code in _AWAY:
                raise _AwayError(f"answered {response.status_code}")
            if response.status_code != httpx.codes.OK:
                _raise_for(response.status_code, await response.aread())
            yield response.headers.get("x-request-id", "")
            async with aclosing(_events(response.aiter_bytes())) as events:
                async for event, data in events:
                    if event == "done":
                        return
                    if event == "error":
                        problem = _problem(data)
                        if problem.code == GatewayError.code:
                            raise _AwayError(f"said: {problem.detail}")
                        raise problem.to_exception()
                    yield data
        finally:
            await response.aclose()
        raise _AwayError("closed the stream before its end")

    def _rest(self, request_id: str, received: int) -> httpx.Request:
        """Ask for what comes after so many chunks of a stream."""
        headers = {"accept": EVENTS, **self._key} | ({"last-event-id": str(received - 1)} if received else {})
        return self._http.build_request("GET", f"{self._url}/async_request/{request_id}/events", headers=headers)

    def _request(self, arguments: bytes, accept: str) -> httpx.Request:
        headers = {"content-type": "application/json", "accept": accept, **self._key}
        content = self._codec.arguments_to_json(arguments)
        return self._http.build_request("POST", self._url + _PATH, content=content, headers=headers)

    def _to_msgpack(self, data: bytes) -> bytes:
        return self._codec.result_from_json(data)

    def _unreachable(self, error: httpx.TransportError) -> GatewayError:
        reason = str(error) or type(error).__name__
        return GatewayError(f"no answer from the gateway at {self._url}: {reason}", status=503)


def authorization(key: pydantic.SecretStr | None) -> dict[str, str]:
    """Give the header that presents an API key, if there is one."""
    return {} if key is None else {"authorization": f"Bearer {key.get_secret_value()}"}


async def _lines(parts: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """Split at newlines alone: httpx's own lines end at characters that JSON text may hold."""
    rest = b""
    async for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line.removesuffix(b"\r")


async def _events(parts: AsyncIterator[bytes]) -> AsyncGenerator[tuple[str, bytes], None]:
    """Read server-sent events: (event, data). Source: WHATWG HTML, section 9.2.6."""
    event, data = "message", list[bytes]()
    async with aclosing(_lines(parts)) as lines:
        async for line in lines:
            if not line:
                if data:
                    yield event, b"\n".join(data)
                event, data = "message", []
                continue
            name, _, value = line.partition(b":")
            value = value.removeprefix(b" ")
            if name == b"event":
                event = value.decode()
            elif name == b"data":
                data.append(value)


def _raise_for(status: int, content: bytes) -> None:
    if status != httpx.codes.OK:
        error = _problem(content).to_exception()
        if isinstance(error, GatewayError):
            error.status = status
        raise error


def _problem(content: bytes) -> Problem:
    try:
        return msgspec.json.decode(content, type=Problem)
    except msgspec.DecodeError:
        raise ChainsRuntimeError(f"not a gateway of a Chain; it answered {content[:200]!r}") from None
