"""How long tasks run at a stretch before all else has its turn."""

import asyncio
import time
from collections.abc import Collection
from typing import Any

import pytest

from chains_stream.metrics import InHand
from chains_stream.turns import STRETCH, STRETCH_BESIDE, Turns


class Busy:
    """A worker that has some requests in flight."""

    name = "busy"
    paused: Collection[int] = ()

    def __init__(self, in_flight: int) -> None:
        self.in_flight = in_flight

    def lag(self) -> dict[int, int]:
        return {}


async def test_all_else_has_its_turn_before_the_next_stretch() -> None:
    turns = Turns(lambda: False)
    seen: list[str] = []
    asyncio.get_running_loop().call_soon(seen.append, "another")
    before = time.perf_counter()
    await turns.give_way()
    assert seen == ["another"]
    assert turns.end >= before + STRETCH


async def test_a_stretch_is_short_while_others_are_under_way() -> None:
    turns = Turns(lambda: True)
    await turns.give_way()
    assert turns.end <= time.perf_counter() + STRETCH_BESIDE


async def test_those_that_give_way_together_begin_one_stretch() -> None:
    asked: list[int] = []

    def beside() -> bool:
        asked.append(turns.aside)
        return False

    turns = Turns(beside)
    await asyncio.gather(*[turns.give_way() for _ in range(3)])
    assert asked == [3]
    assert turns.aside == 0


@pytest.mark.parametrize(
    ("others", "calls", "expected"), [([], [], False), ([0], [], False), ([0, 1], [], True), ([], ["a call"], True)]
)
def test_what_a_process_has_in_hand_beside_a_worker(others: list[int], calls: list[str], *, expected: bool) -> None:
    in_hand: Any = InHand()
    ours = Busy(5)
    in_hand.workers = {ours, *map(Busy, others)}
    in_hand.calls = {1: calls}
    assert in_hand.beside(ours) is expected
