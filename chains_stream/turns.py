"""Turns of the event loop, for tasks that may run long without waiting for anything."""

import asyncio


class Turns:
    """Has tasks of one kind run for `seconds` at a stretch, all together, before all else has its turn.

    Attributes:
        aside: how many of them let others have their turn now.
    """

    def __init__(self, seconds: float) -> None:
        self.aside = 0
        self._seconds = seconds
        self._began = 0.0  # by the loop's time

    async def over(self) -> None:
        """Let all else of the event loop have its turn, if it has not had it for too long."""
        loop = asyncio.get_running_loop()
        if loop.time() - self._began <= self._seconds:
            return
        if not self.aside:
            loop.call_soon(self._begin, loop)
        self.aside += 1
        try:
            await asyncio.sleep(0)
        finally:
            self.aside -= 1

    def _begin(self, loop: asyncio.AbstractEventLoop) -> None:
        self._began = loop.time()
