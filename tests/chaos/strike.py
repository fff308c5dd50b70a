"""One fault under load, from the first request to the account of all of them."""

import asyncio
import random
import time

from tests.chaos.checker import Account, Topics, account, complaints
from tests.chaos.driver import Driver, Load
from tests.chaos.faults import Fault
from tests.chaos.world import World

BEFORE = (1.0, 3.0)  # seconds of load until the fault
AFTER = 2.0  # and after things are well again


async def strike(
    world: World, topics: Topics, fault: Fault, choice: random.Random, *, load: Load, name: str
) -> Account:
    """Break something under load, and account for every request. Raises AssertionError with what was wrong."""
    driver = Driver(name, world.urls, load, choice)
    async with asyncio.TaskGroup() as group:
        driving = group.create_task(driver.run())
        try:
            await driver.answered_since(0.0)
            await asyncio.sleep(choice.uniform(*BEFORE))
            broken = await fault.breaks(world, choice)
            mended = time.time()
            await driver.answered_since(mended)
            await asyncio.sleep(AFTER)
        finally:
            driver.stop()
        await driving
    found = Account(fault, driver.requests, broken, mended)
    await account(world, topics, found)
    wrong = list(complaints(world, topics, found))
    topics.forget()
    if wrong:
        raise AssertionError(f"{fault.name}:\n" + "\n".join(wrong))
    return found
