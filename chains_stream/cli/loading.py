"""What `chains bench` does: serves a Chain file if it is given one, loads it over HTTP, and tells of it."""

import asyncio
import itertools
import os
import re
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import click
import httpx
import msgspec

from chains_stream import load
from chains_stream.cli.example import example
from chains_stream.cli.figures import Machine, Report, caveats, duration, kinds, number, plots
from chains_stream.cli.options import parameter_flags
from chains_stream.cli.process import Signals, run, until_stopped
from chains_stream.cli.report import FAILED, printable, say
from chains_stream.cli.request import refusal
from chains_stream.errors import ChainsRuntimeError, ChainsUsageError, GatewayError
from chains_stream.load import Act, FailedError, Loop, Result, Samples
from chains_stream.load_http import EVENTS, LINES, Client
from chains_stream.settings import Settings

NAMESPACE = "bench"  # of a Chain that is served for this alone: its requests are not for anybody's workers
END_SECONDS = 10.0  # for that Chain to end in order, with nothing to do any more
TRY_IT_LINES = 2  # that follow the one which says that a Chain is ready
SHOWN = 100  # characters of the arguments
FIRST_SHARE = 0.2  # of the most that a closed loop reached: where a sweep begins
_READY = re.compile(rb" is ready on (http://\S+)$")


class Plan(NamedTuple):
    """The loads, in the order of this list; each lasts `seconds`, or closed loops until `requests` were sent."""

    in_flight: Sequence[int] | None
    rate: Sequence[float] | None
    sweep: bool
    seconds: float
    warm_up: float
    requests: int | None


class Wanted(NamedTuple):
    """What becomes of the figures."""

    style: str
    out: Path | None
    allow_failures: bool


def bodies(given: str | None, path: Path | None) -> list[bytes]:
    """Read the arguments to send in turn; none if they are to be made up. Raises ChainsUsageError."""
    if path is None:
        named = [("--body", given.encode())] if given is not None else []
    else:
        lines = path.read_bytes().split(b"\n")
        named = [(f"{path}:{at}", line) for at, line in enumerate(lines, 1) if line.strip()]
        if not named:
            raise ChainsUsageError(f"{path}: no line of JSON in it")
    for name, body in named:
        try:
            msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        except msgspec.DecodeError as error:
            raise ChainsUsageError(f"{name}: not a JSON object: {error}") from None
    return [body for _, body in named]


def bench(target: str, settings: Settings, given: Sequence[bytes], plan: Plan, wanted: Wanted) -> None:
    """Load a gateway or a file as planned, and print the figures. Raises ChainsRuntimeError if requests failed."""
    report = Report(machine=Machine.here(), target=target, where=target, shared=True)

    async def work(signals: Signals) -> None:
        await until_stopped(_measure(target, settings, given, plan, report), signals)

    try:
        run(work)
        report.complete = True
    finally:
        if report.loads or report.sweep:
            _show(report, wanted)
    failed = report.failed.total()
    if failed and not wanted.allow_failures:
        sent = failed + sum(found.completed for found in report.loads)
        raise ChainsRuntimeError(f"{number(failed)} of {number(sent)} requests failed: {kinds(report.failed)}")


def _show(report: Report, wanted: Wanted) -> None:
    report.caveats = caveats(report)
    as_json = msgspec.json.format(msgspec.json.encode(report), indent=2).decode()
    click.echo(as_json if wanted.style == "json" else report.table())
    if wanted.out is not None:
        wanted.out.mkdir(parents=True, exist_ok=True)
        (wanted.out / "bench.json").write_text(as_json + "\n", encoding="utf-8")
        (wanted.out / "bench.txt").write_text(report.table() + "\n", encoding="utf-8")
        for name, drawn in plots(report).items():
            (wanted.out / f"{name}.svg").write_text(drawn, encoding="utf-8")


async def _measure(target: str, settings: Settings, given: Sequence[bytes], plan: Plan, report: Report) -> None:
    if target.startswith(("http://", "https://")):
        await _load_all(target, settings, given, plan, report)
        return
    kafka = not settings.embedded
    broker = settings.broker if kafka else "the embedded broker"
    report.where = f"{target}, gateway and Chainlets in one process, on {broker}"
    async with _served(target, settings) as url:
        await _load_all(url, settings, given, plan, report)


async def _load_all(url: str, settings: Settings, given: Sequence[bytes], plan: Plan, report: Report) -> None:
    key = None if settings.api_key is None else settings.api_key.get_secret_value()
    async with Client(url, key=key) as client:
        report.shared = client.host in ("localhost", "127.0.0.1", "::1")
        sent = list(given) or [await _made_up(url)]
        report.streams = await _streams(client, sent[0], made_up=not given)
        what = "streams" if report.streams else "calls"
        report.where += f"\n{what}, {_sizes(sent)}"
        turn = itertools.cycle(sent)
        if report.streams:
            act = load.streams(lambda: client.stream(next(turn)))
        else:
            act = load.calls(lambda: client.call(next(turn)))
        await _Loads(act, plan, report).all()


class _Loads:
    """Runs the loads of a plan, and adds what each measures to a report."""

    def __init__(self, act: Act, plan: Plan, report: Report) -> None:
        self._act = act
        self._plan = plan
        self._report = report

    async def all(self) -> None:
        plan, loads = self._plan, self._report.loads
        for level in plan.in_flight or ():
            loads.append(await self._closed(level))
        for rate in plan.rate or ():
            loads.append(await self._open(rate, loads))
        if plan.sweep:
            most = max((found.rate_per_s for found in loads if found.loop == "closed"), default=0.0)
            start = min(plan.rate) if plan.rate else max(1.0, FIRST_SHARE * most)
            steps = self._report.sweep

            async def step(rate: float) -> Result:
                return await self._open(rate, steps)

            found = await load.sweep(step, start=start, each=steps.append)
            self._report.knee_per_s = found.knee_per_s

    async def _closed(self, level: int) -> Result:
        plan, samples = self._plan, Samples()
        seconds = None if plan.requests else plan.seconds
        with self._kept(samples, self._report.loads, "closed", level):
            result = await load.closed_loop(
                self._act, in_flight=level, seconds=seconds, count=plan.requests, warm_up=plan.warm_up, into=samples
            )
        _tell(f"{number(level)} in flight", result)
        return result

    async def _open(self, rate: float, into: list[Result]) -> Result:
        plan, samples = self._plan, Samples()
        with self._kept(samples, into, "open", load.MAX_IN_FLIGHT):
            result = await load.open_loop(
                self._act, rate=rate, seconds=plan.seconds, warm_up=plan.warm_up, into=samples
            )
        _tell(f"{number(rate)} due a second", result)
        return result

    @contextmanager
    def _kept(self, samples: Samples, into: list[Result], loop: Loop, in_flight: int) -> Iterator[None]:
        """Have what was measured until a signal reported too; what was under way then is nobody's failure."""
        try:
            yield
        except asyncio.CancelledError:
            result = samples.result(loop, in_flight)
            if result.completed:
                into.append(msgspec.structs.replace(result, unfinished=0))
            raise


def _tell(what: str, result: Result) -> None:
    """Show that it goes on."""
    found = result.latency
    latency = f", p50 {duration(found.p50)}, p99 {duration(found.p99)}" if found else ""
    failed = sum(result.failed.values()) + result.unfinished
    say(f"{what}: {number(result.rate_per_s)} answers/s{latency}{f', {number(failed)} failed' if failed else ''}")


# --- what is loaded


async def _streams(client: Client, body: bytes, *, made_up: bool) -> bool:
    """Send one request, and tell whether its answer is a stream. Raises what a person should know of it."""
    try:
        answer = await client.first(body)
    except (OSError, FailedError) as error:
        raise _no_answer(client.url, error) from error
    if answer.succeeded:
        return answer.content_type in (LINES, EVENTS)
    refused = refusal(client.url, answer.content, answer.status)
    if made_up and isinstance(refused, ChainsUsageError):
        raise ChainsUsageError(f"{refused}; the arguments {_text(body)} were made up: name your own with --body")
    raise refused


def _no_answer(url: str, error: Exception) -> GatewayError:
    match error:
        case TimeoutError():
            reason = "the connection was not made in time"
        case ssl.SSLError() | socket.gaierror():  # their numbers are not the system's
            reason = str(error)
        case OSError(errno=int(code)):
            reason = os.strerror(code)
        case _:
            reason = str(error)
    return GatewayError(f"no answer from the gateway at {url}: {reason}")


async def _made_up(url: str) -> bytes:
    """Make up arguments by what the gateway says of itself. Raises ChainsUsageError, GatewayError."""
    try:
        async with httpx.AsyncClient() as http:
            found = await http.get(f"{url.rstrip('/')}/openapi.json")
            found.raise_for_status()
        document = found.json()
        post = document["paths"]["/run_remote"]["post"]
        schema = post["requestBody"]["content"]["application/json"]["schema"]
        return msgspec.json.encode(example(schema, document["components"]["schemas"]))
    except httpx.TransportError as error:
        raise GatewayError(f"no answer from the gateway at {url}: {error}") from error
    except (httpx.HTTPStatusError, ValueError, KeyError, TypeError) as error:
        raise ChainsUsageError(f"{url} does not say what arguments it takes: name them with --body") from error


@asynccontextmanager
async def _served(file: str, settings: Settings) -> AsyncIterator[str]:
    """Serve a Chain file in a process of its own, and give the URL. Raises click's Exit if it can't be."""
    given = settings.model_fields_set
    level, namespace = (
        getattr(settings, name) if name in given else default
        for name, default in (("log_level", "error"), ("namespace", NAMESPACE))
    )
    where = ("--host", "127.0.0.1", "--port", "0", "--broker", settings.broker, "--namespace", namespace)
    logs = ("--log-level", level, "--log-format", settings.log_format)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "chains_stream", "run", file, *parameter_flags(), *where, *logs),
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is ours: its requests are stopped first
    )
    forwarding: asyncio.Task[None] | None = None
    try:
        say(f"starting {file}")
        url = await _ready(process)
        forwarding = asyncio.create_task(_forward(process), name="what Chainlets print")
        yield url
    finally:
        await _end(process)
        if forwarding is not None:
            await forwarding


async def _ready(process: asyncio.subprocess.Process) -> str:
    """Wait until it serves. One that ends before has said why."""
    assert process.stdout is not None, "a pipe"
    while line := await process.stdout.readline():
        found = _READY.search(line)
        if found:
            for _ in range(TRY_IT_LINES):
                await process.stdout.readline()
            return found[1].decode()
    raise click.exceptions.Exit(await process.wait() or FAILED)


async def _forward(process: asyncio.subprocess.Process) -> None:
    """Keep what Chainlets print out of our own output, and from filling the pipe."""
    assert process.stdout is not None, "a pipe"
    while text := await process.stdout.read(1 << 16):
        sys.stderr.buffer.write(text)
        sys.stderr.flush()


async def _end(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(END_SECONDS):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


def _sizes(sent: Sequence[bytes]) -> str:
    if len(sent) == 1:
        return f"arguments {_text(sent[0])}"
    low, high = min(map(len, sent)), max(map(len, sent))
    return f"{number(len(sent))} arguments in turn, of {number(low)} to {number(high)} bytes"


def _text(body: bytes) -> str:
    """Show the arguments, or what they begin with."""
    text = printable(body.decode(errors="replace"))
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}… ({number(len(body))} bytes)"
