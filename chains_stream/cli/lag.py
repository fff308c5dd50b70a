"""Whether the event loop turns. While it is blocked no heartbeats go out, and others take this process's partitions."""

import asyncio
from typing import NoReturn

from chains_stream import metrics
from chains_stream.log import get_logger

INTERVAL = 0.1  # seconds between two looks
BLOCKED = 1.0  # seconds late that are worth a line: a tenth of the time in which a group counts a member as dead

log = get_logger(__name__)


async def watch_loop() -> NoReturn:
    """Measure how late the running event loop is, and log when something kept it from turning."""
    clock = asyncio.get_running_loop().time
    while True:
        due = clock() + INTERVAL
        await asyncio.sleep(INTERVAL)
        late = max(0.0, clock() - due)
        metrics.LOOP_LAG.observe(late)
        if late >= BLOCKED:
            log.warning(
                "loop.blocked",
                seconds=round(late, 1),
                reason="synchronous code in an `async def`, or a process that was stopped; its heartbeats stopped too",
            )
