"""Events of which something is yet to be stored: when each of them is over, and with what error."""

import asyncio
import contextvars

from chains_stream.broker import Record
from chains_stream.errors import BrokerError
from chains_stream.event_lines import EventJob, Unstored
from chains_stream.offsets import Ledger

HERE, THERE = ("scored", 0), ("scored", 1)

Future = asyncio.Future[int]


class Watched:
    """What `Unstored` says is over."""

    def __init__(self) -> None:
        self.over: list[int] = []
        self.unstored = Unstored(lambda job: self.over.append(job.record.offset), contextvars.copy_context())

    def add(self, offset: int, *storing: tuple[tuple[str, int], Future]) -> EventJob:
        job = EventJob(Record("tickets", 0, offset, 0, None, b"", ()), Ledger())
        self.unstored.add(job, storing)
        return job


def future() -> Future:
    return asyncio.get_running_loop().create_future()


async def turn() -> None:
    """Let callbacks run."""
    await asyncio.sleep(0)


async def test_one_callback_tells_of_all_that_was_stored_together() -> None:
    watched = Watched()
    stored = [future() for _ in range(3)]
    for offset, each in enumerate(stored):
        watched.add(offset, (HERE, each))
    stored[0].set_result(0)
    stored[1].set_result(1)
    await turn()
    assert watched.over == [0, 1]
    assert [job.record.offset for job in watched.unstored] == [2]
    stored[2].set_result(2)
    await turn()
    assert watched.over == [0, 1, 2]
    assert not watched.unstored


async def test_a_partition_does_not_wait_for_another_one() -> None:
    watched = Watched()
    first, second = future(), future()
    watched.add(0, (HERE, first))
    watched.add(1, (THERE, second))
    second.set_result(0)
    await turn()
    assert watched.over == [1]


async def test_an_event_is_over_when_all_is_stored_that_it_gave() -> None:
    watched = Watched()
    here, there, behind = future(), future(), future()
    watched.add(0, (HERE, here), (THERE, there))
    watched.add(1, (HERE, behind))
    here.set_result(0)
    behind.set_result(1)
    await turn()
    assert watched.over == [1]
    there.set_result(0)
    await turn()
    assert watched.over == [1, 0]


async def test_the_first_error_of_an_event_is_kept() -> None:
    watched = Watched()
    lost, more, fine = future(), future(), future()
    job = watched.add(0, (HERE, lost), (HERE, more))
    other = watched.add(1, (HERE, fine))
    lost.set_exception(BrokerError("first"))
    more.set_exception(BrokerError("second"))
    fine.set_result(0)
    await turn()
    assert watched.over == [0, 1]
    assert str(job.error) == "first"
    assert other.error is None


async def test_what_was_stored_before_it_was_added() -> None:
    watched = Watched()
    stored = future()
    stored.set_result(7)
    watched.add(0, (HERE, stored))
    await turn()
    assert watched.over == [0]


async def test_what_was_given_up_is_not_stored() -> None:
    watched = Watched()
    lost, fine = future(), future()
    job = watched.add(0, (HERE, lost))
    watched.add(1, (HERE, fine))
    lost.cancel()
    fine.set_result(0)
    await turn()
    assert watched.over == [0, 1]
    assert isinstance(job.error, BrokerError)


async def test_a_defect_of_one_does_not_hold_up_those_behind_it() -> None:
    over: list[int] = []

    def fail_first(job: EventJob) -> None:
        over.append(job.record.offset)
        if len(over) == 1:
            raise RuntimeError("a defect")

    told: list[str] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: told.append(str(context["exception"])))
    watched = Watched()
    watched.unstored = Unstored(fail_first, contextvars.copy_context())
    stored = [future() for _ in range(3)]
    for offset, each in enumerate(stored):
        watched.add(offset, (HERE, each))
        each.set_result(offset)
    for _ in range(3):
        await turn()
    assert over == [0, 1, 2]
    assert told == ["a defect"]
