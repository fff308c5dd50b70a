"""Rounds of all faults, in random order and at random moments, and a table of what became of every request.

    make chaos [SEED=7] [ROUNDS=3] [SECONDS=600] [ONLY="kill -9"]

The same seed gives the same order, victims and load; how processes meet in time it can't give.
"""

# ruff: noqa: T201 - a program that prints

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from tests.acceptance.command import Commands, commands
from tests.chaos import report
from tests.chaos.checker import Account, Topics
from tests.chaos.driver import Load
from tests.chaos.faults import FAIL_OVER, FAULTS, Fault
from tests.chaos.strike import strike
from tests.chaos.world import World, one_broker, three_brokers

MakeWorld = Callable[[Commands, Path], AbstractAsyncContextManager[World]]


async def run(make: MakeWorld, faults: Sequence[Fault], given: argparse.Namespace, accounts: list[Account]) -> None:
    """Run rounds in a world of their own, and add their accounts."""
    faults = [fault for fault in faults if given.only in fault.name]
    if not faults:
        return
    end = time.monotonic() + given.seconds
    choice = random.Random(f"{given.seed} {make.__name__}")
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder, commands() as started:
        try:
            async with make(started, Path(folder)) as world:
                topics = Topics(world)
                for number in range(given.rounds):
                    for fault in choice.sample(faults, len(faults)):
                        if time.monotonic() > end:
                            return
                        load = Load(given.unary, given.streams)
                        name = f"{given.seed}-{len(accounts)}"
                        found = await strike(world, topics, fault, choice, load=load, name=name)
                        accounts.append(found)
                        print(f"round {number + 1}: {fault.name}: {report.summary([found])}", flush=True)
        except BaseException:
            with tempfile.NamedTemporaryFile("w", prefix="chaos-", suffix=".log", delete=False) as log:
                log.write(started.report())
            print(f"What the processes wrote is in {log.name}", file=sys.stderr)
            raise


async def main(given: argparse.Namespace) -> None:
    print(f"SEED={given.seed}", flush=True)
    accounts: list[Account] = []
    try:
        await run(one_broker, FAULTS, given, accounts)
        await run(three_brokers, [FAIL_OVER], given, accounts)
    finally:
        print(f"\n{report.table(accounts)}\n\n{report.summary(accounts)}. Failures that were told:\n")
        print("\n".join(report.reasons(accounts)) or "none")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    parser.add_argument("--rounds", type=int, default=3, help="of all faults")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no fault after these, on each Kafka")
    parser.add_argument("--only", default="", help="faults whose names hold this")
    parser.add_argument("--unary", type=float, default=Load.unary, help="requests a second")
    parser.add_argument("--streams", type=float, default=Load.streams, help="a second")
    asyncio.run(main(parser.parse_args()))
