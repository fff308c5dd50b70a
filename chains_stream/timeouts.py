"""Bounds on waiting, for code that begins thousands of them a second and meets nearly all in time.

`asyncio.timeout` sets a timer of the event loop for each, which costs about as much as a task does. Here one that is
far off has none: it stands in a set of those that end in the same second, and gets its timer when that second comes.
And `fault_of` looks at what is waited for, without waiting.
"""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Self

FAR = 2.0  # seconds from which on no timer is set
KEPT = 4  # sets that may be empty: a set that was large stays so
FOREVER = 1e9  # seconds, which is what an infinite bound comes to


class Timeout:
    """Bounds a block, as `asyncio.timeout` does: cancels the task in it, and raises TimeoutError in its place.

    Args:
        seconds: from the beginning of the block on. With none left it ends where it first waits.
        task: the one that runs the block, if it is known: to look it up costs as much as the rest.
        brief: the block waits for nothing, most likely: only if it is not over at the loop's next turn has it a place
            in a set. Where it does wait, that costs more.
    """

    __slots__ = ("_brief", "_cancelling", "_expired", "_far", "_loop", "_seconds", "_task", "_timer", "_when")

    def __init__(self, seconds: float, task: "asyncio.Task[Any] | None" = None, *, brief: bool = False) -> None:
        self._seconds = seconds
        self._task = task
        self._brief = brief
        self._expired = False
        self._timer: asyncio.TimerHandle | None = None
        self._far: _Far | None = None

    def __enter__(self) -> Self:
        task = self._task or asyncio.current_task()
        if task is None:
            raise RuntimeError("a Timeout is for code that runs in a task")
        self._task = task
        self._cancelling = task.cancelling()
        self._loop = task.get_loop()
        self._when = self._loop.time() + min(self._seconds, FOREVER)
        if self._seconds <= FAR:
            self.near()
        elif self._brief:
            _far_of(self._loop).begin(self)
        else:
            self._far = _far_of(self._loop)
            self._far.add(self, self._when)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        elif self._far is not None:
            self._far.discard(self, self._when)
            self._far = None
        if self._expired and task is not None:
            # Whoever else has cancelled the task means it.
            ours = task.uncancel() <= self._cancelling
            if ours and kind is asyncio.CancelledError:
                raise TimeoutError from error

    def expired(self) -> bool:
        """Tell whether the time is over, and the block has been told to end."""
        return self._expired

    def expire(self) -> None:
        """End the block now."""
        if not self._expired and self._task is not None:
            self._expired = True
            self._task.cancel()

    def far(self, sets: "_Far") -> None:
        """Have a place in a set, unless the block is over."""
        if self._task is not None:
            self._far = sets
            sets.add(self, self._when)

    def near(self) -> None:
        """Set the timer: the end is not far any more."""
        self._far = None
        self._timer = self._loop.call_at(self._when, self.expire)


class _Far:
    """Those of one event loop that end in seconds to come."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._seconds: dict[int, set[Timeout]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0  # the second for which the timer is set
        self._begun: list[Timeout] = []  # in this turn of the loop

    def begin(self, timeout: Timeout) -> None:
        if not self._begun:
            self._loop.call_soon(self._turn)
        self._begun.append(timeout)

    def _turn(self) -> None:
        begun, self._begun = self._begun, []
        for timeout in begun:
            timeout.far(self)

    def add(self, timeout: Timeout, when: float) -> None:
        second = int(when)
        found = self._seconds.get(second)
        if found is not None:
            found.add(timeout)
            return
        self._seconds[second] = {timeout}
        if self._timer is None or second < self._due:
            self._set(second)

    def discard(self, timeout: Timeout, when: float) -> None:
        second = int(when)
        found = self._seconds[second]
        found.discard(timeout)
        if not found and len(self._seconds) > KEPT:
            del self._seconds[second]  # the timer may come for nothing, once

    def _set(self, second: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._due = second
        self._timer = self._loop.call_at(second, self._come)

    def _come(self) -> None:
        self._timer = None
        for timeout in self._seconds.pop(self._due, ()):
            timeout.near()
        if self._seconds:
            self._set(min(self._seconds))


class _Here(threading.local):
    """What belongs to the event loop that runs in this thread."""

    loop: asyncio.AbstractEventLoop | None = None
    far: _Far


_here = _Here()


def _far_of(loop: asyncio.AbstractEventLoop) -> _Far:
    if _here.loop is not loop:
        _here.loop, _here.far = loop, _Far(loop)
    return _here.far


async def fault_of(failed: Callable[[], Awaitable[None]]) -> BaseException | None:
    """Give what a wait for a failure would raise now; None if it would go on waiting, or we end it ourselves."""
    waiting = asyncio.ensure_future(failed())
    await asyncio.wait([waiting], timeout=0)
    if waiting.done():
        return None if waiting.cancelled() else waiting.exception()
    waiting.cancel()
    await asyncio.wait([waiting])
    return None
