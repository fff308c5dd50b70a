"""A Chain that exercises every kind of call; used by the tests of `run_local`, both brokers and the gateway.

`Sample` is driven by a script of steps, so that a test says in one line what is to happen where.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import ClassVar

import msgspec

import chains_stream as chains


class SampleError(Exception):
    """A user's own exception, with a constructor that takes what was raised."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message, number)
        self.number = number


class Item(msgspec.Struct):
    name: str
    count: int = 1


class Seen:
    """What happened inside Chainlets, for a test in the same process to wait on and to look at."""

    counts: ClassVar[Counter[str]] = Counter()
    _changed: ClassVar[dict[int, asyncio.Event]] = {}

    @classmethod
    def reset(cls) -> None:
        cls.counts.clear()
        cls._changed.clear()

    @classmethod
    def note(cls, what: str) -> None:
        cls.counts[what] += 1
        for event in cls._changed.values():
            event.set()

    @classmethod
    async def until(cls, what: str, times: int = 1, seconds: float = 20.0) -> None:
        """Wait until `what` was noted so many times."""
        event = cls._changed.setdefault(id(asyncio.get_running_loop()), asyncio.Event())
        async with asyncio.timeout(seconds):
            while cls.counts[what] < times:
                event.clear()
                await event.wait()


class Leaf(chains.ChainletBase):
    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=16))

    async def run_remote(self, item: Item, mode: str = "echo") -> Item:
        match mode:
            case "fail":
                raise SampleError("no such item", item.count)
            case "flaky":
                Seen.note(item.name)
                if Seen.counts[item.name] < item.count:
                    raise SampleError("not yet", Seen.counts[item.name])
            case "hang":
                Seen.note(f"{item.name} began")
                try:
                    await asyncio.Event().wait()
                finally:
                    Seen.note(f"{item.name} stopped")
            case "wrong":
                return {"name": 7}  # type: ignore[return-value] # the mistake under test
            case _:
                pass
        return Item(item.name.upper(), item.count + 1)


class Counting(chains.ChainletBase):
    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=64))

    async def run_remote(self, upto: int, fail_at: int = -1, name: str = "") -> AsyncIterator[int]:
        try:
            for number in range(upto):
                if number == fail_at:
                    raise SampleError("broke off", number)
                if name:
                    Seen.note(name)
                yield number
        finally:
            if name:
                Seen.note(f"{name} closed")


class Middle(chains.ChainletBase):
    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=16))

    def __init__(self, leaf: Leaf = chains.depends(Leaf, retries=3, timeout_sec=2)) -> None:
        self._leaf = leaf

    async def run_remote(self, items: list[Item], mode: str = "echo") -> list[Item]:
        return await asyncio.gather(*(self._leaf.run_remote(item, mode=mode) for item in items))


@chains.mark_entrypoint
class Sample(chains.ChainletBase):
    """Unary, three levels deep: Sample, Middle, Leaf; and a stream below."""

    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=64))

    def __init__(
        self,
        middle: Middle = chains.depends(Middle, timeout_sec=30),
        counting: Counting = chains.depends(Counting),
    ) -> None:
        self._middle = middle
        self._counting = counting

    async def run_remote(self, items: list[Item], mode: str = "echo", count: int = 0) -> list[Item]:
        done = await self._middle.run_remote(items, mode)
        async for number in self._counting.run_remote(count):
            done.append(Item("counted", number))
        return done


@chains.mark_entrypoint("Relay")
class Relay(chains.ChainletBase):
    """A stream through a stream."""

    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=64))

    def __init__(self, counting: Counting = chains.depends(Counting, retries=2)) -> None:
        self._counting = counting

    async def run_remote(self, upto: int, fail_at: int = -1, name: str = "") -> AsyncIterator[str]:
        async for number in self._counting.run_remote(upto, fail_at, name=name):
            yield f"{number};"
