"""What a request meets before any route, and before its body is read: CORS, API keys, rates."""

from collections.abc import Awaitable, Callable
from functools import partial
from http import HTTPStatus
from typing import Self

from starlette.types import Scope as ASGIScope

from chains_stream.errors import OverloadedError
from chains_stream.gateway import problems
from chains_stream.gateway.auth import Keys
from chains_stream.gateway.cors import Cors
from chains_stream.gateway.exchange import Exchange
from chains_stream.gateway.limits import Rates, caller_of
from chains_stream.gateway.problems import Refusal
from chains_stream.settings import Settings

# Probes and scrapers have no keys, and the description of the API is none of the secrets that keys protect.
OPEN = frozenset({"/healthz", "/readyz", "/metrics", "/docs", "/openapi.json"})


class Gate:
    """Lets a request in, under the name of its key, or answers it."""

    def __init__(self, keys: Keys | None, rates: Rates | None, cors: Cors | None) -> None:
        self.keys = keys
        self.rates = rates
        self.cors = cors

    @classmethod
    def of(cls, settings: Settings) -> Self | None:
        """Give what is configured, or None if nothing is. Raises ChainsUsageError."""
        rate = settings.rate_per_key
        rates = None if rate is None else Rates(rate, settings.rate_burst)
        keys, cors = Keys.of(settings), Cors.of(settings)
        if keys is None and rates is None and cors is None:
            return None
        return cls(keys, rates, cors)

    def check(self, exchange: Exchange, scope: ASGIScope) -> Callable[[], Awaitable[None]] | None:
        """Give a request its owner, and its answer the headers that it needs.

        Gives what answers a request that may not go on to its route, to be called; None for one that may.
        """
        try:
            if self.cors is not None and self._is_preflight(exchange, scope, self.cors):
                return partial(_allow, exchange)
            if scope["path"] not in OPEN:
                self._check(exchange, scope)
        except (Refusal, OverloadedError) as error:
            return partial(_refuse, exchange, error)
        return None

    def _check(self, exchange: Exchange, scope: ASGIScope) -> None:
        if self.keys is not None:
            exchange.owner = self.keys.owner(exchange.headers)
        rates = self.rates
        if rates is not None:
            caller = exchange.owner or caller_of((scope.get("client") or ("",))[0])
            policy = (b"ratelimit-policy", rates.policy)
            try:
                left = rates.take(caller)
            except OverloadedError as error:
                exchange.common += (policy, (b"ratelimit", rates.refused(error)))
                raise
            exchange.common += (policy, (b"ratelimit", left))

    def _is_preflight(self, exchange: Exchange, scope: ASGIScope, cors: Cors) -> bool:
        headers = exchange.headers
        origin = headers.get(b"origin")
        exchange.common += cors.headers(origin)
        if scope["method"] != "OPTIONS" or origin is None or b"access-control-request-method" not in headers:
            return False
        if not cors.allows(origin):
            text = "pages of this origin may not call; CHAINS_CORS_ORIGINS names those that may"
            raise Refusal(HTTPStatus.FORBIDDEN, "origin-not-allowed", text)
        exchange.common += cors.preflight(headers.get(b"access-control-request-headers"))
        return True


async def _allow(exchange: Exchange) -> None:
    await exchange.start(HTTPStatus.NO_CONTENT)
    await exchange.finish()


async def _refuse(exchange: Exchange, error: Refusal | OverloadedError) -> None:
    if isinstance(error, Refusal):
        problem, headers = problems.of_refusal(error, exchange.request_id), error.headers
    else:
        problem, headers = problems.of_error(error, exchange.request_id), {}
    await exchange.answer(problem, headers | ({"connection": "close"} if exchange.sending else {}))
