"""Serves a rival's ASGI app as well as uvicorn can: uvloop and httptools, no access log, a free port of loopback."""

import socket

import uvicorn

from benchmarks.rivals import loop

BACKLOG = 2048


class Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, url: str) -> None:
        super().__init__(config)
        self._url = url

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(f"Server is ready on {self._url}", flush=True)


def serve(app: object) -> None:
    """Serve until the process is told to end."""
    loop.run(serving(app))


async def serving(app: object) -> None:
    """Serve, in a loop that runs, until the process is told to end."""
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(("127.0.0.1", 0))
    config = uvicorn.Config(
        app,  # type: ignore[arg-type] # of any of uvicorn's interfaces
        http="auto",  # httptools where it is installed, as it is for the benchmarks
        loop="none",  # that of `run`
        ws="none",
        backlog=BACKLOG,
        access_log=False,
        log_level="warning",
        timeout_keep_alive=60,  # aiohttp uses a connection again after up to 15 s
        timeout_graceful_shutdown=1,
    )
    await Server(config, f"http://127.0.0.1:{listening.getsockname()[1]}").serve([listening])
