"""Joining the calls of several callers into one of a Chainlet that takes lists, and giving each what is its own."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec

from chains_stream import policy
from chains_stream.errors import InvalidResultError
from chains_stream.options import Batch
from chains_stream.policy import Scope

Run = Callable[[list[Any]], Awaitable[Any]]


class _Part:
    """What one caller gave."""

    __slots__ = ("batch", "items", "result", "scope", "together")

    def __init__(self, items: list[Any], result: asyncio.Future[list[Any]], scope: Scope | None) -> None:
        self.items = items
        self.result = result
        self.scope = scope
        self.batch: asyncio.Task[None] | None = None  # once it runs
        self.together: Sequence[_Part] = ()  # with whom


class Batcher:
    """Gathers calls while the first of them waits, and runs them as one; as many of these at once as there are calls.

    `run` is given all their items, and returns as many results.
    """

    def __init__(self, run: Run, batch: Batch) -> None:
        self._run = run
        self._batch = batch
        self._waiting: deque[_Part] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def call(self, items: list[Any]) -> list[Any]:
        """Give the results of some items. Raises what `run` does for them, or what stands in the place of a result."""
        loop = asyncio.get_running_loop()
        part = _Part(items, loop.create_future(), policy.current.get())
        self._waiting.append(part)
        if sum(len(each.items) for each in self._waiting) >= self._batch.max_size:
            self._flush()
        elif self._timer is None:
            self._timer = loop.call_later(self._batch.max_wait_ms / 1000, self._flush)
        try:
            results = await part.result
        except asyncio.CancelledError:
            if part in self._waiting:
                self._waiting.remove(part)
            elif part.batch is not None and all(each.result.done() for each in part.together):
                part.batch.cancel()  # nobody waits for it any more
            raise
        finally:
            part.together = ()
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    def _flush(self) -> None:
        """Run what waits, at most `max_size` items at once; what one caller gave is never divided."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._waiting:
            parts = [self._waiting.popleft()]
            size = len(parts[0].items)
            while self._waiting and size + len(self._waiting[0].items) <= self._batch.max_size:
                parts.append(self._waiting.popleft())
                size += len(parts[-1].items)
            task = asyncio.get_running_loop().create_task(self._serve(parts), name="batch")
            for part in parts:
                part.batch, part.together = task, parts
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, parts: Sequence[_Part]) -> None:
        """Run some parts, and each by itself if that fails: so nobody gets the error of somebody else's items."""
        scopes = [part.scope for part in parts if part.scope is not None]
        # Of those that belong to several requests: the calls that it makes last as long as the last one waits, and are
        # its own: whoever leaves does not end them for others.
        scope = msgspec.structs.replace(max(scopes, key=lambda each: each.deadline_ms), calls=set()) if scopes else None
        policy.current.set(scope)
        items = [item for part in parts for item in part.items]
        try:
            results = _checked(await self._run(items), len(items))
        except Exception as error:  # noqa: BLE001 - raised where it is awaited
            if len(parts) > 1:
                await asyncio.gather(*(self._serve([part]) for part in parts if not part.result.done()))
            elif not parts[0].result.done():
                parts[0].result.set_exception(error)
            return
        except asyncio.CancelledError:
            for part in parts:
                part.result.cancel()  # as it would be for one that is not joined: else they would wait for ever
            raise
        finally:
            if scope is not None:
                scope.close()
        at = 0
        for part in parts:
            if not part.result.done():
                part.result.set_result(results[at : at + len(part.items)])
            at += len(part.items)


def _checked(results: Any, count: int) -> list[Any]:
    if not isinstance(results, list):
        raise InvalidResultError(f"a batch gave a `{type(results).__name__}`, and not a list")
    if len(results) != count:
        raise InvalidResultError(f"a batch of {count} gave {len(results)} results: there is one for each item")
    return results
