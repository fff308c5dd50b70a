"""What a Chain that speaks WebSocket takes: the Protocol that users write against, and its messages on the wire.

The wire: the request's argument is a `Handshake`; what the worker sends are the chunks of its answer, the first of them
`Opened`, which says where the client's messages are to be sent: as the chunks of a stream of their own, whose end is a
`Close`. So order, windows, deadlines and cancellation are those of any stream, in both directions.
"""

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import msgspec

MAX_REASON = 123  # bytes of UTF-8 (RFC 6455, section 5.5)
NORMAL = 1000
GOING_AWAY = 1001
NO_STATUS = 1005  # never sent: the client named no code
ABNORMAL = 1006  # never sent: the connection ended with no word
_SENDABLE = (1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014)
_OWN = range(3000, 5000)  # for libraries and applications


class WebSocketProtocol(Protocol):
    """The WebSocket of a client, as the single argument of an entrypoint's ``run_remote``.

    It is open when ``run_remote`` begins, and closed with 1000 when it returns. Once the client has left, ``receive…``
    raises WebSocketClosedError, with what the client sent before still given first, and ``send…`` raises it at once;
    loops of ``iter_…`` end. One task may receive while others send.

    Example::

        @chains.mark_entrypoint
        class Echo(chains.ChainletBase):
            async def run_remote(self, websocket: chains.WebSocketProtocol) -> None:
                async for text in websocket.iter_text():
                    await websocket.send_text(text)
    """

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers of the request that opened it, by their names in any case."""

    @property
    def query_params(self) -> Mapping[str, str]:
        """The parameters in the URL; of many of one name the first. A browser can't send headers."""

    async def receive(self) -> str | bytes:
        """Wait for a message: text or bytes, as it was sent."""

    async def receive_text(self) -> str:
        """Wait for a message of text. Raises InvalidArgumentError for one of bytes."""

    async def receive_bytes(self) -> bytes:
        """Wait for a message of bytes. Raises InvalidArgumentError for one of text."""

    async def receive_json(self) -> Any:
        """Wait for a message, of either kind, and read it as JSON. Raises InvalidArgumentError."""

    async def send(self, data: str | bytes) -> None:
        """Send a message; waits while the client lags behind."""

    async def send_text(self, data: str) -> None:
        """Send a message of text."""

    async def send_bytes(self, data: bytes) -> None:
        """Send a message of bytes."""

    async def send_json(self, data: Any) -> None:
        """Send a value as JSON, in a message of text."""

    def iter_text(self) -> AsyncIterator[str]:
        """Give messages of text until the client has left."""

    def iter_bytes(self) -> AsyncIterator[bytes]:
        """Give messages of bytes until the client has left."""

    def iter_json(self) -> AsyncIterator[Any]:
        """Give messages, read as JSON, until the client has left."""

    async def close(self, code: int = NORMAL, reason: str | None = None) -> None:
        """Close it; ``run_remote`` may go on. The code is 1000, or 3000 to 4999; the reason at most 123 bytes."""

    def is_connected(self) -> bool:
        """Whether neither side has closed it, as far as is known here."""


class Fields(Mapping[str, str]):
    """Headers by their names, in whatever case; many of one name are joined by commas."""

    def __init__(self, fields: Iterable[tuple[str, str]]) -> None:
        self._fields: dict[str, str] = {}
        for name, value in fields:
            known = self._fields.get(name.lower())
            self._fields[name.lower()] = value if known is None else f"{known}, {value}"

    def __getitem__(self, name: str) -> str:
        return self._fields[name.lower()]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)


class Handshake(msgspec.Struct, frozen=True):
    """The request that opened a WebSocket."""

    headers: list[tuple[str, str]] = []
    path: str = "/websocket"
    query: str = ""


class Text(msgspec.Struct, tag=0, array_like=True, frozen=True):
    """A message of text."""

    data: str


class Binary(msgspec.Struct, tag=1, array_like=True, frozen=True):
    """A message of bytes."""

    data: bytes


class Close(msgspec.Struct, tag=2, array_like=True, frozen=True):
    """The end of a WebSocket: from the worker a message that asks for it, from the client the end of its stream."""

    code: int = NORMAL
    reason: str = ""


class Opened(msgspec.Struct, tag=3, array_like=True, frozen=True):
    """The worker's first message: where it takes the client's, and how many, and how many bytes, may be under way."""

    topic: str
    partition: int
    correlation_id: bytes
    chunks: int
    size: int


Buffer = bytes | msgspec.Raw
Message = Text | Binary
FromWorker = Text | Binary | Close | Opened

encode = msgspec.msgpack.Encoder().encode
decode_message: Callable[[Buffer], Message] = msgspec.msgpack.Decoder(Message).decode
decode_from_worker: Callable[[Buffer], FromWorker] = msgspec.msgpack.Decoder(FromWorker).decode
decode_close = msgspec.msgpack.Decoder(Close).decode


def code_fault(code: int, reason: str) -> str | None:
    """Say why a WebSocket can't be closed so, or None."""
    if code not in _SENDABLE and code not in _OWN:
        return f"{code} is no code that a WebSocket can be closed with: use 1000, or one of 3000 to 4999 of your own"
    if len(reason.encode("utf-8", "replace")) > MAX_REASON:
        return f"the reason that a WebSocket is closed with is at most {MAX_REASON} bytes of UTF-8"
    return None


def shortened(reason: str) -> str:
    """Give as much of a text as fits the reason of a close."""
    return reason.encode("utf-8", "replace")[:MAX_REASON].decode("utf-8", "ignore")
