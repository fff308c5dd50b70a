"""Reading back what was answered to a request, from a log that is not what it was."""

import asyncio
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


async def test_a_log_that_lost_its_end_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readback, "SILENCE", 0.1)
    broker, topic, one = open_broker(Settings()), f"t{uuid4().hex[:10]}", new_id()
    await broker.start()
    back = ReadBack(broker)
    try:
        await broker.ensure_topics([TopicSpec(topic, 1, 60_000)])
        frame = Done(one, 1, value=msgspec.Raw(b"\xc0"))
        at = await (await broker.publish(topic, encode_frames([frame]), partition=0))
        lost, found = await asyncio.gather(
            back.frames(topic, 0, 0, at + 5, one), back.frames(topic, 0, 0, at + 1, one), return_exceptions=True
        )
        assert isinstance(lost, OffsetExpiredError)
        assert not isinstance(found, BaseException)
        assert [each for each, _ in found] == [frame]
    finally:
        await back.close()
        await broker.close()
