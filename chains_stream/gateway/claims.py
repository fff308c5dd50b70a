"""Idempotency keys: of the requests with one key, through any gateway, one runs.

Whoever has a request with a key appends a claim to `{namespace}.idempotency`, and reads on until it meets its own: the
first in the log has won. Claims are kept for a day. Source: draft-ietf-httpapi-idempotency-key-header.
"""

import asyncio
import hashlib
import zlib
from collections import OrderedDict
from http import HTTPStatus

import msgspec

from chains_stream.broker import Broker, Reader, TopicSpec
from chains_stream.errors import BrokerError, OffsetExpiredError
from chains_stream.gateway.problems import Refusal
from chains_stream.log import get_logger
from chains_stream.messages import now_ms
from chains_stream.settings import Settings

HEADER = "idempotency-key"
MAX_KEY = 255  # bytes
MOST_CLAIMS = 200_000  # that are remembered, the latest
RETENTION_MS = 24 * 3_600_000
PARTITIONS = 8

log = get_logger(__name__)


class Claimed(msgspec.Struct, tag=0, array_like=True, frozen=True):
    """A request with a key; `body` is a hash of what it asks for, `at_ms` Unix time."""

    key: bytes
    body: bytes
    request_id: str
    at_ms: int


class Released(msgspec.Struct, tag=1, array_like=True, frozen=True):
    """The request did not run, or its failure is one that repeating it may mend: its key may be used again."""

    key: bytes
    request_id: str


class Made(msgspec.Struct, tag=2, array_like=True, frozen=True):
    """The asynchronous request with a key is stored: whoever repeats it is told of it."""

    key: bytes
    request_id: str


_Message = Claimed | Released | Made
_decoder: msgspec.msgpack.Decoder[_Message] = msgspec.msgpack.Decoder(_Message)


class _Winner(msgspec.Struct):
    """What is known of a key: whose it is, and whether that one is `Made`."""

    claimed: Claimed
    made: bool = False


class Claim:
    """The key of one request; `earlier` is the id of the request that had it first, `age` ago, if there is one.

    `made` says whether that one is known to be stored; only asynchronous requests tell.
    """

    def __init__(self, claims: "Claims", key: bytes, request_id: str, winner: Claimed, *, made: bool) -> None:
        self.earlier = winner.request_id if winner.request_id != request_id else None
        self.made = made
        self.age = max(0.0, (now_ms() - winner.at_ms) / 1000)  # seconds
        self._claims = claims
        self._key = key
        self._request_id = request_id

    def settle(self, stored: asyncio.Future[int]) -> None:
        """Let the key be used again if the request that it is of was not stored."""
        if stored.cancelled() or stored.exception() is not None:
            self.release()

    async def tell_made(self) -> None:
        """Tell all that the request is stored."""
        await self._claims.tell_made(self._key, self._request_id)

    def release(self) -> None:
        """Let the key be used again."""
        self._claims.release(self._key, self.earlier or self._request_id)


class Claims:
    """Appends and follows the claims of a namespace."""

    def __init__(self, broker: Broker, settings: Settings) -> None:
        self._broker = broker
        self._topic = f"{settings.namespace}.idempotency"
        self._winners: OrderedDict[bytes, _Winner] = OrderedDict()
        self._waiting: dict[str, asyncio.Future[_Winner]] = {}  # by request id, until our claim is read
        self._releasing: set[asyncio.Task[None]] = set()
        self._partitions = PARTITIONS
        self._reader: Reader | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to read what was claimed in the last day."""
        await self._broker.ensure_topics([TopicSpec(self._topic, PARTITIONS, RETENTION_MS, ring=True)])
        self._partitions = await self._broker.partitions(self._topic)
        await self._open()
        self._task = asyncio.create_task(self._read(), name="claims")

    async def failed(self) -> None:
        """Wait until claims can't be read any more. Raises what stopped it."""
        if self._task is not None:
            await asyncio.shield(self._task)

    async def close(self) -> None:
        if self._releasing:
            await asyncio.wait(self._releasing)
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)  # `failed` tells what it died of
        if self._reader is not None:
            await self._reader.close()

    async def claim(self, key: bytes, owner: str, body: bytes, request_id: str) -> Claim:
        """Claim a key for a request whose body hashes to `body`. Raises Refusal, BrokerError."""
        if not 0 < len(key) <= MAX_KEY:
            raise Refusal(
                HTTPStatus.BAD_REQUEST, "invalid-header", f"the header {HEADER} should have 1 to {MAX_KEY} characters"
            )
        digest = hashlib.sha256(owner.encode() + b"\0" + key).digest()
        if self._task is None or self._task.done():
            raise BrokerError("claims can't be read any more")
        read = self._waiting[request_id] = asyncio.get_running_loop().create_future()
        try:
            await self._append(Claimed(digest, body, request_id, now_ms()))
            winner = await read
        except BaseException:  # its client left, say: it may be the first in the log, and nobody would run the request
            self.release(digest, request_id)
            raise
        finally:
            del self._waiting[request_id]
        claimed = winner.claimed
        if claimed.body != body:
            raise Refusal(
                HTTPStatus.UNPROCESSABLE_ENTITY,
                "idempotency-key-reused",
                f"this {HEADER} was used before, for a request with another body",
            )
        return Claim(self, digest, request_id, claimed, made=winner.made)

    async def tell_made(self, key: bytes, request_id: str) -> None:
        try:
            await self._append(Made(key, request_id))
        except BrokerError as error:
            log.warning("claim.untold", reason=str(error))  # should it be repeated later, it may run once more

    def release(self, key: bytes, request_id: str) -> None:
        task = asyncio.create_task(self._release(Released(key, request_id)), name="release")
        self._releasing.add(task)
        task.add_done_callback(self._releasing.discard)

    async def _release(self, message: Released) -> None:
        try:
            await self._append(message)
        except BrokerError as error:
            log.warning("claim.unreleased", reason=str(error))  # the key is answered for, for a day

    async def _append(self, message: _Message) -> None:
        partition = zlib.crc32(message.key) % self._partitions
        value = msgspec.msgpack.encode(message)
        await (await self._broker.publish(self._topic, value, partition=partition, key=message.key))

    async def _open(self) -> None:
        begins = {p: await self._broker.begin_offset(self._topic, p) for p in range(self._partitions)}
        self._reader = await self._broker.read(self._topic, begins)

    async def _read(self) -> None:
        try:
            while True:
                assert self._reader is not None, "opened before"
                try:
                    for record in await self._reader.fetch():
                        self._take(record.value)
                except OffsetExpiredError:
                    await self._reader.close()
                    await self._open()
        finally:
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_exception(BrokerError("claims can't be read any more"))

    def _take(self, value: bytes) -> None:
        try:
            message = _decoder.decode(value)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:  # a stranger's record
            log.warning("claim.undecodable", reason=str(error))
            return
        winner = self._winners.get(message.key)
        match message:
            case Released(request_id=request_id):
                if winner is not None and winner.claimed.request_id == request_id:
                    del self._winners[message.key]
            case Made(request_id=request_id):
                if winner is not None and winner.claimed.request_id == request_id:
                    winner.made = True
            case Claimed(request_id=request_id):
                # By their own times, so that all gateways agree, however far back each has read.
                if winner is None or message.at_ms - winner.claimed.at_ms > RETENTION_MS:
                    self._winners[message.key] = _Winner(message)
                    self._winners.move_to_end(message.key)
                    if len(self._winners) > MOST_CLAIMS:
                        self._winners.popitem(last=False)
                if (waiting := self._waiting.get(request_id)) is not None and not waiting.done():
                    waiting.set_result(self._winners[message.key])
