"""The control topic: what callers tell the workers about requests that are under way.

A message concerns one request topic, and goes to the partition that the topic's name hashes to, under that name as its
key. A process reads only the partitions of the topics that it serves.
"""

import asyncio
import zlib
from collections.abc import Callable

import msgspec

from chains_stream.broker import Broker, Reader, TopicSpec
from chains_stream.errors import OffsetExpiredError
from chains_stream.log import get_logger
from chains_stream.settings import Settings

PARTITIONS = 64

log = get_logger(__name__)


class Cancel(msgspec.Struct, tag=0, array_like=True, frozen=True):
    """Stop a request, or skip it if it still waits at `offset` of `partition`, or behind it."""

    correlation_id: bytes
    partition: int = 0
    offset: int = 0


class Credit(msgspec.Struct, tag=1, array_like=True, frozen=True):
    """The reader of a stream has taken this many chunks and bytes of it in all: as many more may be sent."""

    correlation_id: bytes
    chunks: int
    size: int


Message = Cancel | Credit
Handler = Callable[[Message], None]

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


class Control:
    """This process's side of the control topic: it sends, and hands what it reads to the handler of each topic."""

    def __init__(self, broker: Broker, settings: Settings) -> None:
        self._broker = broker
        self._topic = f"{settings.namespace}.control"
        self._retention_ms = settings.reply_retention_ms
        self._handlers: dict[bytes, Handler] = {}
        self._reader: Reader | None = None
        self._task: asyncio.Task[None] | None = None
        self._partitions = PARTITIONS

    async def start(self) -> None:
        await self._broker.ensure_topics([TopicSpec(self._topic, PARTITIONS, self._retention_ms, ring=True)])
        self._partitions = await self._broker.partitions(self._topic)  # one that existed may have another number

    async def send(self, request_topic: str, message: Message) -> None:
        """Publish a message about a request on `request_topic`."""
        key = request_topic.encode()
        await self._broker.publish(self._topic, _encoder.encode(message), partition=self._partition(key), key=key)

    async def follow(self, handlers: dict[str, Handler]) -> None:
        """Hand each message about the given request topics to its handler, from now on. Called once."""
        assert self._task is None, "one reader a process"
        self._handlers = {topic.encode(): handler for topic, handler in handlers.items()}
        await self._open_reader()
        self._task = asyncio.create_task(self._read(), name="control")

    async def failed(self) -> None:
        """Wait until reading can't go on. Raises what stopped it."""
        if self._task is not None:
            await asyncio.shield(self._task)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)  # `failed` tells what it died of
        if self._reader is not None:
            await self._reader.close()

    async def _open_reader(self) -> Reader:
        if self._reader is not None:
            await self._reader.close()
        self._reader = await self._broker.read(self._topic, dict.fromkeys(map(self._partition, self._handlers)))
        return self._reader

    async def _read(self) -> None:
        reader = self._reader
        assert reader is not None, "opened by follow"
        while True:
            try:
                records = await reader.fetch()
            except OffsetExpiredError as error:
                log.warning("control.skipped", reason=str(error))
                reader = await self._open_reader()
                continue
            for record in records:
                handler = self._handlers.get(record.key or b"")
                if handler is not None:
                    self._handle(handler, record.value)

    def _handle(self, handler: Handler, value: bytes) -> None:
        try:
            message = _decoder.decode(value)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:  # a stranger's record
            log.warning("control.undecodable", reason=str(error))
        else:
            handler(message)

    def _partition(self, key: bytes) -> int:
        return zlib.crc32(key) % self._partitions
