"""What watchers ask of a process: `/healthz` and `/metrics`, of a gateway and of a worker's health server alike."""

import asyncio
import inspect
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from http import HTTPStatus
from typing import Any

from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from chains_stream.broker import Broker
from chains_stream.calls import Caller
from chains_stream.errors import message_of
from chains_stream.local import Callee
from chains_stream.log import get_logger
from chains_stream.timeouts import fault_of

HEALTHY_WITHIN = 5.0  # seconds that a Chainlet's `is_healthy` has: a probe's patience is seldom longer

log = get_logger(__name__)


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


class Checkup:
    """Asks Chainlets how they are, by their own `is_healthy`."""

    def __init__(self, callees: Iterable[Callee]) -> None:
        self._checks = [
            Check(f"{callee.name}.is_healthy", callee.instance.is_healthy)
            for callee in callees
            if hasattr(callee.instance, "is_healthy")
        ]

    async def complaint(self) -> str | None:
        """Ask all at once, and say which of them are not healthy, and why; None if all are."""
        answers = await asyncio.gather(*(check.complaint() for check in self._checks))
        return "; ".join(answer for answer in answers if answer is not None) or None


class Check:
    """One `is_healthy`: a sync one runs in a thread. It is asked again only when it has answered."""

    def __init__(self, name: str, ask: Callable[[], Any]) -> None:
        self._name = name
        self._ask = ask
        self._turn = asyncio.Lock()
        self._thread: asyncio.Future[Any] | None = None

    async def complaint(self) -> str | None:
        limit = asyncio.timeout(HEALTHY_WITHIN)
        try:
            async with limit, self._turn:
                return None if await self._answer() else f"{self._name} said no"
        except Exception as error:  # noqa: BLE001 - the check is the user's code, and raising is one way to say no
            if limit.expired():
                return f"{self._name} did not answer within {HEALTHY_WITHIN:g} s"
            log.warning("chainlet.unhealthy", reason=f"{self._name} raised {type(error).__name__}: {message_of(error)}")
            return f"{self._name} raised {type(error).__name__}"

    async def _answer(self) -> bool:
        if inspect.iscoroutinefunction(self._ask):
            return bool(await self._ask())
        # One that hung when it was asked before is waited for, and its answer, too late for them, is for nobody.
        if self._thread is not None:
            await asyncio.wait([self._thread])
        self._thread = _in_thread(self._ask, self._name)
        await asyncio.wait([self._thread])
        answer, self._thread = self._thread.result(), None
        if isinstance(answer, Exception):
            raise answer
        return bool(await answer if inspect.isawaitable(answer) else answer)


def _in_thread(ask: Callable[[], Any], name: str) -> asyncio.Future[Any]:
    """Have a thread ask, and give its answer, or what it raised.

    The thread is no pool's: one that hangs would keep the process from ending, or take the place of a request.
    """
    loop = asyncio.get_running_loop()
    future = loop.create_future()

    def run() -> None:
        try:
            answer = ask()
        except Exception as error:  # noqa: BLE001 - as above
            answer = error
        with suppress(RuntimeError):  # the loop has ended: nobody is left to tell
            loop.call_soon_threadsafe(future.set_result, answer)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
