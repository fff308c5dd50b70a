"""What a request meets before any route, and before its body is read: CORS, API keys, rates."""

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

    async def lets_in(self, exchange: Exchange, scope: ASGIScope) -> bool:
        """Tell whether a request may go on to its route; if not, it has been answered."""
        try:
            if self.cors is not None and await self._is_preflight(exchange, scope, self.cors):
                return False
            if scope["path"] not in OPEN:
                self._check(exchange, scope)
        except Refusal as refusal:
            close = {"connection": "close"} if exchange.sending else {}
            await exchange.answer(problems.of_refusal(refusal, exchange.request_id), refusal.headers | close)
            return False
        except OverloadedError as error:
            close = {"connection": "close"} if exchange.sending else {}
            await exchange.answer(problems.of_error(error, exchange.request_id), close)
            return False
        return True

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

    async def _is_preflight(self, exchange: Exchange, scope: ASGIScope, cors: Cors) -> bool:
        headers = exchange.headers
        origin = headers.get(b"origin")
        exchange.common += cors.headers(origin)
        if scope["method"] != "OPTIONS" or origin is None or b"access-control-request-method" not in headers:
            return False
        if not cors.allows(origin):
            text = "pages of this origin may not call; CHAINS_CORS_ORIGINS names those that may"
            raise Refusal(HTTPStatus.FORBIDDEN, "origin-not-allowed", text)
        await exchange.start(HTTPStatus.NO_CONTENT, *cors.preflight(headers.get(b"access-control-request-headers")))
        await exchange.finish()
        return True
