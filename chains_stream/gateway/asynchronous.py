"""Requests that nobody waits for: made, asked about, cancelled, and read again from the log.

``POST /async_run_remote``, ``GET`` and ``DELETE /async_request/{id}``, ``GET /async_request/{id}/events``. The last
three take the id of any request, that of a ``/run_remote`` too, for as long as the log keeps its answer.
"""

import asyncio
from contextlib import suppress
from http import HTTPStatus
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from starlette.routing import Route

from chains_stream.broker import Broker
from chains_stream.calls import Caller, RemoteTarget
from chains_stream.codec import Codec
from chains_stream.control import Cancel, Reading
from chains_stream.errors import InvalidArgumentError, OffsetExpiredError
from chains_stream.following import Follower, Following
from chains_stream.gateway import problems
from chains_stream.gateway.endpoint import JSON, Endpoint, Shared
from chains_stream.gateway.exchange import PIECE, Exchange, Header
from chains_stream.gateway.ids import Ids, RequestId
from chains_stream.gateway.limits import Place
from chains_stream.gateway.problems import Refusal
from chains_stream.gateway.results import LAST_ATTEMPT, Known, Results, Status
from chains_stream.gateway.streaming import EVENTS, LINES, Forms, Stream, media_types
from chains_stream.messages import Cancelled, Request, Retry, encode_frames, now_ms
from chains_stream.policy import Scope

MAX_QUEUE_SECONDS = 72 * 3600  # that a request may wait, as with Baseten
QUEUE_SECONDS = 600
MARGIN = 1.0  # seconds of a request's time that are left for its answer
MAX_DIGITS = 15  # of the number of a chunk
RETRY_AFTER = b"1"  # seconds until it is worth asking again
BACKGROUND = ".background"  # the topic of requests that others go before

_IS_JSON: Header = (b"content-type", JSON.encode())


class RetryConfig(msgspec.Struct, forbid_unknown_fields=True):
    """How often a request that failed is tried, and with which delays."""

    max_attempts: Annotated[int, msgspec.Meta(ge=1, le=10)] = 3
    initial_delay_ms: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 1_000
    max_delay_ms: Annotated[int, msgspec.Meta(ge=0, le=60_000)] = 5_000


class Submission(msgspec.Struct, forbid_unknown_fields=True):
    """The body of an asynchronous request, as Baseten's clients send it. A `priority` of 0 goes before 1 and 2."""

    model_input: msgspec.Raw
    webhook_endpoint: Annotated[str, msgspec.Meta(max_length=2048)] | None = None
    priority: Literal[0, 1, 2] = 0
    max_time_in_queue_seconds: Annotated[int, msgspec.Meta(ge=1, le=MAX_QUEUE_SECONDS)] = QUEUE_SECONDS
    inference_retry_config: RetryConfig | None = None


class Accepted(msgspec.Struct):
    """The answer to a request that was taken."""

    request_id: str
    status: Status


class Report(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What became of a request: once it has succeeded its `result`, of a stream all chunks; or else its `error`."""

    request_id: str
    status: Status
    events: str
    result: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    error: problems.Problem | None = None


class Cancellation(msgspec.Struct):
    """What became of a request that was to be cancelled; `canceled` says whether that came before its end."""

    request_id: str
    status: Status
    canceled: bool


class Parts(NamedTuple):
    """What these routes work with."""

    shared: Shared
    codec: Codec
    target: RemoteTarget
    caller: Caller
    broker: Broker
    results: Results
    follower: Follower
    ids: Ids


def routes(parts: Parts) -> list[Route]:
    one = "/async_request/{request_id}"
    return [
        Route("/async_run_remote", Submit(parts), methods=["POST"]),
        Route(one, Ask(parts), methods=["GET"]),
        Route(one, Stop(parts), methods=["DELETE"]),
        Route(f"{one}/events", Replay(parts), methods=["GET"]),
    ]


class Submit(Endpoint):
    """The endpoint of `/async_run_remote`."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts.shared)
        self._parts = parts
        self._fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
        self._decoder = msgspec.json.Decoder(Submission)

    async def handle(self, exchange: Exchange, place: Place) -> None:
        parts = self._parts
        scope = exchange.begin(self.settings.deadline)
        where = parts.results.place(exchange.correlation_id)
        exchange.request_id = scope.request_id = parts.ids.mint(where, exchange.owner)
        with exchange.wanted(scope):
            submission = self._read(await self.body(exchange, place) or b"{}")
            arguments = parts.codec.arguments_from_json(submission.model_input)
            parts.results.expect(exchange.correlation_id)
            topic = parts.target.topic + (BACKGROUND if submission.priority else "")
            request = self._request(where, submission, scope)
            await parts.caller.post(topic, arguments, request, scope.affinity)
            await _write(
                exchange,
                HTTPStatus.ACCEPTED,
                msgspec.json.encode(Accepted(scope.request_id, Status.QUEUED)),
                (b"location", f"/async_request/{scope.request_id}".encode()),
                (b"retry-after", RETRY_AFTER),
            )

    def _read(self, body: bytes) -> Submission:
        """Read a body: Baseten's if it has a `model_input`, else the arguments. Raises InvalidArgumentError."""
        try:
            if "model_input" in self._fields.decode(body):
                return self._decoder.decode(body)
        except msgspec.ValidationError as error:
            raise InvalidArgumentError(f"the asynchronous request is wrong: {error}") from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            pass  # the decoder of the arguments says what is wrong
        return Submission(msgspec.Raw(body))

    def _request(self, where: RequestId, submission: Submission, scope: Scope) -> Request:
        start_by = now_ms() + submission.max_time_in_queue_seconds * 1000
        retry = submission.inference_retry_config
        return Request(
            correlation_id=where.correlation_id,
            reply_topic=self._parts.results.topic,
            reply_partition=where.partition,
            reply_offset=where.offset,
            deadline_ms=start_by + max(0, scope.deadline_ms - now_ms()),
            request_id=scope.request_id,
            frames=True,
            traceparent=scope.traceparent,
            tracestate=scope.tracestate,
            start_by_ms=start_by,
            retry=None if retry is None else Retry(retry.max_attempts, retry.initial_delay_ms, retry.max_delay_ms),
            webhook=submission.webhook_endpoint,
            progress=True,
        )


class _OfOne(Endpoint):
    """An endpoint about one request, which its path names."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts.shared)
        self._parts = parts

    async def handle(self, exchange: Exchange, place: Place) -> None:
        text = exchange.path_parameters["request_id"]
        found = self._parts.ids.read(text, exchange.owner)
        if found is None:
            raise Refusal(HTTPStatus.NOT_FOUND, "unknown-request", "there is no request of this id, or it is not yours")
        scope = exchange.begin(self.settings.deadline)
        try:
            with exchange.wanted(scope):
                await exchange.body(0, place.hold)
                await self.about(exchange, place, text, found, scope)
        except OffsetExpiredError as error:
            if exchange.started:
                raise
            raise Refusal(HTTPStatus.GONE, "gone", "the answer to this request is not kept any more") from error

    async def about(self, exchange: Exchange, place: Place, text: str, found: RequestId, scope: Scope) -> None:
        raise NotImplementedError

    def _topic(self, found: RequestId) -> str:
        return f"{self.settings.namespace}.{found.kind}"

    async def _known(self, found: RequestId) -> Known:
        """Find out what became of a request so far."""
        parts = self._parts
        if found.kind == "results":
            return await parts.results.find(found)
        topic, known = self._topic(found), Known()
        await parts.results.scan(topic, found, await parts.broker.end_offset(topic, found.partition), known)
        return known

    def _follow(self, found: RequestId, scope: Scope, *, offset: int | None = None, had: int = 0) -> Following:
        return self._parts.follower.follow(
            (self._topic(found), found.partition),
            found.offset if offset is None else offset,
            found.correlation_id,
            topic=self._parts.target.topic,
            scope=scope,
            had=had,
            credits_worker=found.kind == "replies",
        )


class Ask(_OfOne):
    """`GET /async_request/{id}`: what became of it; with ``Prefer: wait=<seconds>`` once it has ended, or then."""

    async def about(self, exchange: Exchange, place: Place, text: str, found: RequestId, scope: Scope) -> None:
        known = await self._known(found)
        seconds = exchange.preference("wait")
        headers: list[Header] = []
        if seconds is not None:
            headers.append((b"preference-applied", b"wait=%d" % seconds))
            if not known.status.final:
                known = await self._wait(found, known, scope, min(seconds, scope.remaining - MARGIN))
        report = Report(request_id=text, status=known.status, events=f"/async_request/{text}/events")
        if known.status in (Status.SUCCEEDED, Status.WEBHOOK_FAILED, Status.FAILED, Status.EXPIRED):
            await self._add_outcome(report, place, known, found, scope)
        if not known.status.final:
            headers.append((b"retry-after", RETRY_AFTER))
        await _write(exchange, HTTPStatus.OK, msgspec.json.encode(report), *headers)

    async def _wait(self, found: RequestId, known: Known, scope: Scope, seconds: float) -> Known:
        """Wait for the end of a request, and give what is known of it then."""
        following = None if found.kind == "results" else self._follow(found, scope)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, seconds)):
                    await (known.final() if following is None else _ended(following))
        finally:
            if following is not None:
                following.close()
        return known if following is None else await self._known(found)

    async def _add_outcome(self, report: Report, place: Place, known: Known, found: RequestId, scope: Scope) -> None:
        """Read the result, or the error, from the log."""
        streaming = self._parts.codec.signature.streaming
        following = self._follow(found, scope, offset=None if streaming else known.end)
        try:
            report.result = msgspec.Raw(await (self._chunks if streaming else self._value)(following, place))
        except Exception as error:
            if not problems.is_known(error) or isinstance(error, OffsetExpiredError):
                raise
            report.error = problems.of_error(error, report.request_id)
        finally:
            following.close()

    async def _value(self, following: Following, place: Place) -> bytes:
        result = self._parts.codec.result_to_json(await following.result())
        if len(result) > PIECE:
            place.hold_result(len(result))
        return result

    async def _chunks(self, following: Following, place: Place) -> bytes:
        """Give all chunks of a stream as a JSON array."""
        parts, size = list[bytes](), 0
        while (chunks := await following.next()) is not None:
            for chunk in chunks:
                parts.append(self._parts.codec.result_to_json(chunk))
                size += len(parts[-1])
            if size > PIECE:
                place.hold_result(size)
        return b"[%b]" % b",".join(parts)


class Stop(_OfOne):
    """`DELETE /async_request/{id}`: it is not begun, or it is stopped where it runs."""

    async def about(self, exchange: Exchange, place: Place, text: str, found: RequestId, scope: Scope) -> None:  # noqa: ARG002 - _OfOne's
        parts = self._parts
        known = await self._known(found)
        canceled = False
        if not known.status.final:
            # For readers the log decides: the first end that it has of an answer is the end.
            frame = encode_frames([Cancelled(found.correlation_id, LAST_ATTEMPT)])
            stored = await parts.broker.publish(self._topic(found), frame, partition=found.partition)
            cancel = Cancel(found.correlation_id, 0, 0)
            for topic in (parts.target.topic, parts.target.topic + BACKGROUND):
                await parts.caller.control.send(topic, cancel)
            at = await stored
            if found.kind == "results":
                await known.final()
            else:
                known = await self._known(found)
            canceled = known.end == at
        body = msgspec.json.encode(Cancellation(text, known.status, canceled))
        await _write(exchange, HTTPStatus.OK, body)


class Replay(_OfOne):
    """`GET /async_request/{id}/events`: the answer as a stream, from its beginning or after what the reader has."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        kinds = media_types(parts.codec) if parts.codec.signature.streaming else [EVENTS, LINES]
        self._forms = Forms(parts.codec, sorted(kinds, key=lambda kind: kind != EVENTS))

    async def about(self, exchange: Exchange, place: Place, text: str, found: RequestId, scope: Scope) -> None:  # noqa: ARG002 - _OfOne's
        form = self._forms.choose(exchange.accept)
        assert form is not None, "a stream has one"
        had, parts = _had(exchange), self._parts
        if found.offset < await parts.broker.begin_offset(self._topic(found), found.partition):
            raise OffsetExpiredError("the log no longer holds the answer to this request")
        following = self._follow(found, scope, had=had)
        source = following if parts.codec.signature.streaming else _Single(following, had)
        parts.caller.tell(following, Reading(found.correlation_id, here=True))
        try:
            await Stream(exchange, source, form, self.shared.pulse, first=had).run(at_once=True)
        except asyncio.CancelledError:
            exchange.tell = None  # it is this reading that ends, and not what is read: no reader may take it for that
            raise
        finally:
            following.close()
            parts.caller.tell(following, Reading(found.correlation_id, here=False))


class _Single:
    """A result as a stream of one chunk."""

    def __init__(self, following: Following, had: int) -> None:
        self._following = following
        self._given = had > 0
        self._waiting: asyncio.Future[Any] | None = None

    async def next(self) -> list[msgspec.Raw] | None:
        if self._given:
            return None
        self._waiting = asyncio.get_running_loop().create_future()
        result: asyncio.Future[Any] = asyncio.ensure_future(self._following.result())
        try:
            await asyncio.wait([result, self._waiting], return_when=asyncio.FIRST_COMPLETED)
            if not result.done():
                return []
            self._given = True
            return [result.result()]
        finally:
            if not result.done():
                result.cancel()
                await asyncio.wait([result])

    def nudge(self) -> None:
        """Have whoever waits be given nothing."""
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)


async def _ended(following: Following) -> None:
    """Wait for the end of an answer, whatever it is."""
    try:
        while await following.next() is not None:
            pass
    except Exception as error:
        if not problems.is_known(error):
            raise


def _had(exchange: Exchange) -> int:
    """Give how many chunks the reader has: it names the last one. Raises Refusal."""
    last = exchange.query.get("starting_after")
    if last is None:
        last = exchange.headers.get(b"last-event-id", b"").decode("latin-1") or None
    if last is None:
        return 0
    if not (last.isascii() and last.isdigit() and len(last) <= MAX_DIGITS):
        raise Refusal(
            HTTPStatus.BAD_REQUEST,
            "invalid-position",
            "`last-event-id`, or `starting_after`, should be the number of the last chunk that was read, such as 41",
        )
    return int(last) + 1


async def _write(exchange: Exchange, status: int, body: bytes, *headers: Header) -> None:
    await exchange.start(status, _IS_JSON, (b"content-length", b"%d" % len(body)), *headers)
    await exchange.finish(body)
