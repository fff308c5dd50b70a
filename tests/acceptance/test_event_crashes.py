"""Events under workers that are killed: what each kind of delivery promises, for every one of them."""

import pytest

from tests.event_crashes import crash

EVENTS, KILLS = 4_000, 3

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(300)]


async def test_exactly_once_gives_each_output_once_and_in_order(kafka_url: str) -> None:
    account = await crash(kafka_url, "exactly_once", count=EVENTS, kills=KILLS)
    assert (account.missing, account.repeated, account.disordered) == (0, 0, 0)
    assert account.workers > 1


async def test_at_least_once_loses_none_and_keeps_their_order(kafka_url: str) -> None:
    account = await crash(kafka_url, "at_least_once", count=EVENTS, kills=KILLS)
    assert (account.missing, account.disordered) == (0, 0)
    assert account.workers > 1
