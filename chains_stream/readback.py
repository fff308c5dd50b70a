"""Reading back what was answered to a request before this worker got it, so that a stream can go on from there."""

import asyncio
from collections import defaultdict
from collections.abc import Iterator, Sequence

import msgspec

from chains_stream.broker import Broker, Reader, Record
from chains_stream.errors import OffsetExpiredError
from chains_stream.fold import Fold, Step
from chains_stream.log import get_logger
from chains_stream.messages import Chunk, Frame, decode_frames
from chains_stream.store import reference_in

SILENCE = 30.0  # seconds without a record, until it is asked whether there are any more

log = get_logger(__name__)


Found = tuple[Frame, str | None]  # a frame, and where its value lies if that is in the store


class Answered(msgspec.Struct, frozen=True):
    """What the reader of a stream has, or will have: its chunks, and whether it came to its end.

    A chunk that is a `str` lies in the store; this is where.
    """

    chunks: list[msgspec.Raw | str]
    ended: bool

    @classmethod
    def of(cls, frames: Sequence[Found]) -> "Answered | None":
        """Fold the frames of a call; None if some are missing."""
        fold, chunks = Fold(), list[msgspec.Raw | str]()
        for frame, reference in frames:
            if fold.begins_again(frame):
                chunks.clear()
            match fold.take(frame):
                case Step.CHUNK:
                    assert isinstance(frame, Chunk), "no other frame is one"
                    chunks.append(reference or frame.value)
                case Step.END:
                    return cls(chunks, ended=True)
                case Step.GAP:
                    return None
                case Step.DROP:
                    pass
        return cls(chunks, ended=False)


class _Wanted:
    """The frames of one call, from the offset `begin` on and before `end`."""

    def __init__(self, correlation_id: bytes, begin: int, end: int) -> None:
        self.correlation_id = correlation_id
        self.begin = begin
        self.end = end
        self.frames: list[Found] = []
        self.read: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class ReadBack:
    """Reads reply partitions, one pass over a partition for all calls that wait for one."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._wanted: dict[tuple[str, int], list[_Wanted]] = {}
        self._reading: dict[tuple[str, int], asyncio.Task[None]] = {}

    async def frames(self, topic: str, partition: int, begin: int, end: int, correlation_id: bytes) -> list[Found]:
        """Give the frames of a call that lie from `begin` on and before `end`, which the log reaches.

        Raises BrokerError; OffsetExpiredError if the log does not hold `begin` any more.
        """
        place, wanted = (topic, partition), _Wanted(correlation_id, begin, end)
        self._wanted.setdefault(place, []).append(wanted)
        if place not in self._reading:
            self._reading[place] = asyncio.create_task(self._read(place), name="read back")
        await wanted.read
        return wanted.frames

    async def close(self) -> None:
        for task in self._reading.values():
            task.cancel()
        await asyncio.gather(*self._reading.values(), return_exceptions=True)  # whoever waited has what they raised

    async def _read(self, place: tuple[str, int]) -> None:
        wanted: list[_Wanted] = []
        try:
            while wanted := self._wanted.pop(place, []):
                try:
                    await self._passes(*place, wanted)
                except Exception as error:  # noqa: BLE001 - it is raised where the frames are waited for
                    for one in wanted:
                        if not one.read.done():
                            one.read.set_exception(error)
        finally:
            del self._reading[place]
            for one in (*wanted, *self._wanted.pop(place, [])):
                one.read.cancel()

    async def _passes(self, topic: str, partition: int, wanted: Sequence[_Wanted]) -> None:
        """Read for all at once; for each by itself, if the log does not hold any more where one of them begins."""
        try:
            await self._pass(topic, partition, wanted)
        except OffsetExpiredError as error:
            if len(wanted) == 1:
                wanted[0].read.set_exception(error)
                return
            for one in wanted:
                if not one.read.done():
                    one.frames.clear()
                    await self._passes(topic, partition, [one])

    async def _pass(self, topic: str, partition: int, wanted: Sequence[_Wanted]) -> None:
        by_id: defaultdict[bytes, list[_Wanted]] = defaultdict(list)
        for one in wanted:
            by_id[one.correlation_id].append(one)
        end = max(one.end for one in wanted)
        reader = await self._broker.read(topic, {partition: min(one.begin for one in wanted)})
        try:
            _tell(wanted, reader.position(partition))  # of some there may be nothing to read
            while reader.position(partition) < end:
                for record in await self._fetch(reader, topic, partition, end):
                    for frame, reference in found_in(record):
                        for one in by_id.get(frame.correlation_id, ()):
                            if one.begin <= record.offset < one.end:
                                one.frames.append((frame, reference))
                _tell(wanted, reader.position(partition))
        finally:
            await reader.close()

    async def _fetch(self, reader: Reader, topic: str, partition: int, end: int) -> list[Record]:
        """Wait for records. Raises OffsetExpiredError if the log has lost its end, as that of a topic made anew."""
        while True:
            limit = asyncio.timeout(SILENCE)
            try:
                async with limit:
                    return await reader.fetch()
            except TimeoutError:
                if not limit.expired():
                    raise
                if (now := await self._broker.end_offset(topic, partition)) < end:
                    raise OffsetExpiredError(f"{topic} ends at {now}, and was read up to {end} before") from None


def _tell(wanted: Sequence[_Wanted], position: int) -> None:
    for one in wanted:
        if one.end <= position and not one.read.done():
            one.read.set_result(None)


def found_in(record: Record) -> Iterator[Found]:
    """Give the frames of a reply record; none of one that is not ours."""
    try:
        frames = decode_frames(record.value)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):  # a stranger's, or an answer to one
        return
    reference = reference_in(record.headers)
    if reference is None or len(frames) == 1:  # a value in the store stands alone in its record
        for frame in frames:
            yield frame, reference
