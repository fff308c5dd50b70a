"""Malformed requests over raw sockets against real gateways: no 500, all answers are HTTP, and nothing stays behind.

    make fuzz [SEED=7] [REQUESTS=100000] [CASE=12]

The same seed gives the same requests; how they meet in time it can't give. CASE sends one of them again, and shows it.
"""

# ruff: noqa: T201 - a program that prints

import argparse
import asyncio
import random
import sys

from tests.fuzz.campaign import Report, again, attack

WARM_UP = 20_000  # requests


def table(report: Report) -> str:
    lines = [f"{report.requests} requests in {report.cases} connections, {report.seconds:.0f} s", ""]
    lines += [f"  {count:>8}  {status}" for status, count in sorted(report.statuses.items())]
    lines += ["", f"  {'':10}{'begin':>10}{'warm':>10}{'end':>10}"]
    held = [report.figures[name] for name in ("begin", "warm", "end")]
    rows = {
        "memory, KB": [each.rss >> 10 for each in held],
        "descriptors": [each.descriptors for each in held],
        "connections": [each.connections for each in held],
        "tasks": [sum(each.tasks.values()) for each in held],
        "objects": [each.objects for each in held],
    }
    lines += [f"  {name:11}" + "".join(f"{value:>10}" for value in values) for name, values in rows.items()]
    return "\n".join(lines)


async def main(given: argparse.Namespace) -> int:
    print(f"SEED={given.seed}", flush=True)
    if given.case is not None:
        case, outcome = await again(given.seed, given.case)
        print(f"{case}\n{outcome}")
        return int(bool(outcome.wrong))
    report = await attack(given.seed, given.requests, min(WARM_UP, given.requests // 5), given.first)
    print(table(report))
    faults = report.faults()
    print("\n".join(faults) or "no fault was found")
    return int(bool(faults))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="case to begin with")
    parser.add_argument("--case", type=int, help="send this one alone")
    sys.exit(asyncio.run(main(parser.parse_args())))
