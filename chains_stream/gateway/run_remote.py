"""``POST /run_remote``: arguments as a JSON object in, the result or the stream of the Chain's entrypoint out."""

import asyncio
from collections.abc import Mapping
from http import HTTPStatus

import msgspec
from starlette.exceptions import HTTPException
from starlette.types import Receive, Send
from starlette.types import Scope as ASGIScope

from chains_stream.calls import RemoteTarget
from chains_stream.codec import Codec
from chains_stream.errors import GatewayError, OverloadedError
from chains_stream.gateway import problems
from chains_stream.gateway.exchange import PIECE, ClientLeftError, Exchange, exchange_of
from chains_stream.gateway.limits import Limits, Place
from chains_stream.gateway.negotiation import choose
from chains_stream.gateway.problems import Refusal
from chains_stream.gateway.streaming import Form, Pulse, Stream, form_of, media_types
from chains_stream.policy import Scope
from chains_stream.settings import Settings

JSON = "application/json"
CHOICES = 100  # different headers `accept` whose choice is remembered: clients of one kind send the same
CHOICE_BYTES = 256

_IS_JSON = (b"content-type", JSON.encode())
_HINT = f"send the arguments as a JSON object with `content-type: {JSON}` (curl --json does)"


class RunRemote:
    """The endpoint; an ASGI app."""

    def __init__(self, codec: Codec, target: RemoteTarget, settings: Settings) -> None:
        self._codec = codec
        self._target = target
        self._settings = settings
        self._limits = Limits(settings)
        self._exchanges: set[Exchange] = set()
        self._pulse = Pulse()
        self._choices: dict[bytes, str] = {}
        self.media_types = tuple(media_types(codec)) if codec.signature.streaming else (JSON,)
        self._forms = {kind: form_of(kind, codec) for kind in self.media_types if codec.signature.streaming}

    def interrupt(self) -> None:
        """End the requests that are still under way, with an answer that says so."""
        for exchange in tuple(self._exchanges):
            exchange.interrupt(GatewayError("the gateway stopped before the answer was complete", status=503))

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - the exchange has both
        if scope["path"].endswith("\n"):  # Starlette's patterns end in `$`, which this may follow
            raise HTTPException(HTTPStatus.NOT_FOUND)
        await self.serve(exchange_of(scope))

    async def serve(self, exchange: Exchange) -> None:
        """Answer a request."""
        try:
            place = self._limits.enter(exchange.headers)
        except OverloadedError as error:
            await _fail(exchange, None, error)
            return
        self._exchanges.add(exchange)
        form: Form | None = None
        try:
            form = self._form(exchange)
            request = exchange.begin(self._settings.deadline)
            with exchange.wanted(request):
                await self._run(exchange, place, request, form)
        except ClientLeftError:
            exchange.status = problems.CLIENT_CLOSED_REQUEST  # for the log alone
        except Refusal as refusal:
            await exchange.answer(problems.of_refusal(refusal, exchange.request_id), refusal.headers)
        except Exception as error:
            if not problems.is_known(error):
                raise
            await _fail(exchange, form, error)
        finally:
            self._exchanges.discard(exchange)
            place.leave()

    async def _run(self, exchange: Exchange, place: Place, request: Scope, form: Form | None) -> None:
        _check_content(exchange.headers)
        body = await exchange.body(self._settings.max_body_bytes, place.hold) or b"{}"
        call = await self._target.open(self._codec.arguments_from_json(body), request, 1)
        del body  # from here on the broker's own buffer bounds it
        place.hold(0)
        try:
            if form is not None:
                await Stream(exchange, call, form, self._pulse).run()
            else:
                result = self._codec.result_to_json(await call.result())
                if len(result) > PIECE:
                    place.hold_result(len(result))
                await exchange.start(HTTPStatus.OK, _IS_JSON, (b"content-length", b"%d" % len(result)))
                await exchange.finish(result)
        except asyncio.CancelledError:
            # A gateway that ends cancels nothing: the request runs on to its deadline.
            if not exchange.interrupted:
                call.close()
            raise
        except BaseException:
            call.close()
            raise
        call.close()

    def _form(self, exchange: Exchange) -> Form | None:
        """Choose how to write the stream; None for a unary result. Raises Refusal."""
        accept = exchange.accept
        chosen = self._choices.get(accept)
        if chosen is None:
            chosen = self._choose(accept.decode("latin-1"))
            if len(accept) <= CHOICE_BYTES and len(self._choices) < CHOICES:
                self._choices[accept] = chosen
        return self._forms.get(chosen)

    def _choose(self, accept: str) -> str:
        chosen = choose(accept, self.media_types)
        if chosen is None and choose(accept, [JSON]):
            # `curl --json` and many libraries ask for it whatever they call; no stream can be had so, and the client
            # sees by the content type what it got.
            chosen = self.media_types[0]
        if chosen is None:
            raise Refusal(
                HTTPStatus.NOT_ACCEPTABLE,
                "not-acceptable",
                f"the answer can be had as {', '.join(self.media_types)}, and `accept` allows none of these",
                offered=list(self.media_types),
            )
        return chosen


async def _fail(exchange: Exchange, form: Form | None, error: Exception) -> None:
    """Tell the client of an error, in the way that is left at this point of the answer."""
    problem = problems.of_error(error, exchange.request_id)
    if not exchange.started:
        await exchange.answer(problem, {"connection": "close"} if exchange.sending else None)
    else:
        exchange.error = problem.code
        await exchange.end_early(None if form is None else form.failure(msgspec.json.encode(problem)))


def _check_content(headers: Mapping[bytes, bytes]) -> None:
    """Refuse a body that is not JSON, before it is read."""
    coding, kind = headers.get(b"content-encoding", b"identity"), headers.get(b"content-type")
    if kind == _IS_JSON[1] and coding == b"identity":
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
