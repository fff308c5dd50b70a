"""The control topic: what callers and workers tell each other about requests that are under way.

A message concerns one request topic, and goes to the partition that the topic's name hashes to, under that name as its
key; one without a key is for everybody, and goes to all partitions. A process reads only the partitions that it needs.
"""

import asyncio
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping

import msgspec

from chains_stream.broker import Broker, Reader, TopicSpec
from chains_stream.errors import OffsetExpiredError
from chains_stream.log import get_logger
from chains_stream.messages import now_ms
from chains_stream.settings import Settings

PARTITIONS = 64
READ_BACK_SECONDS = 10.0  # that reading back may take, until a process goes on without

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


class CancelRequest(msgspec.Struct, tag=2, array_like=True, frozen=True):
    """Stop all that is done for a request, or skip it where it still waits: an operator's way to cancel."""

    request_id: str


class Load(msgspec.Struct, tag=3, array_like=True, frozen=True):
    """How busy a worker is: it runs `running` of the `capacity` requests that it may, and `waiting` wait for it.

    `at_ms` is Unix time; `partitions` are those of the request topic that it holds.
    """

    worker: bytes
    at_ms: int
    partitions: list[int]
    running: int
    waiting: int
    capacity: int


class Reading(msgspec.Struct, tag=4, array_like=True, frozen=True):
    """Somebody has come to read an answer from the log, or, if it is not `here`, has left."""

    correlation_id: bytes
    here: bool


Message = Cancel | Credit | CancelRequest | Load | Reading
Handler = Callable[[Message], None]

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


class Control:
    """This process's side of the control topic: it sends, and hands what it reads to the handlers of each topic."""

    def __init__(self, broker: Broker, settings: Settings) -> None:
        self._broker = broker
        self._topic = f"{settings.namespace}.control"
        self._retention_ms = settings.reply_retention_ms
        self._handlers: defaultdict[bytes, list[Handler]] = defaultdict(list)
        self._positions: dict[int, int | None] = {}  # where to go on; None is the end
        self._goals: dict[int, int] = {}  # up to which `follow` waits for what lies further back
        self._reached = asyncio.Event()
        self._following = asyncio.Lock()
        self._reader: Reader | None = None
        self._task: asyncio.Task[None] | None = None
        self._failed: asyncio.Future[None] | None = None
        self._partitions = PARTITIONS

    async def start(self) -> None:
        await self._broker.ensure_topics([TopicSpec(self._topic, PARTITIONS, self._retention_ms, ring=True)])
        self._partitions = await self._broker.partitions(self._topic)  # one that existed may have another number
        self._failed = asyncio.get_running_loop().create_future()

    async def send(self, request_topic: str, message: Message) -> None:
        """Publish a message about a request on `request_topic`, and wait until it is stored. Raises BrokerError."""
        await (await self._publish(request_topic, message, durable=True))

    async def hint(self, request_topic: str, message: Message) -> None:
        """Publish a message that nobody misses if it gets lost. Raises BrokerError."""
        await self._publish(request_topic, message, durable=False)

    async def broadcast(self, message: Message) -> None:
        """Publish a message to all processes, and wait until it is stored. Raises BrokerError."""
        value = _encoder.encode(message)
        stored = [await self._broker.publish(self._topic, value, partition=p) for p in range(self._partitions)]
        await asyncio.gather(*stored)

    async def follow(self, handlers: Mapping[str, Handler], since: float = 0.0) -> None:
        """Hand each message about the given request topics to its handler, from `since` seconds ago on.

        Returns when what lies back is handed over. May be called again: handlers of one topic all get its messages, and
        the earlier ones may get some twice.
        """
        async with self._following:
            for topic, handler in handlers.items():
                self._handlers[topic.encode()].append(handler)
            wanted = {self._partition(topic.encode()) for topic in handlers}
            if not since and wanted <= self._positions.keys():
                return
            await self._stop_reading()
            goals: dict[int, int] = {}
            if since:
                begins = await self._broker.offsets_at(self._topic, wanted, now_ms() - int(since * 1000))
                goals = {p: await self._broker.end_offset(self._topic, p) for p in wanted}
                self._positions |= {p: min(begins[p], self._positions.get(p) or begins[p]) for p in wanted}
            self._positions |= dict.fromkeys(wanted - self._positions.keys())
            await self._read_from(goals)

    async def failed(self) -> None:
        """Wait until reading can't go on. Raises what stopped it."""
        if self._failed is not None:
            await asyncio.shield(self._failed)

    async def close(self) -> None:
        await self._stop_reading()

    async def _read_from(self, goals: Mapping[int, int]) -> None:
        """Open a reader, and wait until it has come to the `goals`."""
        reader = await self._open_reader()
        self._goals = {p: goal for p, goal in goals.items() if reader.position(p) < goal}
        self._reached.clear()
        self._task = asyncio.create_task(self._read(), name="control")
        if self._goals:
            try:
                async with asyncio.timeout(READ_BACK_SECONDS):
                    await self._reached.wait()
            except TimeoutError:
                log.warning("control.behind", reason=f"not read back within {READ_BACK_SECONDS:g} s", left=self._goals)

    async def _stop_reading(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)  # `failed` tells what it died of
            self._task = None
        if self._reader is not None:
            reader, self._reader = self._reader, None
            self._positions = {p: reader.position(p) for p in self._positions}
            await reader.close()

    async def _open_reader(self) -> Reader:
        if self._reader is not None:
            await self._reader.close()
        self._reader = await self._broker.read(self._topic, self._positions)
        return self._reader

    async def _read(self) -> None:
        assert self._failed is not None, "started"
        try:
            await self._read_on()
        except Exception as error:
            log.error("control.stopped", reason=str(error))  # noqa: TRY400 - a caller can do without, and hosts raise it
            if not self._failed.done():
                self._failed.set_exception(error)
                self._failed.exception()  # nobody needs to ask
            raise

    async def _read_on(self) -> None:
        reader = self._reader
        assert reader is not None, "opened before"
        while True:
            try:
                records = await reader.fetch()
            except OffsetExpiredError as error:
                log.warning("control.skipped", reason=str(error))
                self._positions = dict.fromkeys(self._positions)
                reader = await self._open_reader()
                self._arrived(reader, given_up=True)
                continue
            for record in records:
                self._handle(record.key, record.value)
            if self._goals:
                self._arrived(reader)

    def _arrived(self, reader: Reader, *, given_up: bool = False) -> None:
        self._goals = {p: goal for p, goal in self._goals.items() if reader.position(p) < goal and not given_up}
        if not self._goals:
            self._reached.set()

    def _handle(self, key: bytes | None, value: bytes) -> None:
        concerned = [self._handlers[key]] if key and key in self._handlers else [] if key else self._handlers.values()
        if not concerned:
            return
        try:
            message = _decoder.decode(value)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:  # a stranger's record
            log.warning("control.undecodable", reason=str(error))
            return
        for handlers in concerned:
            for handler in handlers:
                handler(message)

    async def _publish(self, request_topic: str, message: Message, *, durable: bool) -> asyncio.Future[int]:
        key, value = request_topic.encode(), _encoder.encode(message)
        return await self._broker.publish(self._topic, value, partition=self._partition(key), key=key, durable=durable)

    def _partition(self, key: bytes) -> int:
        return zlib.crc32(key) % self._partitions
