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
    found = Account(fault, driver.requests)
    stuck: TimeoutError | None = None
    async with asyncio.TaskGroup() as group:
        group.create_task(driver.run())
        try:
            await _strike(world, fault, choice, driver, found)
        except TimeoutError as error:
            stuck = error
        finally:
            driver.stop()
    await account(world, topics, found)
    wrong = [*complaints(world, topics, found), *found.amiss()]
    topics.forget()
    if wrong or stuck:
        raise AssertionError("\n".join([f"{fault.name}:", *wrong])) from stuck
    return found


async def _strike(world: World, fault: Fault, choice: random.Random, driver: Driver, found: Account) -> None:
    """Note when it was broken, and mended. Raises TimeoutError if things do not get well again."""
    await driver.answered_since(0.0)
    await asyncio.sleep(choice.uniform(*BEFORE))
    found.struck = await fault.breaks(world, choice)
    found.mended = time.time()
    await driver.answered_since(found.mended)
    await asyncio.sleep(AFTER)
