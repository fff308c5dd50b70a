"""How `chains call` sends its request and takes the answer."""

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, redirect_stdout

import click
import httpx
import msgspec

from chains_stream import policy
from chains_stream.calls import RemoteTarget, remote_target
from chains_stream.chain import Chain
from chains_stream.chainlet import chainlet_name, signature
from chains_stream.cli.output import Output
from chains_stream.cli.process import Signals, connect, run, until_stopped
from chains_stream.codec import Codec, codec_of
from chains_stream.errors import (
    BrokerError,
    ChainsUsageError,
    GatewayError,
    InvalidArgumentError,
    StreamInterruptedError,
    remote_detail,
)
from chains_stream.http_target import Problem, authorization
from chains_stream.log import get_logger
from chains_stream.options import RPCOptions
from chains_stream.settings import Settings
from chains_stream.worker import Host

PATIENCE = 3.0  # seconds of silence, until a person is told what is waited for
_CONNECT_TIMEOUT = 10.0  # seconds, to a gateway
_NDJSON = "application/x-ndjson"

log = get_logger(__name__)


# --- over the broker


def call_chain(chain: Chain, settings: Settings, json: bytes, output: Output) -> None:
    """Call a Chain over its broker; on the embedded one, with all its Chainlets in this process."""
    codec = codec_of(signature(chain.entrypoint))
    if codec.signature.websocket:
        raise ChainsUsageError(f"{chain.name} takes a WebSocket: serve it, and open one at /websocket of its gateway")
    try:
        arguments = codec.arguments_from_json(json)
    except InvalidArgumentError as error:
        raise ChainsUsageError(str(error)) from error

    async def work(signals: Signals) -> None:
        # What Chainlets print in this process is not the answer.
        with redirect_stdout(sys.stderr):
            await until_stopped(_call(chain, settings, arguments, output), signals)

    try:
        run(work)
    finally:
        output.end()


async def _call(chain: Chain, settings: Settings, arguments: bytes, output: Output) -> None:
    async with AsyncExitStack() as stack:
        if settings.embedded:
            target = await _hosted(chain, settings, stack)
            await _answer(target, chain, settings, arguments, output)
            return
        async with _patience(lambda: _say(f"waiting for the broker {settings.broker}")):
            broker, caller = await connect(stack, settings)
        target = await remote_target(chain, chain.entrypoint, caller, settings)

        async def no_worker() -> None:
            if await broker.members(chain.topic(chain.entrypoint, settings.namespace)) == 0:
                what = f"no worker serves {chainlet_name(chain.entrypoint)} in the namespace {settings.namespace}"
                await _say(f"waiting: {what}; start one with `chains worker`")

        async with _patience(no_worker):
            await _answer(target, chain, settings, arguments, output)


async def _hosted(chain: Chain, settings: Settings, stack: AsyncExitStack) -> RemoteTarget:
    # Once the call has ended, nothing is left that anybody waits for.
    hurried = settings.model_copy(update={"grace_period": 0.1})
    broker, caller = await connect(stack, hurried)
    host = Host(chain, chain.chainlets, broker, caller, hurried)
    stack.push_async_callback(host.drain)
    await host.start()
    return await remote_target(chain, chain.entrypoint, caller, hurried)


async def _answer(target: RemoteTarget, chain: Chain, settings: Settings, arguments: bytes, output: Output) -> None:
    found = signature(chain.entrypoint)
    codec: Codec = codec_of(found)
    scope = policy.Scope.new(settings.deadline)
    bounds = RPCOptions(timeout_sec=settings.deadline)
    name = f"{found.chainlet}.run_remote"
    if not found.streaming:
        result = await policy.call(lambda attempt: target.call(arguments, scope, attempt), bounds, scope, name)
        output.result(codec.result_to_json(result), codec.decode_result(result))
        return
    stream = policy.stream(lambda attempt: target.stream(arguments, scope, attempt), bounds, scope, name)
    async with aclosing(stream) as chunks:
        async for several in chunks:
            for chunk in several:
                output.chunk(codec.result_to_json(chunk), codec.decode_result(chunk))


@asynccontextmanager
async def _patience(tell: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """Call `tell` once if the block takes longer than `PATIENCE`."""

    async def later() -> None:
        while True:
            await asyncio.sleep(PATIENCE)
            try:
                return await tell()
            except BrokerError as error:
                # A group that is new to its cluster, say. If it lasts, the call itself fails, and that is told.
                log.debug("patience", reason=str(error))

    task = asyncio.create_task(later())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


async def _say(text: str) -> None:
    click.echo(text, err=True)


# --- through the gateway


def call_gateway(url: str, settings: Settings, json: bytes, output: Output) -> None:
    """Call a Chain through its gateway, knowing nothing of its types."""
    url = url.rstrip("/").removesuffix("/run_remote")
    headers = {"content-type": "application/json", "accept": f"{_NDJSON}, application/json"}
    headers |= authorization(settings.api_key)
    received = 0
    try:
        with (
            httpx.Client(timeout=httpx.Timeout(None, connect=_CONNECT_TIMEOUT)) as http,
            http.stream("POST", f"{url}/run_remote", content=json, headers=headers) as response,
        ):
            if response.status_code != httpx.codes.OK:
                raise refusal(url, response.read(), response.status_code)
            if not response.headers.get("content-type", "").startswith(_NDJSON):
                answer = response.read()
                output.result(answer, _text(answer))
                return
            for line in _lines(response.iter_bytes()):
                if (failure := _failure(line)) is not None:
                    raise failure.to_exception()
                output.chunk(line, _text(line))
                received += 1
    except httpx.InvalidURL as error:
        raise ChainsUsageError(f"{url}: {error}") from None
    except httpx.TransportError as error:
        reason = str(error) or type(error).__name__
        if received:
            broken = f"the connection to {url} broke after {received} chunks: {reason}"
            raise StreamInterruptedError(broken, chunks=received) from error
        raise GatewayError(f"no answer from the gateway at {url}: {reason}", status=503) from error
    finally:
        output.end()


def _lines(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Split at line feeds alone: a JSON string may hold what Unicode counts as the end of a line."""
    rest = b""
    for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        yield from lines
    if rest:
        yield rest


class _StreamProblem(Problem, kw_only=True):
    """What a problem has at least: a chunk of the user's that looks alike lacks something of it."""

    title: str
    detail: str
    status: int
    code: str
    request_id: str


class _Failure(msgspec.Struct, forbid_unknown_fields=True):
    """The last line of a stream that failed."""

    error: _StreamProblem


def _failure(line: bytes) -> Problem | None:
    if not line.startswith(b'{"error":'):
        return None
    try:
        return msgspec.json.decode(line, type=_Failure).error
    except msgspec.ValidationError:
        return None


def refusal(url: str, answer: bytes, status: int) -> Exception:
    """Give the error that an answer other than a success stands for."""
    try:
        error = msgspec.json.decode(answer, type=Problem).to_exception()
    except msgspec.DecodeError:
        return GatewayError(f"{url} is not a gateway of a Chain: it answered {status}", status=status)
    detail = remote_detail(error)
    if isinstance(error, InvalidArgumentError) and (detail is None or not detail.hops):
        return ChainsUsageError(str(error))  # ours: raised by the gateway, and not in a Chainlet
    return error


def _text(json: bytes) -> str | None:
    value = msgspec.json.decode(json) if json.startswith(b'"') else None
    return value if isinstance(value, str) else None
