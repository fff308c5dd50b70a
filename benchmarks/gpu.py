"""Check the vLLM Chainlet on a GPU, and time it: against the bare engine, at 1, 8, 32 and 128 streams.

    pip install 'chains-stream[vllm]'
    python -m benchmarks.gpu                                    # a Llama of 1B parameters, random: no download
    python -m benchmarks.gpu --model meta-llama/Llama-3.1-8B-Instruct

One engine serves all: it is asked in its own process, by a Chainlet over the embedded broker, and over HTTP by way of
the gateway. Writes gpu.md and gpu.json. Ends with status 1 if a check fails.
"""

import argparse
import asyncio
import os
import re
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, ExitStack
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from benchmarks import engine_report, models, processes
from benchmarks.bench import say
from benchmarks.engines import (
    ENVIRONMENT,
    EXTRA,
    ON_CPU,
    RESULTS,
    START_SECONDS,
    TOLD,
    System,
    chain_arguments,
    compare,
    loads,
    setting,
)
from benchmarks.generation import CHAT, Load, body
from benchmarks.http_caller import Pool

RUNNING = re.compile(r"^vllm:num_requests_running\{.*\} (\S+)$", re.MULTILINE)
BEGUN, FREED = 60.0, 1.0  # seconds until a request runs; and until it no longer does, once its client has left
QUESTIONS = 8  # of a check
TINY = "tiny"
CAVEATS = [
    "The client shares the processors of the machine with the server; the GPU is the engine's alone.",
    "The bare engine is asked in its own process, with prompts that were rendered before: no server can do as well.",
    "A closed loop: so many streams are kept under way, two rounds of them.",
    "CPU is that of the server's processes; without the engine's own, bare, it is what vLLM does in the one that asks.",
]
BATCHES = (
    "Several streams are computed in batches of changing sizes, by other kernels than one alone: in 16 bits the "
    "likeliest token may be another one where two are nearly as likely. So the checks ask one by one."
)
MADE_UP = "The weights are made up: what is written is noise, and takes as long as if it were not."


async def check(name: str, system: System, bare: System, tokens: int) -> tuple[str, bool]:
    """Have questions answered one by one, and compare the answers with those of the bare engine."""
    load = Load(streams=1, questions=QUESTIONS, tokens=tokens)
    expected, found = await bare.ask(load), await system.ask(load)
    said = engine_report.difference(found, expected)
    say(f"{name}: {said}")
    return said, found.answers == expected.answers


async def check_cancelling(url: str, pool: Pool, most: int) -> tuple[str, bool]:
    """Leave in the middle of a long answer, and see how soon the engine is free."""
    async with httpx.AsyncClient(base_url=url, trust_env=False) as client:

        async def running() -> float:
            return sum(map(float, RUNNING.findall((await client.get("/metrics")).text)))

        connection = await pool.take()
        async for _ in connection.stream(CHAT, body(0, most, "chat")):
            break
        began = await _seconds_until(running, 1.0, BEGUN)
        connection.close()
        freed = await _seconds_until(running, 0.0, BEGUN)
    said = f"the engine is free {freed:.2f} s after a client has left" if began < BEGUN else "nothing ran"
    say(f"cancelling: {said}")
    return said, began < BEGUN and freed < FREED


async def _seconds_until(read: Callable[[], Awaitable[float]], value: float, most: float) -> float:
    """Wait until a metric has a value, and give how long that took; `most` if it never has."""
    began = time.monotonic()
    while await read() != value:
        if time.monotonic() - began > most:
            return most
        await asyncio.sleep(0.02)
    return time.monotonic() - began


def engine_of(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Give the fields of the engine's `VLLMConfig`."""
    engine: dict[str, Any] = {"max_num_seqs": max(given.streams), "max_model_len": given.max_model_len}
    if given.model:
        engine["model"] = given.model
    elif given.size == TINY:
        engine |= {"model": str(models.make_tiny(folder / TINY)), "extra": EXTRA} | ON_CPU
        os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})
    else:
        engine |= {"model": str(models.make_shape(folder / given.size, given.size)), "load_format": "dummy"}
    return engine | dict(given.set)


async def work(given: argparse.Namespace) -> bool:
    checks: dict[str, str] = {}
    passed: list[bool] = []
    with TemporaryDirectory() as folder, ExitStack() as stack:
        engine = engine_of(given, Path(folder))
        say(f"starting the engine: {engine}")
        arguments = chain_arguments(engine, "--port", "0")
        serving = stack.enter_context(processes.chains("run", *arguments, seconds=START_SECONDS))
        async with AsyncExitStack() as pools:
            pool = Pool(serving.url, pools)
            bare, chain, resumed = (System.inside(name, serving, pool) for name in ("bare", "chain", "resumed"))
            gateway = System.over_http("gateway", pool, serving.pid)
            for name, system in (
                ("greedy, by a Chainlet", chain),
                ("greedy, over HTTP", gateway),
                ("resumed", resumed),
            ):
                checks[name], right = await check(name, system, bare, given.tokens)
                passed.append(right)
            checks["cancelling"], right = await check_cancelling(serving.url, pool, given.max_model_len - 256)
            passed.append(right)
            systems = [bare, chain, gateway]
            # One token at a time, all is computed alike; in batches it is on 32 bits alone.
            samples = await compare(systems, loads(given.streams, given.tokens), given.repeats, exact=False)
    told = {system.name: TOLD[system.name] for system in systems}
    caveats = [*CAVEATS, BATCHES, *([] if given.model or given.size == TINY else [MADE_UP])]
    title = f"A vLLM Chainlet on {processor()}"
    print(
        engine_report.Report.of(title, told, samples, engine, caveats=caveats, checks=checks).write(
            given.results, "gpu"
        )
    )
    return all(passed)


def processor() -> str:
    """Name what the engine computes on."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a folder or an id of the hub; else one of --size is made")
    parser.add_argument("--size", choices=[TINY, *models.SHAPES], default="1b", help="of a random Llama (1b)")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32, 128], metavar="N", help="(1 8 32 128)")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer (128)")
    parser.add_argument("--max-model-len", type=int, default=2048, help="(2048)")
    parser.add_argument("--repeats", type=int, default=3, help="(3)")
    parser.add_argument("--set", type=setting, action="append", default=[], metavar="NAME=VALUE", help="of VLLMConfig")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help=f"({RESULTS})")
    given = parser.parse_args(arguments)
    if find_spec("vllm") is None:
        parser.error("vLLM is not installed here: pip install 'chains-stream[vllm]'")
    processes.end_what_was_started()
    return 0 if asyncio.run(work(given)) else 1


if __name__ == "__main__":
    sys.exit(main())
