"""Reading back what was answered to a request, from a log that is not what it was."""

import asyncio
from collections.abc import AsyncIterator
from uuid import uuid4

import msgspec
import pytest

from chains_stream import readback
from chains_stream.broker import TopicSpec
from chains_stream.brokers import open_broker
from chains_stream.errors import OffsetExpiredError
from chains_stream.messages import Done, encode_frames, new_id
from chains_stream.readback import ReadBack
from chains_stream.settings import Settings

ONE = new_id()
FRAME = Done(ONE, 1, value=msgspec.Raw(b"\xc0"))


@pytest.fixture
async def log() -> AsyncIterator[tuple[ReadBack, str]]:
    """A log of one record."""
    broker, topic = open_broker(Settings()), f"t{uuid4().hex[:10]}"
    await broker.start()
    back = ReadBack(broker)
    await broker.ensure_topics([TopicSpec(topic, 1, 60_000)])
    await (await broker.publish(topic, encode_frames([FRAME]), partition=0))
    yield back, topic
    await back.close()
    await broker.close()


@pytest.mark.parametrize("at", [0, 1])
async def test_where_there_is_nothing_to_read_nobody_waits(log: tuple[ReadBack, str], at: int) -> None:
    back, topic = log
    assert await asyncio.wait_for(back.frames(topic, 0, at, at, ONE), 5) == []


async def test_a_log_that_lost_its_end_keeps_nobody_waiting(
    log: tuple[ReadBack, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readback, "SILENCE", 0.1)
    back, topic = log
    lost, found = await asyncio.gather(
        back.frames(topic, 0, 0, 5, ONE), back.frames(topic, 0, 0, 1, ONE), return_exceptions=True
    )
    assert isinstance(lost, OffsetExpiredError)
    assert not isinstance(found, BaseException)
    assert [each for each, _ in found] == [FRAME]
