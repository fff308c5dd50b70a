"""The outermost part of the gateway's app: every request becomes an `Exchange`, and one line in the log.

A mistake of the gateway's own ends here.
"""

import logging
import time
from collections.abc import Awaitable, Callable
from functools import cache
from typing import ClassVar

from prometheus_client import Counter
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as ASGIScope
from structlog.contextvars import bind_contextvars, clear_contextvars

from chains_stream import metrics
from chains_stream.gateway import problems
from chains_stream.gateway.exchange import EXCHANGE, CutOffError, Exchange
from chains_stream.log import get_logger, log_plain

log = get_logger(__name__)
_requests = logging.getLogger(__name__)


class Entry:
    """The outermost part of the app.

    Args:
        app: takes all requests but those that go to `endpoint`.
        path: that is posted to most often.
        endpoint: answers such requests, with no routing in between.
        identify: gives a request its ids.
        gate: that each request has to pass first, if there is one: gives what answers those that don't.

    Attributes:
        under_way: requests in this process.
    """

    under_way: ClassVar[int] = 0

    def __init__(
        self,
        app: ASGIApp,
        path: str,
        endpoint: Callable[[Exchange], Awaitable[None]],
        identify: Callable[[Exchange], None],
        gate: Callable[[Exchange, ASGIScope], Callable[[], Awaitable[None]] | None] | None = None,
    ) -> None:
        self._app = app
        self._identify = identify
        self._gate = gate
        self._path = path
        self._endpoint = endpoint

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, method = time.perf_counter(), scope["method"]
        exchange = Exchange(scope, receive, send)
        answer = None if self._gate is None else self._gate(exchange, scope)
        self._identify(exchange)  # by its owner, which the gate has found
        Entry.under_way += 1
        clear_contextvars()
        bind_contextvars(request_id=exchange.request_id)
        try:
            if answer is not None:
                await answer()
            elif scope["path"] == self._path and method == "POST":
                exchange.route = self._path
                await self._endpoint(exchange)
            else:
                await self._routed(exchange, scope, receive)
            if exchange.unsettled:
                await exchange.settle()
        except CutOffError:
            raise
        except Exception:
            log.exception("gateway.defect")
            await self._apologize(exchange)
        finally:
            Entry.under_way -= 1
            await exchange.close()
            _note(exchange, method, time.perf_counter() - began)

    async def _routed(self, exchange: Exchange, scope: ASGIScope, receive: Receive) -> None:
        scope[EXCHANGE] = exchange
        try:
            await self._app(scope, receive, exchange.send)
        finally:
            exchange.route = getattr(scope.get("route"), "path", exchange.route)
            scope.pop(EXCHANGE, None)  # the two hold each other

    async def _apologize(self, exchange: Exchange) -> None:
        if not exchange.started:
            await exchange.answer(problems.of_defect(exchange.request_id))
        elif not exchange.complete:
            exchange.error = "internal"
            await exchange.end_early(None)


metrics.HTTP_IN_FLIGHT.set_function(lambda: Entry.under_way)


def _note(exchange: Exchange, method: str, seconds: float) -> None:
    """Count a request that has ended, and log it."""
    ended, took = _children(exchange.route, exchange.status)
    ended.inc()
    took.observe(seconds)
    event = {
        "event": "request",
        "method": method,
        "route": exchange.route,
        "status": exchange.status,
        "duration_ms": round(seconds * 1000, 1),
        "request_id": exchange.request_id,
    }
    if exchange.owner:
        event["owner"] = exchange.owner
    if exchange.error is not None:
        event["error"] = exchange.error
    log_plain(_requests, event)


@cache
def _children(route: str, status: int) -> tuple[Counter, metrics.Timing]:
    """Give what counts the requests of a route that end so. There are few: routes of ours, and statuses of HTTP."""
    return metrics.HTTP_REQUESTS.labels(route, status), metrics.HTTP_SECONDS.labels(route)
