"""Ray Serve: handle calls, a composition of two deployments, and streams over HTTP.

    python -m benchmarks.rivals.ray_serve

A small cluster on loopback: no dashboard, no telemetry, its files in a temporary folder. This process is the driver
inside the cluster that makes the handle calls; its deployments take a fraction of a core each. `max_ongoing_requests`
is raised, so that 256 in flight are never refused or queued.
"""

import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ |= {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",  # its own switch: twice the handle calls
}

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from benchmarks import driving
from benchmarks.rivals import loop, tokens

REMOVE_SECONDS = 10.0

deployed = serve.deployment(ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=2048)


class Echo:
    async def run_remote(self, text: str) -> str:
        return text


class Front:
    """Takes HTTP, and hands a text on to the second deployment."""

    def __init__(self, echo: DeploymentHandle) -> None:
        self._echo = echo

    async def __call__(self, request: Request) -> Response:
        body = await request.json()
        return Response(await self._echo.run_remote.remote(body["text"]), media_type="text/plain")


class Streamer:
    """Takes HTTP, and streams: Ray's proxy is all that stands before it."""

    async def __call__(self, request: Request) -> StreamingResponse:
        body = await request.json()
        return StreamingResponse(self._pieces(body["count"]), media_type="text/event-stream")

    async def _pieces(self, count: int) -> AsyncIterator[bytes]:
        for piece in tokens.events(count):
            yield piece


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def drive(echo: DeploymentHandle, url: str) -> None:
    async def call(text: str) -> str:
        answer: str = await echo.run_remote.remote(text)
        return answer

    await driving.drive(call, driving.text_payload, url)


@contextmanager
def temporary_folder() -> Iterator[str]:
    """A folder that is gone afterwards: Ray's processes write to it until they have ended, and tell nobody when."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: sockets lie in it
    try:
        yield folder
    finally:
        deadline = time.monotonic() + REMOVE_SECONDS
        while Path(folder).exists() and time.monotonic() < deadline:
            shutil.rmtree(folder, ignore_errors=True)
            time.sleep(0.05)


def main() -> None:
    with temporary_folder() as folder:
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=128 << 20,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address="127.0.0.1",
            _temp_dir=folder,
        )
        try:
            port = free_port()
            serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "ERROR"})
            echo = serve.run(deployed(Echo).bind(), name="echo", route_prefix=None)
            serve.run(deployed(Front).bind(deployed(Echo).bind()), name="front", route_prefix="/run_remote")
            serve.run(deployed(Streamer).bind(), name="streamer", route_prefix="/stream")
            loop.run(drive(echo, f"http://127.0.0.1:{port}"))
        finally:
            ray.shutdown()


if __name__ == "__main__":
    main()
