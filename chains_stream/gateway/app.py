"""The gateway of one Chain: its routes, and what stands behind them."""

import asyncio
import base64
import hashlib
import re
from collections.abc import Awaitable, Callable, Iterable
from http import HTTPStatus
from importlib import resources

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.types import ASGIApp

from chains_stream.broker import Broker
from chains_stream.calls import Caller, RemoteTarget, remote_target
from chains_stream.chain import Chain
from chains_stream.chainlet import chainlet_name, signature
from chains_stream.codec import Codec, codec_of
from chains_stream.errors import BrokerError
from chains_stream.gateway import asynchronous, openai, openapi, probes, problems
from chains_stream.gateway.claims import Claims
from chains_stream.gateway.endpoint import Endpoint, Shared
from chains_stream.gateway.entry import Entry
from chains_stream.gateway.exchange import Exchange, exchange_of
from chains_stream.gateway.gate import Gate
from chains_stream.gateway.ids import RequestId
from chains_stream.gateway.past import Past
from chains_stream.gateway.problems import Refusal
from chains_stream.gateway.run_remote import RunRemote
from chains_stream.gateway.websocket import PATH as WEBSOCKET
from chains_stream.gateway.websocket import UseWebSocket, WebSocket, elsewhere
from chains_stream.local import Callee
from chains_stream.messages import new_id
from chains_stream.settings import Settings
from chains_stream.signature import background_topic
from chains_stream.timeouts import fault_of

READY_FOR = 1.0  # seconds that an answer of `/readyz` is kept
READY_WITHIN = 2.0  # seconds that the broker has to answer: less than a probe's usual patience

_RUN_REMOTE = "/run_remote"
_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


class Gateway:
    """Serves a Chain's entrypoint over HTTP; `app` is for any ASGI server, `Server` is ours.

    Args:
        chain: whose entrypoint is served.
        caller: started, and closed by whoever started it; after the server has stopped.
        broker: that the caller uses.
        settings: of the process.
        hosted: the Chainlets that this process serves too; `/healthz` asks their `is_healthy`.

    Attributes:
        gate: what each request has to pass; None if there are no keys, no rates and no CORS.

    Raises ChainsUsageError for keys or origins that are none.
    """

    app: ASGIApp

    def __init__(
        self, chain: Chain, caller: Caller, broker: Broker, settings: Settings, hosted: Iterable[Callee] = ()
    ) -> None:
        self._chain = chain
        self._caller = caller
        self._broker = broker
        self._settings = settings
        self._checkup = probes.Checkup(hosted)
        topic = chain.topic(chain.entrypoint, settings.namespace)
        self._past = Past(broker, caller, settings, topic, (chain.entrypoint.__module__,))
        self._claims = Claims(broker, settings)
        self._shared = Shared(settings, self._past, self._claims)
        self.gate = Gate.of(settings)

    async def start(self) -> None:
        """Make sure that the entrypoint's topic exists, and build `app`.

        Raises BrokerError, and ChainsUsageError for a type that JSON can't hold.
        """
        chain, settings = self._chain, self._settings
        codec = codec_of(signature(chain.entrypoint))
        document = msgspec.json.encode(openapi.document(chain, codec, settings))
        target = await remote_target(chain, chain.entrypoint, self._caller, settings)
        topic = target.topic
        await self._past.start()
        await self._claims.start()
        await self._caller.control.follow({topic: self._shared.kept.handle})
        run_remote, routes = await (self._conversing if codec.signature.websocket else self._calling)(codec, target)
        readiness = Readiness(self._broker, self._caller, topic, chainlet_name(chain.entrypoint))
        app = _app(
            [
                Route(_RUN_REMOTE, run_remote, methods=["POST"]),
                *routes,
                *await openai.routes(self._shared, chain, self._caller, settings),
                Route("/healthz", self._healthz),
                Route("/metrics", probes.metrics),
                Route("/readyz", readiness.readyz),
                Route("/openapi.json", Response(document, media_type="application/json"), methods=["GET"]),
                Route("/docs", _docs(), methods=["GET"]),
            ]
        )
        gate = None if self.gate is None else self.gate.check
        self.app = Entry(app, _RUN_REMOTE, run_remote.serve, self._identify, gate)

    async def _calling(self, codec: Codec, target: RemoteTarget) -> tuple[Endpoint, list[BaseRoute]]:
        """Give what answers `/run_remote`, and the other routes, of a Chain that takes arguments."""
        await self._caller.use(background_topic(target.topic))
        return RunRemote(self._shared, codec, target), [*asynchronous.routes(self._shared, codec, target)]

    async def _conversing(self, codec: Codec, target: RemoteTarget) -> tuple[Endpoint, list[BaseRoute]]:
        """Give the same of one that takes a WebSocket."""
        websocket = WebSocket(self._shared, codec, target, self._caller, self._broker.max_record_bytes)
        await self._caller.control.follow({target.topic: websocket.handle_control})
        routes = [Route(WEBSOCKET, websocket, methods=["GET"]), WebSocketRoute(WEBSOCKET, elsewhere)]
        return UseWebSocket(self._shared), routes

    async def failed(self) -> None:
        """Wait until the gateway can't go on. Raises what stopped it."""
        await asyncio.gather(*(failed() for failed in self._followed().values()))

    def interrupt(self) -> None:
        """Answer the requests that are still under way with 503. They are not cancelled: they run to their deadline."""
        self._shared.interrupt()

    async def close(self) -> None:
        """Let go of what the gateway reads and keeps; after the server has stopped, and before the caller is closed."""
        await self._shared.kept.close()
        await self._claims.close()
        await self._past.close()

    def _identify(self, exchange: Exchange) -> None:
        """Give a request the ids by which its answer will be found."""
        correlation_id = exchange.correlation_id = new_id()
        where = RequestId("replies", *self._caller.reply_position(), correlation_id)
        exchange.request_id = self._past.ids.mint(where, exchange.owner)

    async def _healthz(self, request: Request) -> Response:  # noqa: ARG002 - Starlette's
        trouble = await probes.trouble(self._broker, self._caller)
        for what, failed in self._followed().items():
            if trouble is None and (fault := await fault_of(failed)) is not None:
                trouble = f"{what} can't be read any more: {fault}"
        return probes.health(trouble or await self._checkup.complaint())

    def _followed(self) -> dict[str, Callable[[], Awaitable[None]]]:
        return {
            "answers": self._caller.failed,
            "results": self._past.results.failed,
            "idempotency keys": self._claims.failed,
        }


class Readiness:
    """What is missing until requests can be served; asked of the broker, and kept for a moment."""

    def __init__(self, broker: Broker, caller: Caller, topic: str, entrypoint: str) -> None:
        self._broker = broker
        self._caller = caller
        self._topic = topic
        self._entrypoint = entrypoint
        self._missing: tuple[str, str] | None = None
        self._until = 0.0
        self._looking = asyncio.Lock()

    async def readyz(self, request: Request) -> Response:  # noqa: ARG002 - Starlette's
        clock = asyncio.get_running_loop().time
        async with self._looking:
            if clock() >= self._until:
                self._missing = await self._look()
                self._until = clock() + READY_FOR
        if self._missing is not None:
            what, text = self._missing
            raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "not-ready", text, missing=[what])
        return JSONResponse({"status": "ok"})

    async def _look(self) -> tuple[str, str] | None:
        """Give what is missing, in a word and in a sentence."""
        try:
            async with asyncio.timeout(READY_WITHIN):
                members = await self._broker.members(self._topic)
        except TimeoutError:
            return "broker", f"the broker {self._broker.url} did not answer within {READY_WITHIN:g} s"
        except BrokerError as error:
            return "broker", str(error)
        # The reply position was known when the caller started; since then reading may have stopped.
        if (fault := await fault_of(self._caller.failed)) is not None:
            return "replies", f"answers can't be read any more: {fault}"
        return None if members else ("worker", f"no worker serves {self._entrypoint} (topic {self._topic})")


def _app(routes: list[BaseRoute]) -> Starlette:
    app = Starlette(routes=routes, exception_handlers={HTTPException: _on_http, Refusal: _on_refusal})
    app.router.redirect_slashes = False  # one path, one route
    return app


async def _on_http(request: Request, error: Exception) -> Response:
    """Answer what Starlette itself turns down: an unknown route, a wrong method."""
    assert isinstance(error, HTTPException)
    status = HTTPStatus(error.status_code)
    headers = {name.lower(): value for name, value in (error.headers or {}).items()}
    if "allow" in headers:
        allowed = headers["allow"] = ", ".join(sorted(headers["allow"].split(", ")))
        refusal = Refusal(status, "method-not-allowed", f"this route takes {allowed}", headers=headers)
    else:
        refusal = Refusal(
            status, status.phrase.lower().replace(" ", "-"), "there is no such route; /docs shows those there are"
        )
    return await _on_refusal(request, refusal)


async def _on_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    exchange = exchange_of(request.scope)
    exchange.error = error.code
    return exchange.respond(problems.of_refusal(error, exchange.request_id), error.headers)


def _docs() -> Response:
    """Give the page that shows the API, with a policy that lets run what is written in it and nothing else."""
    page = resources.files("chains_stream.gateway").joinpath("static/docs.html").read_text(encoding="utf-8")
    inline: dict[str, list[str]] = {"script": [], "style": []}
    for kind, text in _INLINE.findall(page):
        digest = hashlib.sha256(text.encode()).digest()
        inline[kind].append(f"'sha256-{base64.b64encode(digest).decode()}'")
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src {' '.join(inline['script'])}",
            f"style-src {' '.join(inline['style'])}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )
    return HTMLResponse(page, headers={"content-security-policy": policy, "referrer-policy": "no-referrer"})
