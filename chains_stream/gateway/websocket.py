"""``GET /websocket`` (RFC 6455): a client and the `run_remote` of the entrypoint, which talk until one of them leaves.

The upgrade is answered with 101 once a worker has begun the request; what fails before is answered as any request is.
"""

import base64
import binascii
from collections.abc import Container, Mapping
from http import HTTPStatus

from starlette.websockets import WebSocket as StarletteWebSocket
from wsproto.utilities import generate_accept_token

from chains_stream import metrics
from chains_stream.calls import Call, Caller, RemoteTarget
from chains_stream.codec import Codec
from chains_stream.control import Credit
from chains_stream.control import Message as ControlMessage
from chains_stream.errors import (
    BrokerError,
    ChainsRuntimeError,
    DeadlineExceededError,
    InvalidArgumentError,
    OverloadedError,
    StreamInterruptedError,
    WorkerLostError,
)
from chains_stream.gateway import problems
from chains_stream.gateway.cors import Cors
from chains_stream.gateway.endpoint import Endpoint, Shared
from chains_stream.gateway.exchange import FAREWELL, ClientLeftError, Exchange
from chains_stream.gateway.limits import CREDENTIALS, Place
from chains_stream.gateway.problems import Refusal
from chains_stream.gateway.websocket_session import LINGER, EndedError, Session
from chains_stream.log import get_logger
from chains_stream.policy import new_request_id
from chains_stream.websocket import (
    ABNORMAL,
    GOING_AWAY,
    NO_STATUS,
    Close,
    Handshake,
    Opened,
    decode_from_worker,
    shortened,
)

PATH = "/websocket"

_KEY_BYTES = 16
_VERSION = b"13"
_UPGRADE = {"upgrade": "websocket", "connection": "upgrade", "sec-websocket-version": _VERSION.decode()}
_OURS = {b"connection", b"upgrade", b"sec-websocket-key", b"sec-websocket-version", b"sec-websocket-extensions"}

log = get_logger(__name__)


class UseWebSocket(Endpoint):
    """Answers `/run_remote` of a Chain that takes a WebSocket."""

    async def handle(self, exchange: Exchange, place: Place) -> None:  # noqa: ARG002 - Endpoint's
        raise Refusal(
            HTTPStatus.UPGRADE_REQUIRED,
            "upgrade-required",
            f"this Chain takes a WebSocket: open one at {PATH}",
            headers=dict(_UPGRADE),
            close=exchange.sending,
        )


class WebSocket(Endpoint):
    """The endpoint of `/websocket`."""

    def __init__(self, shared: Shared, codec: Codec, target: RemoteTarget, caller: Caller, largest: int) -> None:
        super().__init__(shared)
        self._codec = codec
        self._target = target
        self._caller = caller
        self._largest = largest  # bytes of a record
        self._cors = Cors.of(shared.settings)
        # Where keys are checked they are the gateway's: what is shown to user code lies in a topic, for days.
        self._hidden = _OURS if shared.settings.api_keys is None else _OURS | set(CREDENTIALS)
        self._sessions: dict[bytes, Session] = {}  # by the ids of their clients' streams

    def handle_control(self, message: ControlMessage) -> None:
        """Take a message about the entrypoint's requests: what workers have taken of what clients sent."""
        if isinstance(message, Credit) and (session := self._sessions.get(message.correlation_id)) is not None:
            session.outbox.credit(message.chunks, message.size)

    async def handle(self, exchange: Exchange, place: Place) -> None:
        accept = _accept(exchange, self._cors)
        request = exchange.begin(self.settings.websocket_deadline)
        await exchange.body(0, place.hold)
        handshake = _handshake(exchange, self._hidden)
        with exchange.wanted(request):
            arguments = self._codec.encode_arguments((handshake,), {})
            call = await self._target.open(arguments, request, 1, exchange.correlation_id or None)
            try:
                opened, session = await self._opened(call, exchange, place)
            except BaseException:
                call.close()
                raise
        self._sessions[opened.correlation_id] = session
        metrics.WEBSOCKETS.inc()
        try:
            head = [(b"upgrade", b"websocket"), (b"connection", b"upgrade"), (b"sec-websocket-accept", accept)]
            session.start(exchange.upgrade(head, session.receive, session.lost))
            exchange.forget_request()
            try:
                with exchange.wanted(request):
                    close = told = await session.deliver()
                patience = LINGER
            except Exception as error:  # noqa: BLE001 - the client is told of it, and the log of a defect
                close, told = self._ending(error, exchange)
                patience = FAREWELL if exchange.interrupted else LINGER
            await session.part(close, told=told, patience=patience)
        finally:
            metrics.WEBSOCKETS.dec()
            del self._sessions[opened.correlation_id]
            await session.close()
            call.close()

    async def _opened(self, call: Call, exchange: Exchange, place: Place) -> tuple[Opened, Session]:
        """Wait until a worker has begun. Raises what became of the request instead."""
        chunks = await call.next()
        first = decode_from_worker(chunks[0]) if chunks else None
        if not isinstance(first, Opened) or chunks is None:
            raise ChainsRuntimeError("the worker has not opened the WebSocket: is it of another version?")
        session = Session(
            self._caller,
            call,
            first,
            chunks[1:],
            limit=self.settings.max_body_bytes,
            largest=self._largest,
            hold=place.hold,
            end=exchange.end,
        )
        return first, session

    def _ending(self, error: Exception, exchange: Exchange) -> tuple[Close, Close]:
        """Say what a client is told at the end of a WebSocket, and what its worker is."""
        match error:
            case ClientLeftError():
                told = Close(ABNORMAL)
                return told, told
            case EndedError(close=close):
                if close.code == ABNORMAL:
                    return Close(1011, close.reason), close
                return (Close() if close.code == NO_STATUS else close), close
            case _ if exchange.interrupted:
                close = Close(GOING_AWAY, "the gateway is stopping")
            case DeadlineExceededError():
                close = Close(GOING_AWAY, "the deadline of the WebSocket passed")
            case StreamInterruptedError() | WorkerLostError() | BrokerError():
                close = Close(1012, shortened(str(error)))
            case OverloadedError():
                close = Close(1013, shortened(str(error)))
            case InvalidArgumentError():
                close = Close(1007, shortened(str(error)))
            case _ if problems.is_known(error):
                close = Close(1011, shortened(problems.of_error(error, exchange.request_id).detail))
            case _:
                log.error("gateway.defect", exc_info=error)
                close = Close(1011, "the gateway failed")
        exchange.error = problems.of_error(error, exchange.request_id).code
        return close, close


async def elsewhere(websocket: StarletteWebSocket) -> None:
    """Refuse a WebSocket that another ASGI server has read."""
    if "websocket.http.response" in websocket.scope.get("extensions", {}):
        problem = problems.of_refusal(_other_server(), new_request_id())
        await websocket.send_denial_response(problems.respond(problem))
    else:
        await websocket.close(1011, str(_other_server()))


def origin_allowed(headers: Mapping[bytes, bytes], cors: Cors | None) -> bool:
    """Tell whether a page of the `origin` in a handshake may talk to this gateway: its own, and those configured.

    Browsers let any page open a WebSocket to anywhere, one of loopback too, and leave it to the server to look at
    `origin` (RFC 6455, section 10.2). Other programs send none.
    """
    origin = headers.get(b"origin")
    if origin is None or (cors is not None and cors.allows(origin)):
        return True
    return origin.partition(b"://")[2].lower() == headers.get(b"host", b"").lower()


def _accept(exchange: Exchange, cors: Cors | None) -> bytes:
    """Check a client's handshake (RFC 6455, section 4.2.1), and give the token that accepts it. Raises Refusal."""
    headers = exchange.headers
    if not (_has(headers, b"upgrade", b"websocket") and _has(headers, b"connection", b"upgrade")):
        raise _refuse(HTTPStatus.UPGRADE_REQUIRED, "upgrade-required", f"{PATH} is for WebSockets: ask for an upgrade")
    if headers.get(b"sec-websocket-version") != _VERSION:
        text = "this gateway speaks version 13 of WebSocket (RFC 6455)"
        raise _refuse(HTTPStatus.UPGRADE_REQUIRED, "upgrade-required", text)
    key = headers.get(b"sec-websocket-key", b"")
    if not _is_key(key) or exchange.request["http_version"] != "1.1":
        text = "a WebSocket is opened in HTTP/1.1, with 16 bytes in base64 in `sec-websocket-key`"
        raise Refusal(HTTPStatus.BAD_REQUEST, "invalid-handshake", text)
    if not origin_allowed(headers, cors):
        text = "pages of this origin may not call; CHAINS_CORS_ORIGINS names those that may"
        raise Refusal(HTTPStatus.FORBIDDEN, "origin-not-allowed", text)
    if not exchange.can_upgrade:
        raise _other_server()
    return generate_accept_token(key)


def _refuse(status: HTTPStatus, code: str, text: str) -> Refusal:
    return Refusal(status, code, text, headers=dict(_UPGRADE))


def _other_server() -> Refusal:
    text = "WebSockets need the server of `chains run` or `chains gateway`"
    return Refusal(HTTPStatus.NOT_IMPLEMENTED, "not-implemented", text)


def _has(headers: Mapping[bytes, bytes], name: bytes, token: bytes) -> bool:
    return token in [part.strip().lower() for part in headers.get(name, b"").split(b",")]


def _is_key(key: bytes) -> bool:
    try:
        return len(base64.b64decode(key, validate=True)) == _KEY_BYTES
    except binascii.Error:
        return False


def _handshake(exchange: Exchange, hidden: Container[bytes]) -> Handshake:
    """Give what the worker is told of the request: all but some headers."""
    request = exchange.request
    headers = [(name, value) for name, value in request["headers"] if name not in hidden]
    return Handshake(
        headers=[(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers],
        path=request["path"],
        query=request["query_string"].decode("latin-1"),
    )
