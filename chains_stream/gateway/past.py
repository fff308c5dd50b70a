"""Requests that were made before, through this gateway or another: what became of them, and their answers."""

from chains_stream.broker import Broker
from chains_stream.calls import Caller
from chains_stream.codec import Codec
from chains_stream.errors import OffsetExpiredError, UnknownTopicError
from chains_stream.following import Follower, Following
from chains_stream.gateway.exchange import PIECE
from chains_stream.gateway.ids import Ids, RequestId, secret_of
from chains_stream.gateway.limits import Place
from chains_stream.gateway.results import Known, Results
from chains_stream.policy import Scope
from chains_stream.settings import Settings


class Past:
    """Looks back into the log, for requests on one request topic."""

    def __init__(
        self, broker: Broker, caller: Caller, settings: Settings, topic: str, modules: tuple[str, ...]
    ) -> None:
        self.broker = broker
        self.caller = caller
        self.topic = topic
        self.ids = Ids(secret_of(settings), topic)
        self.results = Results(broker, settings)
        self._follower = Follower(broker, caller, settings, modules)
        self._namespace = settings.namespace

    async def start(self) -> None:
        await self.results.start()

    async def close(self) -> None:
        await self._follower.close()
        await self.results.close()

    def topic_of(self, found: RequestId) -> str:
        """Name the topic that the answer to a request lies in."""
        return f"{self._namespace}.{found.kind}"

    async def check(self, found: RequestId) -> None:
        """Raise OffsetExpiredError if the log does not reach to a request, in the past or, made anew, at its end."""
        end = await self._end(found)
        begin = await self.broker.begin_offset(self.topic_of(found), found.partition)
        if not begin <= found.offset <= end:
            raise OffsetExpiredError("the log no longer holds the answer to this request")

    async def known(self, found: RequestId) -> Known:
        """Find out what became of a request so far. Raises OffsetExpiredError, BrokerError."""
        if found.kind == "results":
            return await self.results.find(found)
        known = Known()
        await self.results.scan(self.topic_of(found), found, await self._end(found), known)
        return known

    async def _end(self, found: RequestId) -> int:
        try:
            return await self.broker.end_offset(self.topic_of(found), found.partition)
        except UnknownTopicError:
            raise OffsetExpiredError("the log has no such partition any more") from None

    def follow(
        self,
        found: RequestId,
        scope: Scope,
        *,
        begin: tuple[int, int] | None = None,
        had: int = 0,
        topic: str | None = None,
        credits_worker: bool = True,
    ) -> Following:
        """Give the answer to a request, on `topic` if not ours, which may still be coming. Close it.

        It is read from where its frames `begin`, an offset and an attempt, if more is known than the id says. Unless it
        `credits_worker`, a stream comes as far as its own reader has it sent.
        """
        offset, attempt = (found.offset, 0) if begin is None else begin
        return self._follower.follow(
            (self.topic_of(found), found.partition),
            offset,
            found.correlation_id,
            attempt=attempt,
            topic=topic or self.topic,
            scope=scope,
            had=had,
            credits_worker=credits_worker and found.kind == "replies",
        )


async def outcome(following: Following, codec: Codec, place: Place) -> bytes:
    """Give a result as JSON, or all chunks of a stream as an array; a large one counts for its place.

    Raises what the request failed with.
    """
    if not codec.signature.streaming:
        result = codec.result_to_json(await following.result())
        if len(result) > PIECE:
            place.hold_result(len(result))
        return result
    parts, size = list[bytes](), 0
    while (chunks := await following.next()) is not None:
        parts += [codec.result_to_json(chunk) for chunk in chunks]
        size += sum(map(len, parts[len(parts) - len(chunks) :]))
        if size > PIECE:
            place.hold_result(size)
    return b"[%b]" % b",".join(parts)
