"""A real vLLM behind Kafka and a gateway, as OpenAI's client sees it: many at once, left, and with workers that die."""

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import openai
import pytest

from tests.acceptance.command import STARTED, Command, Commands, commands
from tests.vllm import tiny
from tests.vllm.bare import Asked, Said, generate

LLM = str(Path(__file__).parents[2] / "chainlets" / "llm.py")
LOADING = 240.0  # seconds that an engine may take to start on a machine that starts several
STREAMS = 64
TOKENS = 100
LONG = 6_000  # tokens of a generation that something happens to: a tiny model says hundreds a second
MANY = 4  # of those at once
ENGINE = {
    "dtype": "float32",
    "enforce_eager": "true",
    "max_model_len": str(tiny.MAX_POSITIONS),
    "max_num_seqs": str(STREAMS),
    "kv_cache_memory_bytes": str(256 << 20),
}

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(600)]

PROMPTS = [f"Tell me of the number {number}." for number in range(STREAMS)]
SHORT = [Asked(prompt, TOKENS) for prompt in PROMPTS]
LONGER = [Asked(prompt, LONG) for prompt in PROMPTS[:MANY]]
SEEDED = [Asked(prompt, LONG, seed=number, temperature=0.9) for number, prompt in enumerate(PROMPTS[:MANY])]


class Worker:
    """A worker with an engine of its own."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self.url = ""

    def ready(self) -> None:
        found = re.search(r"url=(\S+)", self.command.logged("health.ready"))
        assert found is not None
        self.url = found[1]
        self.command.ready(LOADING)

    async def metric(self, name: str) -> float:
        """Read the sum of what a metric says."""
        async with httpx.AsyncClient(trust_env=False, verify=False, timeout=30) as http:
            text = (await http.get(f"{self.url}/metrics")).text
        lines = [line for line in text.splitlines() if re.match(rf"{name}[{{ ]", line)]
        assert lines, f"{name} is among the metrics"
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    async def until(self, name: str, value: float) -> None:
        async def holds() -> bool:
            return await self.metric(name) == value

        await until(holds)

    def core(self) -> int:
        """Find the process of the engine's core."""
        (found,) = [child for child in children(self.command.pid) if is_spawned(child)]
        return found


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Wait for something that happens in another process, which can't tell us."""
    async with asyncio.timeout(30):
        while True:
            if await holds():
                return
            await asyncio.sleep(0.02)


def children(pid: int) -> list[int]:
    """Give the children of a process, whichever of its threads has started them."""
    return [int(each) for path in Path(f"/proc/{pid}/task").glob("*/children") for each in path.read_text().split()]


def is_spawned(pid: int) -> bool:
    """Tell whether a process is there, and was started by Python's multiprocessing to run something."""
    try:
        return "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()
    except FileNotFoundError:
        return False


class Fleet:
    """One gateway, and workers that come and go."""

    def __init__(self, start: Commands, model: Path, kafka_url: str) -> None:
        self._start = start
        self._flags = ["--broker", kafka_url, "--namespace", f"t{uuid4().hex[:12]}"]
        self._flags += [f"--set={name}={value}" for name, value in {**ENGINE, "model": str(model)}.items()]
        self._variables = {
            "CHAINS_KAFKA_SESSION_TIMEOUT_MS": "6000",
            "PYTHONWARNINGS": "default",  # what others warn of while they are imported is theirs
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else each engine keeps to the first core
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",  # as users run it
            "VLLM_LOGGING_LEVEL": "WARNING",
        }
        self._gateway = start("gateway", LLM, "--port", "0", *self._flags, variables=self._variables)
        self.url = self._gateway.ready()
        self.workers: list[Worker] = []

    def ready(self, count: int) -> list[Worker]:
        """Have so many workers."""
        new = [
            Worker(self._start("worker", LLM, "--health-port", "0", *self._flags, variables=self._variables))
            for _ in range(count - len(self.workers))
        ]
        for worker in new:
            worker.ready()
        self.workers += new
        return self.workers


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[Asked, Said]:
    asked = [*SHORT, *LONGER, *SEEDED]
    return dict(zip(asked, generate(model, asked), strict=True))


@pytest.fixture(scope="module")
def fleet(request: pytest.FixtureRequest, model: Path, kafka_url: str, expected: dict[Asked, Said]) -> Iterator[Fleet]:
    assert expected, "its engine has ended: as few as can be run at once"
    with commands() as started:
        request.node.stash[STARTED] = started
        yield Fleet(started, model, kafka_url)


@pytest.fixture
async def client(fleet: Fleet) -> AsyncIterator[openai.AsyncOpenAI]:
    http = openai.DefaultAsyncHttpxClient(trust_env=False)
    url = f"{fleet.url}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", timeout=120, http_client=http) as client:
        yield client


class Reading:
    """A stream that is read."""

    def __init__(self, client: openai.AsyncOpenAI, asked: Asked) -> None:
        self.asked = asked
        self.text = ""
        self.token_ids: list[int] = []
        self.begun = asyncio.Event()
        self.finish_reason: str | None = None
        self._client = client

    @property
    def said(self) -> Said:
        return Said(self.text, tuple(self.token_ids))

    async def read(self) -> None:
        stream = await self._client.chat.completions.create(
            model="",
            messages=[{"role": "user", "content": self.asked.prompt}],
            stream=True,
            max_completion_tokens=self.asked.max_tokens,
            temperature=self.asked.temperature,
            seed=self.asked.seed,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
        async with stream:
            async for chunk in stream:
                for choice in chunk.choices:
                    more: dict[str, Any] = choice.model_extra or {}
                    self.text += choice.delta.content or ""
                    self.token_ids += more.get("token_ids", ())
                    self.finish_reason = choice.finish_reason or self.finish_reason
                    if len(self.token_ids) >= TOKENS:
                        self.begun.set()


async def begin(client: openai.AsyncOpenAI, asked: list[Asked]) -> dict[Reading, "asyncio.Task[None]"]:
    """Begin streams, and wait until each has given something."""
    readings = {reading: asyncio.create_task(reading.read()) for reading in (Reading(client, each) for each in asked)}
    async with asyncio.timeout(60):
        await asyncio.gather(*(reading.begun.wait() for reading in readings))
    assert not any(task.done() for task in readings.values()), "and none has ended"
    return readings


async def test_64_streams_say_what_the_engine_says_by_itself(
    fleet: Fleet, client: openai.AsyncOpenAI, expected: dict[Asked, Said]
) -> None:
    (worker,) = fleet.ready(1)
    before = await worker.metric("vllm:generation_tokens_total")
    readings = [Reading(client, asked) for asked in SHORT]
    await asyncio.gather(*(reading.read() for reading in readings))
    assert [reading.said for reading in readings] == [expected[asked] for asked in SHORT]
    assert {reading.finish_reason for reading in readings} == {"length"}
    assert await worker.metric("vllm:generation_tokens_total") - before == STREAMS * TOKENS
    await worker.until("vllm:num_requests_running", 0)


async def test_a_disconnect_ends_the_generation(fleet: Fleet, client: openai.AsyncOpenAI) -> None:
    (worker,) = fleet.ready(1)
    before = await worker.metric("vllm:generation_tokens_total")
    readings = await begin(client, LONGER)
    assert await worker.metric("vllm:num_requests_running") == MANY
    left = asyncio.get_running_loop().time()
    for task in readings.values():
        task.cancel()
    await asyncio.wait(readings.values())
    await worker.until("vllm:num_requests_running", 0)
    seconds = asyncio.get_running_loop().time() - left
    made = await worker.metric("vllm:generation_tokens_total") - before
    assert made < MANY * LONG / 2, f"broken off, {seconds:.2f} s after their readers had left"
    assert await worker.metric("vllm:kv_cache_usage_perc") == 0
    print(f"the engine had stopped {seconds:.2f} s after its readers had left")  # noqa: T201 - a figure to report


async def test_a_generation_goes_on_where_a_worker_was_killed(
    fleet: Fleet, client: openai.AsyncOpenAI, expected: dict[Asked, Said]
) -> None:
    killed, other = fleet.ready(2)
    core = killed.core()
    readings = await begin(client, [*LONGER, *SEEDED])
    assert await killed.metric("vllm:num_requests_running"), "some of them run there"
    fleet.workers.remove(killed)
    os.kill(killed.command.pid, signal.SIGKILL)
    async with asyncio.timeout(120):
        await asyncio.gather(*readings.values())
    assert [reading.said for reading in readings] == [expected[reading.asked] for reading in readings]
    assert await other.metric("chains_redelivered_total") > 0

    async def gone() -> bool:
        return not is_spawned(core)

    await until(gone)  # an engine whose worker is gone keeps no memory


async def test_a_worker_whose_engine_dies_ends_and_others_go_on(
    fleet: Fleet, client: openai.AsyncOpenAI, expected: dict[Asked, Said]
) -> None:
    other, dead = fleet.ready(2)
    readings = await begin(client, [*LONGER, *SEEDED])
    assert await dead.metric("vllm:num_requests_running"), "some of them run there"
    fleet.workers.remove(dead)
    os.kill(dead.core(), signal.SIGKILL)
    async with asyncio.timeout(120):
        status = await asyncio.to_thread(dead.command.wait)
        await asyncio.gather(*readings.values())
    assert [reading.said for reading in readings] == [expected[reading.asked] for reading in readings]
    assert await other.metric("chains_redelivered_total") > 0
    assert status == 1
    assert re.search(r"^error: Chat can't serve any more: .*engine", dead.command.stderr.text(), re.MULTILINE)
