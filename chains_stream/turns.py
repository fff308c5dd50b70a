"""Turns of the event loop, for tasks that may run long without waiting for anything."""

import asyncio
import time
from collections.abc import Callable

# Seconds of a stretch, and of one that begins while others are under way in the process, as far as its workers and
# callers know. Each turn of the loop costs: in that of a worker of events, say, all is sent to Kafka that was given.
STRETCH, STRETCH_BESIDE = 0.02, 0.005


class Turns:
    """Has tasks of one kind run for a stretch, all together, before all else has its turn.

    Attributes:
        end: of the stretch, by `time.perf_counter`; whoever runs them looks at it.
        aside: how many of them let others have their turn now.
    """

    def __init__(self, beside: Callable[[], bool]) -> None:
        """Ask, when a stretch begins, whether others are under way."""
        self.end = 0.0
        self.aside = 0
        self._beside = beside

    async def give_way(self) -> None:
        """Let all else of the event loop have its turn."""
        if not self.aside:
            asyncio.get_running_loop().call_soon(self._begin)
        self.aside += 1
        try:
            await asyncio.sleep(0)
        finally:
            self.aside -= 1

    def _begin(self) -> None:
        self.end = time.perf_counter() + (STRETCH_BESIDE if self._beside() else STRETCH)
