"""What watchers ask of a process: `/healthz` and `/metrics`, of a gateway and of a worker's health server alike."""

import asyncio
from collections.abc import Awaitable, Callable
from http import HTTPStatus

from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from chains_stream.broker import Broker
from chains_stream.calls import Caller


async def metrics(request: Request) -> Response:  # noqa: ARG001 - Starlette's
    """Give all that this process counts, in the text format of Prometheus."""
    return Response(generate_latest(), headers={"content-type": CONTENT_TYPE_PLAIN_0_0_4})


def health(reason: str | None) -> Response:
    """Answer `/healthz`, with the reason why the process should be started anew, if there is one."""
    if reason is None:
        return JSONResponse({"status": "ok"})
    return JSONResponse({"status": "unhealthy", "reason": reason}, HTTPStatus.SERVICE_UNAVAILABLE)


async def trouble(broker: Broker, caller: Caller) -> str | None:
    """Say what keeps this process from sending requests or reading answers; None if nothing does."""
    if (reason := broker.trouble()) is not None:
        return reason
    for what, failed in (("answers", caller.failed), ("the control topic", caller.control.failed)):
        if (fault := await fault_of(failed)) is not None:
            return f"{what} can't be read any more: {fault}"
    return None


async def fault_of(failed: Callable[[], Awaitable[None]]) -> BaseException | None:
    """Give what a wait for a failure would raise now; None if it would go on waiting, or we end it ourselves."""
    waiting = asyncio.ensure_future(failed())
    await asyncio.wait([waiting], timeout=0)
    if waiting.done():
        return None if waiting.cancelled() else waiting.exception()
    waiting.cancel()
    await asyncio.wait([waiting])
    return None
