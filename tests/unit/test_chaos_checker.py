"""The account of the fault suite: records are read in any order."""

from pathlib import Path

import msgspec
from aiokafka import ConsumerRecord

from chains_stream.messages import Request
from tests.acceptance.command import Commands
from tests.chaos.checker import Topics
from tests.chaos.world import World


def test_a_letter_may_be_read_before_its_request() -> None:
    topics = Topics(World([], Commands(), Path("none")))
    topics.take(record("ns.Answer.Work.run_remote.01234567.dlq"))
    topics.merge()
    topics.take(record("ns.Answer.Work.run_remote.01234567"))
    topics.merge()
    assert [(asked.request, asked.chainlet, asked.dead) for asked in topics.asked.values()] == [("r", "Work", True)]


def record(topic: str) -> "ConsumerRecord[bytes, bytes]":
    value = msgspec.msgpack.encode({"request": "r"})
    headers = Request(correlation_id=b"i" * 16).to_headers()
    return ConsumerRecord(topic, 0, 0, 0, 0, None, value, None, 0, len(value), headers)
