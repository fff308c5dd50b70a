"""Running alone what may have killed a worker: with nothing in its process but it, and the calls that it makes itself.

A death then tells who it was. That it runs alone is a claim: others stand aside for a suspect, but not for ever, and
where they can't, the claim is taken back before they go on. So nobody is held up for long, nor blamed for others.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from contextlib import asynccontextmanager

from chains_stream.log import get_logger

STAND_ASIDE = 10.0  # seconds that requests of other Chainlets wait for a suspect to end
CLEAR = 60.0  # seconds that a suspect waits for what runs to end

Running = Callable[[], Iterator[tuple[str, "asyncio.Future[None]"]]]  # a worker's requests: their ids and ends

log = get_logger(__name__)


class Claim:
    """That one request runs alone; `take_back` tells whoever may take its partition over that it does not."""

    def __init__(self, request_id: str, take_back: Callable[[], Awaitable[None]]) -> None:
        self.request_id = request_id
        self.take_back = take_back
        self.over = asyncio.Event()


class Quarantine:
    """The suspects of one process, one at a time."""

    def __init__(self) -> None:
        self._workers: list[Running] = []
        self._claim: Claim | None = None

    @property
    def busy(self) -> bool:
        """Whether a suspect runs, or waits to."""
        return self._claim is not None

    def join(self, running: Running) -> None:
        """Count in the requests of another worker of this process."""
        self._workers.append(running)

    async def stand_aside(self, request_ids: Collection[str]) -> None:
        """Before requests begin: let a suspect of another worker come to its end, or take its claim back."""
        claim = self._claim
        if claim is None or all(request_id == claim.request_id for request_id in request_ids):
            return
        try:
            async with asyncio.timeout(STAND_ASIDE):
                await claim.over.wait()
        except TimeoutError:
            await self._take_back(claim, f"it ran for {STAND_ASIDE:g} s, and others can't wait")

    async def give_up(self, request_id: str) -> None:
        """Let others begin, if it is this one that runs alone: it is about to wait for what only others can bring."""
        claim = self._claim
        if claim is not None and claim.request_id == request_id:
            await self._take_back(claim, "it waits to be tried again")

    async def _take_back(self, claim: Claim, reason: str) -> None:
        if self._claim is claim:
            self._claim = None
            log.info("suspect.not_alone", reason=reason)
            await claim.take_back()
            claim.over.set()

    @asynccontextmanager
    async def alone(self, request_id: str, take_back: Callable[[], Awaitable[None]]) -> AsyncIterator[Claim | None]:
        """Keep others from beginning while the block runs, and wait for what runs; None if that can't be had."""
        await self.stand_aside([request_id])
        if self._claim is not None:
            yield None  # it is a call of the one that runs alone
            return
        claim = self._claim = Claim(request_id, take_back)
        try:
            cleared = await self._cleared(request_id)
            yield claim if cleared and self._claim is claim else None
        finally:
            if self._claim is claim:
                self._claim = None
            claim.over.set()

    async def _cleared(self, request_id: str) -> bool:
        """Wait until nothing runs that has not to do with a request."""
        try:
            async with asyncio.timeout(CLEAR):
                while others := [t for running in self._workers for other, t in running() if other != request_id]:
                    await asyncio.wait(others)
        except TimeoutError:
            log.info("suspect.not_alone", reason=f"others ran on for {CLEAR:g} s")
            return False
        return True
