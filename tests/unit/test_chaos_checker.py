"""The account of the fault suite: records are read in any order, and a fault that was none is told of."""

from pathlib import Path

import msgspec
import pytest
from aiokafka import ConsumerRecord

from chains_stream import messages
from tests.acceptance.command import Commands
from tests.chaos.checker import Account, Topics
from tests.chaos.driver import Outcome, Request
from tests.chaos.faults import FAIL_OVER, FAULTS, Fault, Struck
from tests.chaos.world import World


def test_a_letter_may_be_read_before_its_request() -> None:
    topics = Topics(World([], Commands(), Path("none")))
    topics.take(record("ns.Answer.Work.run_remote.01234567.dlq"))
    topics.merge()
    topics.take(record("ns.Answer.Work.run_remote.01234567"))
    topics.merge()
    assert [(asked.request, asked.chainlet, asked.dead) for asked in topics.asked.values()] == [("r", "Work", True)]


@pytest.mark.parametrize("fault", [*FAULTS, FAIL_OVER], ids=lambda fault: fault.name)
def test_a_fault_that_does_nothing_is_told_of(fault: Fault) -> None:
    """Two workers, of which one should have been struck, and everything goes on."""
    account = Account(fault, answered(), Struck(100.0, 110.0, frozenset({1})), mended=110.0)
    account.runs = [(1 + number % 2, each.sent) for number, each in enumerate(account.requests)]
    account.run_again = 1
    (told,) = account.amiss()
    assert told.startswith("the fault had no effect: ")


def test_a_fault_that_fails_too_much_is_told_of() -> None:
    requests = answered()
    runs = [(2, each.sent) for each in requests]
    account = Account(FAULTS[0], requests, Struck(100.0, 110.0, frozenset({1})), mended=110.0, runs=runs, run_again=1)
    for each in requests[40:64]:
        each.outcome = Outcome.FAILED
    assert list(account.amiss()) == []
    requests[64].outcome = Outcome.FAILED
    assert list(account.amiss()) == ["25 stream requests failed, of 40 that met the fault"]


def answered() -> list[Request]:
    """Requests of 25 s, four a second."""
    sent = [90 + number / 4 for number in range(100)]
    return [Request("r", "stream", {"ms": 1}, 1, at, at + 0.1, Outcome.ANSWERED) for at in sent]


def record(topic: str) -> "ConsumerRecord[bytes, bytes]":
    value = msgspec.msgpack.encode({"request": "r"})
    headers = messages.Request(correlation_id=b"i" * 16).to_headers()
    return ConsumerRecord(topic, 0, 0, 0, 0, None, value, None, 0, len(value), headers)
