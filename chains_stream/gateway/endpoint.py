"""What every route that runs a Chain does around its own work: a place, a deadline, the end that a failure makes."""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus

import msgspec
from starlette.exceptions import HTTPException
from starlette.types import Receive, Send
from starlette.types import Scope as ASGIScope

from chains_stream.answers import Answer
from chains_stream.calls import Call, FellBehindError, RemoteTarget
from chains_stream.errors import ChainsError, GatewayError, OffsetExpiredError, OverloadedError, is_retryable
from chains_stream.gateway import problems
from chains_stream.gateway.claims import Claim, Claims
from chains_stream.gateway.exchange import KEY_HEADER, ClientLeftError, Exchange, exchange_of
from chains_stream.gateway.ids import RequestId
from chains_stream.gateway.kept import Kept
from chains_stream.gateway.limits import Limits, Place
from chains_stream.gateway.past import Past
from chains_stream.gateway.problems import Problem, Refusal
from chains_stream.gateway.streaming import Form, Pulse, Stream
from chains_stream.policy import Scope
from chains_stream.settings import Settings

JSON = "application/json"
ENDED_AFTER = 60.0  # seconds after its deadline when a request has its answer, or never will

_JSON = JSON.encode()
_HINT = f"send a JSON object with `content-type: {JSON}` (curl --json does)"


class Shared:
    """What the endpoints of one gateway have in common."""

    def __init__(self, settings: Settings, past: Past, claims: Claims) -> None:
        self.settings = settings
        self.past = past
        self.claims = claims
        self.limits = Limits(settings)
        self.pulse = Pulse()
        self.kept = Kept(settings.max_requests)
        self.exchanges: set[Exchange] = set()  # that an endpoint answers

    def interrupt(self) -> None:
        """End the requests that are still under way, with an answer that says so."""
        for exchange in tuple(self.exchanges):
            exchange.interrupt(GatewayError("the gateway stopped before the answer was complete", status=503))


class Endpoint:
    """Answers the requests of one route; an ASGI app. Those derived from it have a `handle`."""

    def __init__(self, shared: Shared) -> None:
        self.shared = shared
        self.settings = shared.settings

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - the exchange has both
        if scope["path"].endswith("\n"):  # Starlette's patterns end in `$`, which this may follow
            raise HTTPException(HTTPStatus.NOT_FOUND)
        exchange = exchange_of(scope)
        exchange.route = getattr(scope.get("route"), "path", exchange.route)  # a long answer lets go of the scope
        await self.serve(exchange)

    async def serve(self, exchange: Exchange) -> None:
        """Answer a request, whatever comes of it."""
        shared = self.shared
        try:
            place = shared.limits.enter(exchange.headers, exchange.owner)
        except OverloadedError as error:
            await self._fail(exchange, error)
            return
        shared.exchanges.add(exchange)
        try:
            await self.handle(exchange, place)
        except ClientLeftError:
            exchange.status = problems.CLIENT_CLOSED_REQUEST  # for the log alone
        except Refusal as refusal:
            await self.refuse(exchange, problems.of_refusal(refusal, exchange.request_id), refusal.headers)
        except Exception as error:
            if not problems.is_known(error):
                raise
            await self._fail(exchange, error)
        finally:
            shared.exchanges.discard(exchange)
            place.leave()

    async def handle(self, exchange: Exchange, place: Place) -> None:
        """Answer a request that has its place. What it raises is told to the client."""
        raise NotImplementedError

    async def refuse(self, exchange: Exchange, problem: Problem, headers: dict[str, str] | None) -> None:
        """Answer with a problem, of a request whose answer has not begun."""
        await exchange.answer(problem, headers)

    def write_problem(self, problem: Problem) -> bytes:
        """Write a problem for an answer that has begun, as JSON."""
        return msgspec.json.encode(problem)

    async def body(self, exchange: Exchange, place: Place) -> bytes:
        """Read the body, which is to be JSON; from then on notice when the client leaves. Raises Refusal."""
        _check_content(exchange.headers)
        return await exchange.body(self.settings.max_body_bytes, place.hold)

    async def claim(self, exchange: Exchange, body: bytes) -> Claim | None:
        """Claim the idempotency key that a request may have. Raises Refusal, BrokerError."""
        key = exchange.headers.get(KEY_HEADER)
        if key is None:
            return None
        digest = hashlib.sha256(exchange.route.encode() + b"\0" + body).digest()
        claim = await self.shared.claims.claim(key, exchange.owner, digest, exchange.request_id)
        if claim.earlier is not None:
            exchange.request_id = claim.earlier
        exchange.claimed = True
        return claim

    async def earlier(self, exchange: Exchange, claim: Claim) -> RequestId:
        """Give the request that was first with a key, which has ended. Raises Refusal."""
        past = self.shared.past
        assert claim.earlier is not None, "another one was first"
        found = past.ids.read(claim.earlier, exchange.owner)
        if found is None:
            raise Refusal(HTTPStatus.CONFLICT, "idempotency-key-used", "this idempotency key is not yours")
        try:
            known = await past.known(found)
        except OffsetExpiredError:
            raise Refusal(HTTPStatus.GONE, "gone", "the answer to this request is not kept any more") from None
        if not known.status.final:
            if claim.age > self.settings.deadline + ENDED_AFTER:  # its gateway died before the request was sent
                claim.release()
            raise Refusal(
                HTTPStatus.CONFLICT,
                "idempotency-key-in-use",
                f"the request with this idempotency key is still under way, as /async_request/{claim.earlier}",
                headers={"retry-after": "1", "location": f"/async_request/{claim.earlier}"},
            )
        return found

    async def run_once(
        self,
        exchange: Exchange,
        place: Place,
        target: RemoteTarget,
        body: bytes,
        arguments: bytes,
        *,
        scope: Scope,
        answer: Callable[[Answer], Awaitable[None]],
    ) -> None:
        """As `run`; but a request with an idempotency key that was run before gets the answer that it had.

        Of a request without one the body is not looked at.
        """
        if not exchange.keyed:
            await self.run(exchange, place, target, arguments, scope=scope, answer=answer)
            return
        claim = await self.claim(exchange, body)
        assert claim is not None, "it has a key"
        if claim.earlier is not None:
            following = self.shared.past.follow(await self.earlier(exchange, claim), scope)
            try:
                await answer(following)
            finally:
                following.close()
            return
        made = False

        async def answer_made(call: Answer) -> None:
            nonlocal made
            made = True
            await answer(call)

        try:
            await self.run(exchange, place, target, arguments, scope=scope, answer=answer_made)
        except BaseException as error:
            if not made or (isinstance(error, ChainsError) and not exchange.started and is_retryable(error)):
                claim.release()
            raise

    async def run(
        self,
        exchange: Exchange,
        place: Place,
        target: RemoteTarget,
        arguments: bytes,
        *,
        scope: Scope,
        answer: Callable[[Call], Awaitable[None]],
    ) -> None:
        """Run the Chain, and have `answer` write what comes of it. Whoever leaves before its end has it cancelled."""
        kept = self.shared.kept
        call = await target.open(arguments, scope, 1, exchange.correlation_id or None)
        del arguments  # from here on the broker's own buffer bounds it
        place.hold(0)
        seconds = self._resume_seconds(exchange, scope)
        if seconds:
            kept.watch(call)
        try:
            await answer(call)
        except asyncio.CancelledError:
            if exchange.left and seconds and kept.keep(call, seconds):
                raise
            kept.forget(call)
            # A gateway that ends cancels nothing: the request runs on to its deadline. Where that has come, its worker
            # knows, and says what is to be told to whoever asks again.
            if exchange.claimed and not exchange.left and not exchange.interrupted:
                call.let_run()
            elif not exchange.interrupted:
                call.close()
            raise
        except BaseException:
            kept.forget(call)
            call.close()
            raise
        kept.forget(call)
        call.close()

    async def stream(self, exchange: Exchange, form: Form, call: Answer) -> None:
        """Answer with a stream. A reader that another one leaves far behind is given the rest from the log."""
        stream = Stream(exchange, call, form, self.shared.pulse)
        if not isinstance(call, Call):
            return await stream.run()
        call.can_fall_behind = True
        try:
            return await stream.run()
        except FellBehindError:
            pass
        past = self.shared.past
        found = past.ids.read(exchange.request_id, exchange.owner)
        assert found is not None, "it is our own"
        following = past.follow(found, call.scope, had=stream.sequence, topic=call.topic)
        try:
            return await stream.go_on(following)
        finally:
            call.answered = following.answered
            following.close()

    def _resume_seconds(self, exchange: Exchange, scope: Scope) -> float | None:
        """Give how long a request goes on after its client has left; one that claimed a key may be asked again."""
        if exchange.claimed:
            return max(0.0, scope.remaining)
        return exchange.preference("resume")

    async def _fail(self, exchange: Exchange, error: Exception) -> None:
        """Tell the client of an error, in the way that is left at this point of the answer."""
        problem = problems.of_error(error, exchange.request_id)
        if not exchange.started:
            await self.refuse(exchange, problem, {"connection": "close"} if exchange.sending else None)
        else:
            exchange.error = problem.code
            tell = exchange.tell
            await exchange.end_early(None if tell is None else tell(self.write_problem(problem)))


def _check_content(headers: Mapping[bytes, bytes]) -> None:
    """Refuse a body that is not JSON, before it is read."""
    coding, kind = headers.get(b"content-encoding", b"identity"), headers.get(b"content-type")
    if kind == _JSON and coding == b"identity":
        return
    if headers.get(b"content-length", b"0") == b"0" and b"transfer-encoding" not in headers:
        return
    if coding != b"identity":
        raise _unsupported(f"the body is encoded as `{coding.decode('latin-1')}`; send it as it is")
    if kind is None:
        raise _unsupported(f"the body has no content type; {_HINT}")
    given = kind.decode("latin-1")
    essence = given.partition(";")[0].strip().lower()
    if essence != JSON and not (essence.startswith("application/") and essence.endswith("+json")):
        raise _unsupported(f"the body is `{given}`; {_HINT}")
    charset = given.lower().partition("charset=")[2].partition(";")[0].strip(' "')
    if charset not in ("", "utf-8", "utf8", "us-ascii"):
        raise _unsupported(f"the body is in `{charset}`; JSON is UTF-8")


def _unsupported(text: str) -> Refusal:
    return Refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "unsupported-media-type", text, offered=[JSON])
