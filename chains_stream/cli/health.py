"""A worker's `/healthz`, `/readyz` and `/metrics`, for whatever watches over processes."""

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from chains_stream.broker import Broker
from chains_stream.calls import Caller
from chains_stream.errors import ChainsUsageError
from chains_stream.gateway import probes
from chains_stream.gateway.server import Server
from chains_stream.log import get_logger
from chains_stream.worker import Host

_GRACE = 1.0  # seconds that the answer to a probe may take at the end
_UNAVAILABLE = 503

log = get_logger(__name__)


class Health:
    """Serves them, from before the broker is connected. `/healthz` asks the Chainlets' own `is_healthy` too."""

    def __init__(self, address: str, port: int) -> None:
        self._ready = False
        self._watched: tuple[probes.Checkup, Broker, Caller] | None = None
        self._server = Server(address, port, _GRACE)

    async def start(self) -> str:
        """Serve, and give the URL. Raises ChainsUsageError for a port that can't be had."""
        routes = [
            Route("/healthz", self._healthz),
            Route("/readyz", self._readyz),
            Route("/metrics", probes.metrics),
        ]
        try:
            url = await self._server.start(Starlette(routes=routes))
        except ChainsUsageError as error:
            raise ChainsUsageError(str(error).replace("--port", "--health-port")) from error
        log.info("health.ready", url=url)
        return url

    def watch(self, host: Host, broker: Broker, caller: Caller) -> None:
        """Be ready, for as long as these parts of the worker are well and `leave` is not called."""
        self._watched = probes.Checkup(worker.callee for worker in host.workers), broker, caller
        self._ready = True

    def leave(self) -> None:
        """Be ready no more: the worker takes no requests from now on."""
        self._ready = False

    async def stop(self) -> None:
        await self._server.stop()

    async def _healthz(self, _request: Request) -> Response:
        if self._watched is None:
            return probes.health(None)
        checkup, broker, caller = self._watched
        return probes.health(await probes.trouble(broker, caller) or await checkup.complaint())

    async def _readyz(self, _request: Request) -> Response:
        status = "ok" if self._ready else "not ready"
        return JSONResponse({"status": status}, 200 if self._ready else _UNAVAILABLE)
