"""Requests that nobody waits for: made, asked about, cancelled, and read again from the log.

``POST /async_run_remote``, ``GET`` and ``DELETE /async_request/{id}``, ``GET /async_request/{id}/events``. The last
three take the id of any request, that of a ``/run_remote`` too, for as long as the log keeps its answer.
"""

import asyncio
from contextlib import suppress
from http import HTTPStatus
from typing import Annotated, Any, Literal

import msgspec
from starlette.routing import Route
from starlette.types import Receive, Send
from starlette.types import Scope as ASGIScope

from chains_stream.calls import RemoteTarget
from chains_stream.codec import Codec
from chains_stream.control import Cancel, Reading
from chains_stream.errors import BrokerError, InvalidArgumentError, OffsetExpiredError, OverloadedError, StoreError
from chains_stream.following import Following
from chains_stream.gateway import problems
from chains_stream.gateway.claims import Claim
from chains_stream.gateway.endpoint import JSON, Endpoint, Shared
from chains_stream.gateway.exchange import Exchange, Header
from chains_stream.gateway.ids import RequestId
from chains_stream.gateway.limits import Place
from chains_stream.gateway.past import outcome
from chains_stream.gateway.problems import Refusal
from chains_stream.gateway.results import LAST_ATTEMPT, Known, Status
from chains_stream.gateway.streaming import EVENTS, LINES, Forms, Stream, media_types
from chains_stream.messages import Cancelled, Request, Retry, encode_frames, now_ms
from chains_stream.policy import Scope
from chains_stream.posting import check_url
from chains_stream.signature import background_topic

MAX_QUEUE_SECONDS = 72 * 3600  # that a request may wait, as with Baseten
QUEUE_SECONDS = 600
MADE_WITHIN = 30.0  # seconds in which a gateway has made a request after claiming its key, or has died
MARGIN = 1.0  # seconds of a request's time that are left for its answer
MAX_DIGITS = 15  # of the number of a chunk
RETRY_AFTER = b"1"  # seconds until it is worth asking again

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


class Queue(msgspec.Struct):
    """How much there is to do: requests that wait, of both classes, and those that run."""

    num_queued_requests: int
    num_in_progress_requests: int


class Cancellation(msgspec.Struct):
    """What became of a request that was to be cancelled; `canceled` says whether that came before its end."""

    request_id: str
    status: Status
    canceled: bool


def routes(shared: Shared, codec: Codec, target: RemoteTarget) -> list[Route]:
    """Give the routes; `codec` and `target` are those of the entrypoint."""
    one = "/async_request/{request_id}"
    return [
        Route("/async_run_remote", Submit(shared, codec, target), methods=["POST"]),
        Route(one, _One(Ask(shared, codec), Stop(shared, codec)), methods=["GET", "DELETE"]),
        Route("/async_queue_status", Count(shared), methods=["GET"]),
        Route(f"{one}/events", Replay(shared, codec), methods=["GET"]),
    ]


class Submit(Endpoint):
    """The endpoint of `/async_run_remote`."""

    def __init__(self, shared: Shared, codec: Codec, target: RemoteTarget) -> None:
        super().__init__(shared)
        self._codec = codec
        self._topic = target.topic
        self._fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
        self._decoder = msgspec.json.Decoder(Submission)

    async def handle(self, exchange: Exchange, place: Place) -> None:
        past = self.shared.past
        scope = exchange.begin(self.settings.deadline)
        where = past.results.place(exchange.correlation_id)
        exchange.request_id = scope.request_id = past.ids.mint(where, exchange.owner)
        with exchange.wanted(scope):
            body = await self.body(exchange, place) or b"{}"
            submission = self._read(body)
            arguments = self._codec.arguments_from_json(submission.model_input)
            if submission.webhook_endpoint is not None:
                check_url(submission.webhook_endpoint, allow_private=self.settings.webhook_allow_private)
            claim = await self.claim(exchange, body)
            if claim is not None and claim.earlier is not None:
                await self._check_made(exchange, claim)
                await _accept(exchange, claim.earlier)
                return
            past.results.expect(exchange.correlation_id)
            topic = background_topic(self._topic) if submission.priority else self._topic
            request = self._request(where, submission, scope)
            try:
                stored = await past.caller.post(topic, arguments, request, scope.affinity)
            except BaseException:
                if claim is not None:
                    claim.release()
                raise
            if claim is not None:  # a client that leaves now asks again, and is told of this one
                stored.add_done_callback(claim.settle)
            await asyncio.shield(stored)
            if claim is not None:
                await claim.tell_made()
            await _accept(exchange, scope.request_id)

    async def _check_made(self, exchange: Exchange, claim: Claim) -> None:
        """Raise Refusal for a key whose request may not have been made: its gateway died, or is still about it."""
        if claim.made:
            return
        past = self.shared.past
        found = past.ids.read(claim.earlier or "", exchange.owner)
        if found is not None and (await past.known(found)).status is not Status.QUEUED:
            return
        if claim.age > MADE_WITHIN:
            claim.release()
        raise Refusal(
            HTTPStatus.CONFLICT,
            "idempotency-key-in-use",
            "the request with this idempotency key is still being made",
            headers={"retry-after": RETRY_AFTER.decode()},
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
            reply_topic=self.shared.past.results.topic,
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

    def __init__(self, shared: Shared, codec: Codec) -> None:
        super().__init__(shared)
        self._codec = codec

    async def handle(self, exchange: Exchange, place: Place) -> None:
        text = exchange.path_parameters["request_id"]
        found = self.shared.past.ids.read(text, exchange.owner)
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


class Ask(_OfOne):
    """`GET /async_request/{id}`: what became of it; with ``Prefer: wait=<seconds>`` once it has ended, or then."""

    async def about(self, exchange: Exchange, place: Place, text: str, found: RequestId, scope: Scope) -> None:
        known = await self.shared.past.known(found)
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
        # Nothing of a stream is taken: its own reader says how quickly it comes.
        past = self.shared.past
        following = None if found.kind == "results" else past.follow(found, scope, credits_worker=False)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, seconds)):
                    await (known.final() if following is None else _ended(following))
        finally:
            if following is not None:
                following.close()
        return known if following is None else await self.shared.past.known(found)

    async def _add_outcome(self, report: Report, place: Place, known: Known, found: RequestId, scope: Scope) -> None:
        """Read the result, or the error, from the log."""
        assert known.end is not None, "it has ended"
        begin = known.run or (known.end, 0)  # what tries before the last one sent does not count
        following = self.shared.past.follow(found, scope, begin=begin)
        try:
            report.result = msgspec.Raw(await outcome(following, self._codec, place))
        except Exception as error:
            if not problems.is_known(error) or _is_ours(error, following):
                raise
            report.error = problems.of_error(error, report.request_id)
        finally:
            following.close()


class Stop(_OfOne):
    """`DELETE /async_request/{id}`: it is not begun, or it is stopped where it runs."""

    async def about(self, exchange: Exchange, place: Place, text: str, found: RequestId, scope: Scope) -> None:  # noqa: ARG002 - _OfOne's
        past = self.shared.past
        known = await self.shared.past.known(found)
        canceled = False
        if not known.status.final:
            # For readers the log decides: the first end that it has of an answer is the end.
            frame = encode_frames([Cancelled(found.correlation_id, LAST_ATTEMPT)])
            stored = await past.broker.publish(past.topic_of(found), frame, partition=found.partition)
            cancel = Cancel(found.correlation_id, 0, 0)
            for topic in (past.topic, background_topic(past.topic)):
                await past.caller.control.send(topic, cancel)
            at = await stored
            if found.kind == "results":
                await known.final()
            else:
                known = await self.shared.past.known(found)
            canceled = known.end == at
        body = msgspec.json.encode(Cancellation(text, known.status, canceled))
        await _write(exchange, HTTPStatus.OK, body)


class _One:
    """The endpoint of a path that is asked about, and deleted."""

    def __init__(self, ask: Ask, stop: Stop) -> None:
        self._ask = ask
        self._stop = stop

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        await (self._stop if scope["method"] == "DELETE" else self._ask)(scope, receive, send)


class Replay(_OfOne):
    """`GET /async_request/{id}/events`: the answer as a stream, from its beginning or after what the reader has."""

    def __init__(self, shared: Shared, codec: Codec) -> None:
        super().__init__(shared, codec)
        kinds = media_types(codec) if codec.signature.streaming else [EVENTS, LINES]
        self._forms = Forms(codec, sorted(kinds, key=lambda kind: kind != EVENTS))

    async def about(self, exchange: Exchange, place: Place, text: str, found: RequestId, scope: Scope) -> None:  # noqa: ARG002 - _OfOne's
        form = self._forms.choose(exchange.accept)
        assert form is not None, "a stream has one"
        had, past = _had(exchange), self.shared.past
        await past.check(found)
        # Who has nothing yet is shown the last run alone: what those before it sent would be the end of the stream.
        begin = (await past.known(found)).run if found.kind == "results" and not had else None
        following = past.follow(found, scope, had=had, begin=begin)
        source = following if self._codec.signature.streaming else _Single(following, had)
        past.caller.tell(following, Reading(found.correlation_id, here=True))
        try:
            await Stream(exchange, source, form, self.shared.pulse, first=had).run(at_once=True)
        except asyncio.CancelledError:
            exchange.tell = None  # it is this reading that ends, and not what is read: no reader may take it for that
            raise
        finally:
            following.close()
            past.caller.tell(following, Reading(found.correlation_id, here=False))


class Count(Endpoint):
    """`GET /async_queue_status`: how many requests wait, and run, as the broker and the workers know it."""

    async def handle(self, exchange: Exchange, place: Place) -> None:
        past = self.shared.past
        topics = (past.topic, background_topic(past.topic))
        with exchange.wanted(exchange.begin(self.settings.deadline)):
            await exchange.body(0, place.hold)
            backlog = sum([await past.broker.backlog(topic, topic) for topic in topics])
            running = min(backlog, past.caller.running(past.topic))  # workers report all that they run to either
            await _write(exchange, HTTPStatus.OK, msgspec.json.encode(Queue(backlog - running, running)))


class _Single:
    """A result as a stream of one chunk."""

    chunks = 1

    def __init__(self, following: Following, had: int) -> None:
        self._following = following
        self._given = had > 0
        self._waiting: asyncio.Future[Any] | None = None

    async def next(self) -> list[msgspec.Raw] | None:
        if self._given:
            await self._following.result()
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


def _is_ours(error: Exception, following: Following) -> bool:
    """Tell whether an error is met in reading an answer, and is no part of it."""
    return isinstance(error, BrokerError | StoreError | OverloadedError) and error is not following.failure


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
    named = [
        exchange.query.get("starting_after"),
        exchange.headers.get(b"last-event-id", b"").decode("latin-1") or None,
    ]
    for last in named:
        if last is not None and not (last.isascii() and last.isdigit() and len(last) <= MAX_DIGITS):
            raise Refusal(
                HTTPStatus.BAD_REQUEST,
                "invalid-position",
                "`last-event-id`, or `starting_after`, should be the number of the last chunk that was read, say 41",
            )
    return next((int(last) + 1 for last in named if last is not None), 0)


async def _accept(exchange: Exchange, request_id: str) -> None:
    body = msgspec.json.encode(Accepted(request_id, Status.QUEUED))
    where = (b"location", f"/async_request/{request_id}".encode())
    await _write(exchange, HTTPStatus.ACCEPTED, body, where, (b"retry-after", RETRY_AFTER))


async def _write(exchange: Exchange, status: int, body: bytes, *headers: Header) -> None:
    await exchange.start(status, _IS_JSON, (b"content-length", b"%d" % len(body)), *headers)
    await exchange.finish(body)
