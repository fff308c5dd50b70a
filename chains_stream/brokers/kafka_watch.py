"""Notices that a consumer of aiokafka does not move on, which it does not tell.

Its fetching can stop in silence (its issue 1155), and a broker that swallows what it is sent is an error only after
40 s. So the ends of the partitions are asked for independently, and compared with what was fetched.
"""

import asyncio
import math
from collections.abc import Callable, Coroutine, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

from aiokafka import errors as kafka

from chains_stream.brokers.kafka_cluster import said
from chains_stream.errors import BrokerError

STALLED_SECONDS = 15.0  # without progress, or without an answer, are trouble
WATCH_SECONDS = 3.0  # from one look to the next


class _Still(NamedTuple):
    """A partition that has more to fetch than before the last `looks`."""

    position: int
    looks: int
    since: datetime


class Watch:
    """Looks again and again whether a feed moves on; `ends` is where its partitions ended at the last look.

    Looks are counted, not seconds: a process that was stopped itself finds no fault with the broker afterwards.
    """

    def __init__(
        self,
        ask_ends: Callable[[], Coroutine[Any, Any, dict[int, int]]],
        where: tuple[str, str],
        positions: Callable[[], Mapping[int, int] | str],
        stalled: Callable[[str], None],
        *,
        patience: float,
    ) -> None:
        """Compare what `ask_ends` gives for a topic with `positions`, which should move on, and tell of each stall.

        `where` is the broker's URL and the topic. `positions` may say why they are open instead.

        That it stays open for longer than `patience`, in seconds, is trouble.
        """
        self.ends: dict[int, int] = {}
        self._ask_ends = ask_ends
        self._url, self._topic = where
        self._positions = positions
        self._stalled = stalled
        self._patience = patience
        self._still: dict[int, _Still] = {}
        self._open = 0  # looks in a row without positions
        self._open_since = datetime.now(UTC)
        self._open_reason = ""
        self._unanswered = 0  # looks in a row
        self._answered = datetime.now(UTC)
        self._reason = ""
        self._told = False

    def trouble(self) -> str | None:
        """Say what does not move on, where, and since when."""
        limit = _looks(STALLED_SECONDS)
        if self._unanswered >= limit:
            return f"{self._url} has not answered since {_time(self._answered)}: {self._reason}"
        if self._open > _looks(self._patience):
            what = f"a consumer has had no partitions of {self._topic} since {_time(self._open_since)}"
            return f"{self._url}: {what}: {self._open_reason}"
        stalled = {partition: still for partition, still in self._still.items() if still.looks >= limit}
        if not stalled:
            return None
        since = min(still.since for still in stalled.values())
        named = ", ".join(map(str, sorted(stalled)))
        what = f"nothing of {self._topic}[{named}] was fetched since {_time(since)}, and there is more"
        return f"{self._url}: {what}"

    async def run(self) -> None:
        while True:
            asking = asyncio.create_task(self._ask_ends(), name="ask for ends")
            try:
                await asyncio.sleep(WATCH_SECONDS)
                while not asking.done():
                    # Let it go on: aiokafka gives up a connection that is dead only when a request has timed out.
                    self._missed("no answer")
                    await asyncio.sleep(WATCH_SECONDS)
                self.ends |= asking.result()
            except (kafka.KafkaError, OSError, BrokerError) as error:
                self._missed(said(error))
            else:
                self._unanswered = 0
                self._answered = datetime.now(UTC)
                self._look()
            finally:
                asking.cancel()
                await asyncio.wait([asking])

    def _missed(self, reason: str) -> None:
        self._unanswered += 1
        self._reason = reason

    def _look(self) -> None:
        positions = self._positions()
        limit = _looks(STALLED_SECONDS)
        if isinstance(positions, str):
            if not self._open:
                self._open_since = datetime.now(UTC)
            self._open += 1
            self._open_reason = positions
            # A stall that was met stays one until something moves; else the count begins anew.
            self._still = {partition: still for partition, still in self._still.items() if still.looks >= limit}
            return
        self._open = 0
        behind = {number: at for number, at in positions.items() if at < self.ends.get(number, 0)}
        self._still = {number: self._compared(number, at) for number, at in behind.items()}
        trouble = any(still.looks >= limit for still in self._still.values())
        if trouble and not self._told:
            self._stalled(self.trouble() or "")
        self._told = trouble

    def _compared(self, partition: int, position: int) -> _Still:
        before = self._still.get(partition)
        if before is None or position > before.position:
            return _Still(position, 0, datetime.now(UTC))
        # It may have gone back, to what is committed.
        return _Still(position, before.looks + 1, before.since)


def _looks(seconds: float) -> int:
    return math.ceil(seconds / WATCH_SECONDS)


def _time(at: datetime) -> str:
    return f"{at:%H:%M:%S} UTC"
