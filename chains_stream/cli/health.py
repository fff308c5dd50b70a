"""A worker's `/healthz` and `/readyz`, for whatever watches over processes."""

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from chains_stream.errors import ChainsUsageError
from chains_stream.gateway.server import Server
from chains_stream.log import get_logger
from chains_stream.worker import Host

_GRACE = 1.0  # seconds that the answer to a probe may take at the end
_UNAVAILABLE = 503

log = get_logger(__name__)


class Health:
    """Serves them, from before the broker is connected. `/healthz` asks the Chainlets' own `is_healthy`.

    Attributes:
        host: whose Chainlets these are, once it is there.
        ready: whether they take requests.
    """

    def __init__(self, address: str, port: int) -> None:
        self.host: Host | None = None
        self.ready = False
        self._server = Server(address, port, _GRACE)

    async def start(self) -> None:
        """Serve. Raises ChainsUsageError for a port that can't be had."""
        routes = [Route("/healthz", self._healthz), Route("/readyz", self._readyz)]
        try:
            url = await self._server.start(Starlette(routes=routes))
        except ChainsUsageError as error:
            raise ChainsUsageError(str(error).replace("--port", "--health-port")) from error
        log.info("health.ready", url=url)

    async def stop(self) -> None:
        await self._server.stop()

    async def _healthz(self, _request: Request) -> Response:
        try:
            healthy = self.host is None or await self.host.healthy()
        except Exception as error:  # noqa: BLE001 - the check is the user's code, and raising is one way to say no
            log.warning("chainlet.unhealthy", reason=f"is_healthy raised {type(error).__name__}: {error}")
            healthy = False
        return _answer("ok" if healthy else "unhealthy")

    async def _readyz(self, _request: Request) -> Response:
        return _answer("ok" if self.ready else "not ready")


def _answer(status: str) -> Response:
    return JSONResponse({"status": status}, 200 if status == "ok" else _UNAVAILABLE)
