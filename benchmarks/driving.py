"""What drives a measurement from a process of its own: it calls as it is told on stdin, and tells what that gave.

A caller, whatever it calls by, is a program that ends in `drive`. So all of them are loaded by the same code. One line
of JSON is a `Step`, its answer one line too: figures by name, in SI units.
"""

import asyncio
import itertools
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from chains_stream.load import Result, calls, closed_loop, open_loop

T = TypeVar("T")

_TICKS = os.sysconf("SC_CLK_TCK")


class WrongAnswerError(Exception):
    """What was measured answered, and not with what it should."""


class Step(msgspec.Struct, kw_only=True):
    """One measurement: a closed loop, or an open one if there is a rate.

    Attributes:
        in_flight: calls at once; of an open loop, the most.
        seconds: how long, the warm-up of `warm_up` left out.
        size: bytes of a payload.
        pids: the processes that answer: their processor time counts too.
        rate: calls due a second.
        count: calls in all, instead of the seconds.
        seed: of an open loop.
    """

    in_flight: int
    seconds: float = 2.0
    size: int = 1024
    warm_up: float = 0.3
    pids: Sequence[int] = ()
    rate: float | None = None
    count: int | None = None
    seed: int = 0


def text_payload(number: int, size: int) -> str:
    """Give a payload that no other number has."""
    return f"{number:012d}".ljust(size, "x")


def raw_payload(number: int, size: int) -> bytes:
    return text_payload(number, size).encode()


def cpu_seconds(pids: Sequence[int]) -> float:
    """Give the processor time that these processes have used so far, all their threads together."""
    used = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        used += int(fields[11]) + int(fields[12])  # utime and stime: proc(5) counts from 1, and two are cut off here
    return used / _TICKS


def figures_of(result: Result) -> dict[str, float]:
    """Give what a loop measured as figures; what it has no samples of is left out."""
    found: dict[str, float] = {"rate_per_s": result.rate_per_s, "client_cpu": result.client_cpu}
    if result.offered_per_s is not None:
        found |= {"offered_per_s": result.offered_per_s, "overflow": result.overflow, "unfinished": result.unfinished}
    if result.tokens:
        found["tokens_per_s"] = result.tokens_per_s
    named = {"": result.latency, "service_": result.service, "ttft_": result.first_token, "itl_": result.inter_token}
    for name, samples in named.items():
        if samples is not None:
            found |= {f"{name}{share}_s": getattr(samples, share) for share in ("p50", "p90", "p99", "p999", "max")}
    return found


def require_faultless(result: Result) -> None:
    """Raise WrongAnswerError for anything but right answers. An open loop beyond the knee may leave some unanswered."""
    if result.failed or not (result.faultless or result.loop == "open"):
        raise WrongAnswerError(f"{result.failed}, {result.unfinished} unanswered, {result.completed} answered")


async def measure(call: Callable[[T], Awaitable[T]], payload: Callable[[int, int], T], step: Step) -> dict[str, float]:
    """Do a step with a call that is to give back what it gets."""
    numbers = itertools.count()

    async def once() -> None:
        sent = payload(next(numbers), step.size)
        if await call(sent) != sent:
            raise WrongAnswerError

    act = calls(once)
    if step.warm_up:
        require_faultless(await closed_loop(act, in_flight=step.in_flight, seconds=step.warm_up))
    busy = time.process_time() + cpu_seconds(step.pids)
    if step.rate is not None:
        result = await open_loop(
            act, rate=step.rate, seconds=step.seconds, in_flight=step.in_flight, seed=step.seed, drain=5.0
        )
    else:
        seconds = None if step.count is not None else step.seconds
        result = await closed_loop(act, in_flight=step.in_flight, seconds=seconds, count=step.count)
    require_faultless(result)
    busy = time.process_time() + cpu_seconds(step.pids) - busy
    return figures_of(result) | {"cpu_s_per_call": busy / max(1, result.completed), "calls": result.completed}


async def drive(call: Callable[[T], Awaitable[T]], payload: Callable[[int, int], T], url: str = "") -> None:
    """Say that it is ready, and what URL it serves if any, then do the steps that come, until there are no more."""

    async def do(step: Step) -> dict[str, float]:
        return await measure(call, payload, step)

    await obey(do, Step, url)


Order = TypeVar("Order")


async def obey(do: Callable[[Order], Awaitable[dict[str, float]]], kind: type[Order], url: str = "") -> None:
    """Do what comes, a line of JSON each, and tell what it gave, until there is no more."""
    print(f"Driver is ready {url}".rstrip(), flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        figures = await do(msgspec.json.decode(line, type=kind))
        print(msgspec.json.encode(figures).decode(), flush=True)
