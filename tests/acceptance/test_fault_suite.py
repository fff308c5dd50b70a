"""Every fault once, under load, on a real Kafka: each request is answered once, or fails with an error that is true.

`make chaos` does the same for longer, and on a cluster.
"""

import os
import random
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.acceptance.command import STARTED, commands
from tests.chaos import report
from tests.chaos.checker import Topics
from tests.chaos.driver import Load
from tests.chaos.faults import FAULTS, Fault
from tests.chaos.strike import strike
from tests.chaos.world import World, one_broker

SEED = int(os.environ.get("CHAOS_SEED") or random.randrange(1_000_000))

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(300), pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(
    request: pytest.FixtureRequest, kafka_url: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[World, Topics]]:
    """One for all faults: what one of them leaves behind, the next one meets."""
    with commands() as started:
        request.node.stash[STARTED] = started
        async with one_broker(started, tmp_path_factory.mktemp("chaos")) as running:
            yield running, Topics(running)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "-"))
async def test_each_request_is_accounted_for(world: tuple[World, Topics], fault: Fault) -> None:
    name = f"{SEED}-{FAULTS.index(fault)}"
    account = await strike(*world, fault, random.Random(name), load=Load(), name=name)
    print(f"CHAOS_SEED={SEED}\n{report.table([account])}")  # noqa: T201 - shown when it fails, and with -s
    assert account.delays()
