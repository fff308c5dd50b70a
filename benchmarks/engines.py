"""Measure what we add to a bare vLLM engine, in one run: tokens a second, and the time to the first.

    make bench-engines                                          # a tiny random model on the CPU: some minutes
    .venv-vllm/bin/python -m benchmarks.engines --model <folder> --streams 1 8 --repeats 3

Every way to the engine is measured with each number of streams in each repeat, each first in turn, and compared with
the bare engine in the same repeat. All answers must be those of the bare engine, token for token.
"""

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import msgspec

from benchmarks import engine_report, models, processes
from benchmarks.bench import family_of, in_turn, say
from benchmarks.driving import WrongAnswerError, cpu_seconds
from benchmarks.engine_report import Sample
from benchmarks.generation import Figures, Load, http_client, measure
from benchmarks.http_caller import Pool

CHAIN = "benchmarks/chains/engine.py"
RESULTS = processes.ROOT / "benchmarks" / "results"
START_SECONDS = 600.0  # of a model that is large, on a machine that is small
TOKENS = 64  # an answer
# What vLLM's own server imports beside what vLLM's API needs.
SERVER = ("uvicorn", "watchfiles", "prometheus_fastapi_instrumentator", "model_hosting_container_standards")
# By itself an engine on a CPU keeps to the first core, even beside others, and has a process more than it needs.
ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"}
ON_CPU = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 256 << 20}
EXTRA = {"distributed_executor_backend": "uni"}
TOLD = {
    "bare": "the engine, asked in its process: no HTTP, prompts rendered before",
    "chain": "a Chainlet, called in the same process over the embedded broker",
    "gateway": "`chains run`: HTTP, gateway, embedded broker and worker in that process",
    "kafka": "`chains gateway` and `chains worker` in processes of their own, and a real Kafka between them",
    "vllm serve": "vLLM's own server of OpenAI's API",
}


@dataclass(frozen=True)
class System:
    """One way to an engine: `ask` loads it, and `pids` are the processes on the way, those of the engine left out."""

    name: str
    ask: Callable[[Load], Awaitable[Figures]]
    pids: tuple[int, ...]

    @classmethod
    def inside(cls, name: str, serving: processes.Serving, pool: Pool) -> "System":
        """Give a way that the process of the engine measures itself."""

        async def ask(load: Load) -> Figures:
            connection = await pool.take()
            data = await connection.post("/run_remote", msgspec.json.encode({"way": name, "load": load}))
            connection.close()
            return msgspec.json.decode(data, type=Figures)

        return cls(name, ask, (serving.pid,))

    @classmethod
    def over_http(cls, name: str, pool: Pool, *pids: int, model: str = "chat") -> "System":
        async def ask(load: Load) -> Figures:
            return await measure(http_client(pool, load.tokens, model), load)

        return cls(name, ask, pids)

    async def sample(self, load: Load, repeat: int) -> tuple[Sample, Figures]:
        """Measure once."""
        own, all_of_them = self.pids, [pid for first in self.pids for pid in family_of(first)]
        before = [cpu_seconds(pids) for pids in (own, all_of_them)]
        figures = await self.ask(load)
        used = [cpu_seconds(pids) - one for pids, one in zip((own, all_of_them), before, strict=True)]
        return Sample.of(self.name, load, repeat, figures, *used), figures


async def compare(
    systems: Sequence[System], loads: Sequence[Load], repeats: int, *, exact: bool = True
) -> list[Sample]:
    """Measure all systems under all loads; the first is the bare engine.

    Raises WrongAnswerError for an answer that is not the bare engine's, if it has to be `exact`.
    """
    samples: list[Sample] = []
    for load in loads:
        warm = msgspec.structs.replace(load, questions=load.streams)
        _, expected = await systems[0].sample(load, 0)
        for system in systems:
            await system.sample(warm, 0)
        for repeat in range(repeats):
            for system in in_turn(systems, repeat):
                sample, figures = await system.sample(load, repeat)
                if exact and figures.answers != expected.answers:
                    raise WrongAnswerError(f"{system.name}: {engine_report.difference(figures, expected)}")
                samples.append(sample)
                say(f"{load.streams:4} streams, repeat {repeat + 1}: {sample}")
    return samples


def loads(streams: Sequence[int], tokens: int, questions: int | None = None) -> list[Load]:
    """Give a load for each number of streams: two rounds of them, and at least eight questions."""
    return [Load(streams=many, questions=questions or max(8, 2 * many), tokens=tokens) for many in streams]


def chain_arguments(engine: dict[str, Any], *more: str) -> tuple[str, ...]:
    return (CHAIN, "--set", f"engine={json.dumps(engine)}", "--log-level", "error", *more)


@contextmanager
def vllm_server(engine: dict[str, Any]) -> Iterator[processes.Serving]:
    """Start vLLM's own server, with the same arguments."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given = {name: value for name, value in engine.items() if name != "extra"} | engine.get("extra", {})
    flags = [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in given.items()]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host=127.0.0.1", f"--port={port}"]
    with TemporaryFile() as log:
        process = subprocess.Popen([*command, *flags], stdout=log, stderr=log, cwd=processes.ROOT)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_for(f"{url}/health", process)
            yield processes.Serving(process.pid, url)
        except processes.ProgramFailedError as error:
            log.seek(0)
            raise processes.ProgramFailedError(f"{error}:\n{log.read().decode(errors='replace')[-2000:]}") from None
        finally:
            process.terminate()
            process.wait()


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        try:
            with urlopen(url, timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.2)
    raise processes.ProgramFailedError(f"vLLM's server is not ready (status {process.poll()})")


def start(stack: ExitStack, given: argparse.Namespace, engine: dict[str, Any]) -> list[System]:
    """Start what is to be measured, one after the other; the engines wait for their turns and use no processor."""
    pools = given.pools
    say("starting `chains run`")
    run = stack.enter_context(processes.chains("run", *chain_arguments(engine, "--port", "0"), seconds=START_SECONDS))
    pool = Pool(run.url, pools)
    systems = [System.inside("bare", run, pool), System.inside("chain", run, pool)]
    systems.append(System.over_http("gateway", pool, run.pid))
    if not given.without_kafka:
        say("starting Kafka, a worker and a gateway")
        broker = stack.enter_context(processes.kafka(given.kafka))
        common = chain_arguments(engine, "--broker", broker, "--namespace", f"engines-{time.time_ns()}")
        worker = stack.enter_context(processes.chains("worker", *common, seconds=START_SECONDS))
        gateway = stack.enter_context(processes.chains("gateway", *common, "--port", "0"))
        systems.append(System.over_http("kafka", Pool(gateway.url, pools), gateway.pid, worker.pid))
    if missing := _missing():
        say(missing)
    else:
        say("starting vLLM's own server")
        server = stack.enter_context(vllm_server(engine))
        systems.append(System.over_http("vllm serve", Pool(server.url, pools), server.pid, model=engine["model"]))
    return systems


def _missing() -> str:
    """Say what vLLM's own server lacks here; nothing if it can be measured."""
    missing = [name for name in SERVER if find_spec(name) is None]
    return f"Not measured: vLLM's own server, for want of {', '.join(missing)}." if missing else ""


def engine_of(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Give the fields of the engines' `VLLMConfig`."""
    engine: dict[str, Any] = {"max_model_len": given.max_model_len, "max_num_seqs": max(given.streams)}
    if given.model:
        return engine | {"model": given.model} | dict(given.set)
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})
    return engine | {"model": str(models.make_tiny(folder / "tiny")), "extra": EXTRA} | ON_CPU | dict(given.set)


async def work(given: argparse.Namespace) -> None:
    with ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory())
        async with AsyncExitStack() as given.pools:
            engine = engine_of(given, Path(folder))
            systems = start(stack, given, engine)
            samples = await compare(systems, loads(given.streams, given.tokens), given.repeats)
    told = {system.name: TOLD[system.name] for system in systems}
    caveats = [*CAVEATS, *([] if given.model else [TINY]), *filter(None, [_missing()])]
    report = engine_report.Report.of("What we add to a bare vLLM engine", told, samples, engine, caveats=caveats)
    print(report.write(given.results, "engines"))


TINY = (
    "The model is a random one of two layers, which gives a token in a fraction of the time of a real one: what we add "
    "weighs many times more here than beside a model that is worth serving."
)
CAVEATS = [
    "Client, engine, gateway and Kafka share the processors of one machine: what one of them uses, the others lack.",
    "The bare engine is asked in its own process, with prompts that were rendered before: no server can do as well.",
    "A closed loop: so many streams are kept under way, two rounds of them.",
    "CPU is that of the processes on the way, without client and Kafka. Bare, it is what vLLM itself does.",
]


def setting(text: str) -> tuple[str, Any]:
    """Read ``name=value``, with a value in JSON, or else a text."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.engines", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a folder or an id of the hub; else a tiny random model is made")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32, 64], metavar="N", help="(1 8 32 64)")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"of an answer ({TOKENS})")
    parser.add_argument("--max-model-len", type=int, default=512, help="(512)")
    parser.add_argument("--repeats", type=int, default=5, help="(5)")
    parser.add_argument("--set", type=setting, action="append", default=[], metavar="NAME=VALUE", help="of VLLMConfig")
    parser.add_argument("--kafka", metavar="URL", help="kafka://host:port; one of our own is started if none is named")
    parser.add_argument("--without-kafka", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help=f"({RESULTS})")
    processes.end_what_was_started()
    asyncio.run(work(parser.parse_args(arguments)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
