"""Calls a Chain through its gateway: what `connect` uses for an ``http://`` URL."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from types import TracebackType
from typing import Self

import httpx
import msgspec

from chains_stream.codec import Codec
from chains_stream.errors import (
    ChainsRuntimeError,
    GatewayError,
    RemoteErrorDetail,
    StreamInterruptedError,
    from_detail,
)
from chains_stream.policy import Scope

_PATH = "/run_remote"


class Problem(msgspec.Struct):
    """Problem details (RFC 9457) as our gateway writes them; `error` is our own extension."""

    title: str = ""
    detail: str = ""
    status: int = 500
    error: RemoteErrorDetail | None = None

    def to_exception(self) -> Exception:
        if self.error is not None:
            return from_detail(self.error)
        return GatewayError(f"{self.status} {self.title}: {self.detail}".rstrip(": "), status=self.status)


class HttpTarget:
    """A gateway, called with JSON; streams come as server-sent events, which tell an end from a break."""

    def __init__(self, url: str, codec: Codec) -> None:
        self._url = url.rstrip("/")
        self._codec = codec
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
        received = 0
        try:
            response = await self._http.send(self._request(arguments, "text/event-stream"), stream=True)
            try:
                if response.status_code != httpx.codes.OK:
                    _raise_for(response.status_code, await response.aread())
                async with aclosing(_events(response.aiter_bytes())) as events:
                    async for event, data in events:
                        if event == "done":
                            return
                        if event == "error":
                            raise _problem(data).to_exception()
                        received += 1
                        yield (self._to_msgpack(data),)
            finally:
                await response.aclose()
        except httpx.TransportError as error:
            if received == 0:
                raise self._unreachable(error) from error
            reason = f"the connection to {self._url} broke: {str(error) or type(error).__name__}"
            raise StreamInterruptedError(reason, chunks=received) from error
        raise StreamInterruptedError(f"{self._url} closed the stream before its end", chunks=received)

    def _request(self, arguments: bytes, accept: str) -> httpx.Request:
        headers = {"content-type": "application/json", "accept": accept}
        content = self._codec.arguments_to_json(arguments)
        return self._http.build_request("POST", self._url + _PATH, content=content, headers=headers)

    def _to_msgpack(self, data: bytes) -> bytes:
        return self._codec.result_from_json(data)

    def _unreachable(self, error: httpx.TransportError) -> GatewayError:
        reason = str(error) or type(error).__name__
        return GatewayError(f"no answer from the gateway at {self._url}: {reason}", status=503)


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
