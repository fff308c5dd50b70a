"""All cases against servers in a process of their own, and how that process is before and after."""

# ruff: noqa: T201 - it shows how far it is

import asyncio
import json
import os
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import msgspec
from websockets.asyncio.client import connect

from tests.fuzz.attack import Case, Outcome, strike
from tests.fuzz.drafts import CHAT, ORDER, ORDERS, SOCKET, TALK
from tests.fuzz.server import KEY, Figures

AT_ONCE = 96  # connections
ROUND = 1_000  # cases, until valid requests are sent again
SETTLE = 30.0  # seconds for what still runs, or is kept, to end
STARTED_WITHIN = 60.0
MORE_RSS = 10 << 20  # bytes that may be held after the attack beyond those after the warm-up; or a tenth
SHOWN = 10  # wrong outcomes

_decode = msgspec.json.Decoder(Figures).decode


@dataclass
class Report:
    """What came of an attack."""

    cases: int = 0
    requests: int = 0
    seconds: float = 0.0
    statuses: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    figures: dict[str, Figures] = field(default_factory=dict)

    def faults(self) -> list[str]:
        """Give what is not as it should be."""
        found = list(self.wrong)
        warm, end = self.figures["warm"], self.figures["end"]
        found += [f"logged: {text}" for text in end.errors]
        if end.rss - warm.rss > max(MORE_RSS, warm.rss // 10):
            found.append(f"memory: {warm.rss >> 10} KB after the warm-up, {end.rss >> 10} KB at the end")
        begin = self.figures["begin"]
        if end.connections or end.descriptors > begin.descriptors:
            found.append(
                f"descriptors: {begin.descriptors} before, {end.descriptors} after; {end.connections} connections"
            )
        if more := Counter(end.tasks) - Counter(begin.tasks):
            found.append(f"tasks: {dict(more)}")
        return found


class Target:
    """The servers, and the process that they run in."""

    def __init__(self, process: asyncio.subprocess.Process, urls: list[str]) -> None:
        self.urls = urls
        self._process = process

    async def figures(self) -> Figures:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"\n")
        async with asyncio.timeout(STARTED_WITHIN):
            return _decode(await self._process.stdout.readline())

    async def settled(self, before: Figures) -> Figures:
        """Give the figures once nothing runs or is open beyond what there was, or after a while what there is."""
        end = asyncio.get_running_loop().time() + SETTLE
        while True:
            now = await self.figures()
            more = now.connections or now.descriptors > before.descriptors or Counter(now.tasks) - Counter(before.tasks)
            if not more or asyncio.get_running_loop().time() > end:
                return now
            await asyncio.sleep(0.2)  # it can't tell us

    async def ids(self) -> list[str]:
        """Have each server answer valid requests, and give an id of each. Raises AssertionError."""
        found: list[str] = []
        async with httpx.AsyncClient(timeout=STARTED_WITHIN, trust_env=False) as http:
            for number, url in enumerate(self.urls):
                if number == SOCKET:
                    found.append(await _converse(url, found[ORDERS]))
                    continue
                arguments = {"request": CHAT} if number == TALK else {"order": ORDER, "note": "n"}
                headers = {"authorization": f"Bearer {KEY}"}
                ran = await http.post(f"{url}/run_remote", json=arguments, headers=headers)
                assert ran.status_code == httpx.codes.OK, ran.text
                assert (
                    (b'"nine' in ran.content or b" nine" in ran.content) if number == TALK else ran.json()[0] == "tea n"
                )
                taken = await http.post(f"{url}/async_run_remote", json=arguments, headers=headers)
                assert taken.status_code == httpx.codes.ACCEPTED, taken.text
                found.append(taken.json()["request_id"])
        return found


async def _converse(url: str, request_id: str) -> str:
    """Have a WebSocket echo; give an id that is of no request there."""
    async with asyncio.timeout(STARTED_WITHIN), connect(f"{url.replace('http', 'ws', 1)}/websocket") as websocket:
        await websocket.send("tea")
        assert await websocket.recv() == "tea"
    return request_id


@asynccontextmanager
async def target() -> AsyncIterator[Target]:
    """Servers that run as long as the block, and end well."""
    environment = {**os.environ, "PYTHONWARNINGS": "error", "MALLOC_ARENA_MAX": "2"}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.fuzz.server",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        env=environment,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        async with asyncio.timeout(STARTED_WITHIN):
            urls = json.loads(await process.stdout.readline())
        yield Target(process, urls)
        process.stdin.close()
        async with asyncio.timeout(STARTED_WITHIN):
            assert await process.wait() == 0, "the servers end well"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def attack(seed: int, requests: int, warm_up: int, first: int = 0) -> Report:
    """Send so many requests; the figures are taken before, after the warm-up, and at the end."""
    report = Report(cases=first)
    clock = asyncio.get_running_loop().time
    async with target() as servers:
        await servers.ids()
        report.figures["begin"] = await servers.figures()
        began = clock()
        while report.requests < requests and len(report.wrong) < SHOWN:
            ids = await servers.ids()
            await _round(seed, servers.urls, ids, report)
            if "warm" not in report.figures and report.requests >= warm_up:
                report.figures["warm"] = await servers.settled(report.figures["begin"])
            print(f"\r{report.requests} requests, {clock() - began:.0f} s", end="", file=sys.stderr, flush=True)
        report.seconds = clock() - began
        try:
            await servers.ids()
        except (httpx.HTTPError, AssertionError) as error:
            report.wrong.append(f"a valid request is not answered any more: {error!r}")
        report.figures["end"] = await servers.settled(report.figures["begin"])
        report.figures.setdefault("warm", report.figures["end"])
    print(file=sys.stderr)
    return report


async def again(seed: int, number: int) -> tuple[Case, Outcome]:
    """Run one case alone."""
    async with target() as servers:
        case = Case.make(seed, number, await servers.ids())
        return case, await strike(case, servers.urls[case.server])


async def _round(seed: int, urls: list[str], ids: list[str], report: Report) -> None:
    numbers = iter(range(report.cases, report.cases + ROUND))

    async def client() -> None:
        for number in numbers:
            case = Case.make(seed, number, ids)
            outcome = await strike(case, urls[case.server])
            report.requests += case.requests
            report.statuses += outcome.statuses
            if outcome.wrong:
                report.wrong.append(
                    f"case {number}, which {case.way.value}: {outcome.wrong}; sent {case.data[:1_500]!r}"
                )

    async with asyncio.TaskGroup() as clients:
        for _ in range(AT_ONCE):
            clients.create_task(client())
    report.cases += ROUND
