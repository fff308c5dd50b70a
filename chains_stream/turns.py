"""Turns of the event loop, for tasks that may run long without waiting for anything."""

import asyncio
from collections.abc import Callable


class Turns:
    """Has tasks of one kind run for a stretch, all together, before all else has its turn.

    Attributes:
        aside: how many of them let others have their turn now.
    """

    def __init__(self, stretch: Callable[[], float]) -> None:
        """Ask for the seconds of a stretch when it begins."""
        self.aside = 0
        self._stretch = stretch
        self._end = 0.0  # by the loop's time

    @property
    def over(self) -> bool:
        """Whether the stretch is."""
        return asyncio.get_running_loop().time() > self._end

    async def give_way(self) -> None:
        """Let all else of the event loop have its turn."""
        loop = asyncio.get_running_loop()
        if not self.aside:
            loop.call_soon(self._begin, loop)
        self.aside += 1
        try:
            await asyncio.sleep(0)
        finally:
            self.aside -= 1

    def _begin(self, loop: asyncio.AbstractEventLoop) -> None:
        self._end = loop.time() + self._stretch()
