"""What `chains dlq` does with the letters of a Chain's Chainlets."""

import re
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from datetime import UTC, datetime
from typing import Any, NamedTuple

import click
import msgspec

from chains_stream.broker import Broker
from chains_stream.chain import Chain
from chains_stream.chainlet import chainlet_name, signature
from chains_stream.cli.output import Output
from chains_stream.cli.process import Signals, connected, patience, run, until_stopped
from chains_stream.cli.report import printable, say
from chains_stream.codec import Codec, codec_of
from chains_stream.errors import ChainsError, ChainsRuntimeError, ChainsUsageError
from chains_stream.letters import PARTITION, Letter, dead_letter_topic, held, read_letters, send_again
from chains_stream.messages import (
    ATTEMPT,
    CORRELATION_ID,
    DATAREF,
    DEADLINE,
    JSON,
    REPLY_OFFSET,
    REPLY_PARTITION,
    WINDOW,
)
from chains_stream.settings import Settings
from chains_stream.store import Store, reference_in

REASON_WIDTH = 80  # characters of a reason in a list
SHOWN_BYTES = 500  # of a value that can't be read
_ID = re.compile(r"(?P<name>.+)/(?P<offset>[0-9]{1,18})")


class Box(NamedTuple):
    """The letters of one Chainlet."""

    name: str
    topic: str
    codec: Codec


class Place(NamedTuple):
    """Where one letter lies, as an operator named it."""

    box: Box
    offset: int

    def __str__(self) -> str:
        return f"{self.box.name}/{self.offset}"


def boxes(chain: Chain, names: Iterable[str], settings: Settings) -> list[Box]:
    """Give those of the named Chainlets, or of all, from the entrypoint down. Raises ChainsUsageError."""
    chosen = [chain.find(name) for name in names] or reversed(chain.chainlets)
    return [
        Box(chainlet_name(cls), chain.topic(cls, settings.namespace), codec_of(signature(cls)))
        for cls in dict.fromkeys(chosen)
    ]


def place(chain: Chain, text: str, settings: Settings) -> Place:
    """Find what an id names. Raises ChainsUsageError if it is none."""
    found = _ID.fullmatch(text)
    if found is None:
        example = f"{chainlet_name(chain.entrypoint)}/0"
        raise ChainsUsageError(f"{text!r} is no id of a letter: write CHAINLET/NUMBER, as in {example}")
    return Place(boxes(chain, [found["name"]], settings)[0], int(found["offset"]))


# --- list


def list_all(chosen: Sequence[Box], settings: Settings, *, as_json: bool) -> None:
    async def work(broker: Broker) -> None:
        all_held = await _held(broker, chosen)
        width = max((len(f"{box.name}/{offsets.stop}") for box, offsets in all_held.items()), default=0)
        output = Output(raw=False)
        async with aclosing(_each(broker, all_held)) as letters:
            async for where, letter in letters:
                if as_json:
                    output.result(msgspec.json.encode(_summary(where, letter)), None)
                else:
                    click.echo(printable(f"{where!s:<{width}}  {_line(letter)}"))

    _run(work, settings)


def _line(letter: Letter) -> str:
    request_id = _request_id(letter) or "-"
    at = f"{_shown(letter.partition)}@{_shown(letter.offset)}"
    reason = " ".join(_reason(letter).split())
    reason = reason if len(reason) <= REASON_WIDTH else f"{reason[:REASON_WIDTH]}…"
    return f"{_time(letter.record.timestamp_ms)}  {request_id:<22}  {at:<8}  {reason}"


def _summary(where: Place, letter: Letter) -> dict[str, Any]:
    return {
        "id": str(where),
        "chainlet": where.box.name,
        "at": _time(letter.record.timestamp_ms),
        "error": letter.error,
        "message": letter.message,
        "request_id": _request_id(letter),
        "topic": letter.topic,
        "partition": letter.partition,
        "offset": letter.offset,
        "group": letter.group,
        "deliveries": letter.deliveries,
    }


# --- show


def show(where: Place, settings: Settings) -> None:
    async def work(broker: Broker) -> None:
        for line in _described(where, await _one(broker, where)):
            click.echo(printable(line))

    _run(work, settings)


def _described(where: Place, letter: Letter) -> Iterator[str]:
    yield f"{where}, put aside at {_time(letter.record.timestamp_ms)}"
    yield f"  error       {_reason(letter)}"
    if letter.deliveries is not None:
        yield f"  deliveries  {letter.deliveries}"
    yield f"  topic       {_shown(letter.topic)}"
    yield f"  lay at      partition {_shown(letter.partition)}, offset {_shown(letter.offset)}"
    if letter.timestamp_ms is not None and letter.timestamp_ms >= 0:  # Kafka has -1 for none
        yield f"  sent at     {_time(letter.timestamp_ms)}"
    yield f"  group       {_shown(letter.group)}"
    if letter.record.key is not None:
        yield f"  key         {_readable(letter.record.key)}"
    yield "headers"
    width = max((len(name) for name, _ in letter.headers), default=0)
    for name, value in letter.headers:
        yield f"  {name:<{width}}  {_header(name, value)}"
    yield "arguments"
    yield from (f"  {line}" for line in _arguments(where.box, letter))
    if letter.stack_trace is not None:
        yield "stack trace"
        yield from (f"  {line}" for line in letter.stack_trace.splitlines())


def _header(name: str, value: bytes | None) -> str:
    if value is None:
        return "null"
    number = int.from_bytes(value, "big")
    match name, len(value):
        case (str(), 8) if name == DEADLINE:
            return _time(number)
        case (str(), 8) if name == REPLY_OFFSET:
            return str(number)
        case (str(), 4) if name in (REPLY_PARTITION, ATTEMPT):
            return str(number)
        case (str(), 8) if name == WINDOW:
            return f"{number >> 32} chunks, {number & 0xFFFF_FFFF} bytes"
        case _:
            return value.hex() if name == CORRELATION_ID else _readable(value)


def _arguments(box: Box, letter: Letter) -> Iterator[str]:
    value = letter.record.value
    if letter.left_out is not None:
        yield f"{letter.left_out} bytes, which did not fit into the letter"
        return
    if (reference := dict(letter.headers).get(DATAREF)) is not None:
        yield f"in the store, as they are too large for a record: {_readable(reference)}"
        return
    try:
        if letter.request is not None and letter.request.content_type == JSON:
            value = box.codec.arguments_from_json(value)
        yield box.codec.arguments_to_json(value).decode()
    except ChainsError as error:
        yield f"can't be read: {error}"
        more = len(letter.record.value) - SHOWN_BYTES
        shown = repr(letter.record.value[:SHOWN_BYTES])[2:-1]
        yield shown + (f"… and {more} bytes more" if more > 0 else "")


# --- replay


def replay(places: Sequence[Place], settings: Settings) -> None:
    """Send letters again, or none of them if one does not exist."""

    async def work(broker: Broker) -> None:
        for where in places:
            await _find(broker, where)
        await _replay(broker, settings, _named(broker, dict.fromkeys(places)))

    _run(work, settings)


def replay_all(chosen: Sequence[Box], settings: Settings) -> None:
    async def work(broker: Broker) -> None:
        await _replay(broker, settings, _each(broker, await _held(broker, chosen)))

    _run(work, settings)


async def _replay(broker: Broker, settings: Settings, letters: AsyncGenerator[tuple[Place, Letter], None]) -> None:
    sent = failed = 0
    async with AsyncExitStack() as stack:
        store = Store(settings)
        stack.push_async_callback(store.close)
        await store.start()
        await stack.enter_async_context(aclosing(letters))
        async for where, letter in letters:
            try:
                if not letter.record.value and (reference := reference_in(letter.headers)) is not None:
                    await store.require(reference)
                async with patience(broker):
                    partition, offset = await send_again(broker, letter)
            except ChainsRuntimeError as error:
                say(f"{where} was not sent again: {error}")
                failed += 1
            else:
                click.echo(f"{where} was sent again: partition {partition}, offset {offset}")
                sent += 1
    if sent:
        say("The letters stay until `chains dlq purge` deletes them.")
    if failed:
        raise ChainsRuntimeError(f"{failed} of {sent + failed} letters were not sent again")


# --- purge


Doomed = Mapping[Box, range]


def refuse_to_delete(where: Place) -> None:
    """Say what to do instead. Raises ChainsUsageError."""
    behind = where._replace(offset=where.offset + 1)
    reason = "Kafka deletes a log from its front only"
    raise ChainsUsageError(f"{where} can't be deleted alone, as {reason}: `--before {behind}` deletes it and all older")


def everything(chosen: Sequence[Box], settings: Settings) -> Doomed:
    """Find all letters. Those that come after this are none of them."""
    found: dict[Box, range] = {}

    async def work(broker: Broker) -> None:
        found.update(await _held(broker, chosen))

    _run(work, settings)
    return {box: offsets for box, offsets in found.items() if offsets}


def before(where: Place, settings: Settings) -> Doomed:
    """Find those that are older. Raises ChainsUsageError if `where` lies behind the newest."""
    found: dict[Box, range] = {}

    async def work(broker: Broker) -> None:
        async with patience(broker):
            offsets = await held(broker, where.box.topic) or range(0)
        if where.offset > offsets.stop:
            raise ChainsUsageError(_no_such(where, offsets))
        if where.offset <= offsets.start:
            say(f"There are no letters before {where}.")
        else:
            found[where.box] = range(offsets.start, where.offset)

    _run(work, settings)
    return found


def counted(doomed: Doomed) -> str:
    return ", ".join(f"{_letters(len(offsets))} of {box.name}" for box, offsets in doomed.items())


def delete(doomed: Doomed, settings: Settings) -> None:
    async def work(broker: Broker) -> None:
        for box, offsets in doomed.items():
            async with patience(broker):
                await broker.delete_before(dead_letter_topic(box.topic), {PARTITION: offsets.stop})
            click.echo(f"Deleted {counted({box: offsets})}.")

    _run(work, settings)


# --- common to all


def _run(work: Callable[[Broker], Coroutine[Any, Any, None]], settings: Settings) -> None:
    async def connect_and_work() -> None:
        async with connected(settings) as broker:
            await work(broker)

    async def main(signals: Signals) -> None:
        await until_stopped(connect_and_work(), signals)

    run(main)


async def _held(broker: Broker, chosen: Sequence[Box]) -> dict[Box, range]:
    """Give the offsets of the letters of each Chainlet, and tell a person of those without any."""
    found = {}
    for box in chosen:
        async with patience(broker):
            offsets = await held(broker, box.topic)
        if offsets is None:
            topic = dead_letter_topic(box.topic)
            say(f"{box.name}: no dead letters, as no worker has served it yet; there is no topic {topic}")
        elif not offsets:
            say(f"{box.name}: no dead letters")
        found[box] = offsets or range(0)
    return found


async def _each(broker: Broker, chosen: Mapping[Box, range]) -> AsyncGenerator[tuple[Place, Letter], None]:
    for box, offsets in chosen.items():
        async with aclosing(_read(broker, box, offsets)) as letters:
            async for letter in letters:
                yield Place(box, letter.record.offset), letter


async def _named(broker: Broker, places: Iterable[Place]) -> AsyncGenerator[tuple[Place, Letter], None]:
    for where in places:
        yield where, await _one(broker, where)


async def _one(broker: Broker, where: Place) -> Letter:
    """Read one letter. Raises ChainsUsageError if there is none."""
    offsets = await _find(broker, where)
    async with aclosing(_read(broker, where.box, range(where.offset, where.offset + 1))) as letters:
        async for letter in letters:
            return letter
    raise ChainsUsageError(_no_such(where, offsets))


async def _find(broker: Broker, where: Place) -> range:
    """Give the offsets of all letters there. Raises ChainsUsageError if `where` is none of them."""
    async with patience(broker):
        offsets = await held(broker, where.box.topic) or range(0)
    if where.offset not in offsets:
        raise ChainsUsageError(_no_such(where, offsets))
    return offsets


async def _read(broker: Broker, box: Box, offsets: range) -> AsyncGenerator[Letter, None]:
    async with aclosing(read_letters(broker, box.topic, offsets)) as letters:
        while True:
            try:
                async with patience(broker):
                    letter = await anext(letters)
            except StopAsyncIteration:
                return
            yield letter


def _no_such(where: Place, offsets: range) -> str:
    name = where.box.name
    there = f"there are {name}/{offsets[0]} to {name}/{offsets[-1]}" if offsets else f"{name} has none"
    return f"there is no letter {where}; {there}"


def _reason(letter: Letter) -> str:
    name = letter.error and letter.error.rpartition(".")[2]
    return ": ".join(part for part in (name, letter.message) if part) or "unknown"


def _request_id(letter: Letter) -> str | None:
    return letter.request.request_id or None if letter.request is not None else None


def _letters(count: int) -> str:
    return f"{count} letter{'' if count == 1 else 's'}"


def _shown(value: object) -> str:
    return "?" if value is None else str(value)


def _time(ms: int) -> str:
    try:
        return f"{datetime.fromtimestamp(ms / 1000, UTC):%Y-%m-%dT%H:%M:%SZ}"
    except (OverflowError, ValueError, OSError):  # a stranger's
        return f"{ms} ms"


def _readable(value: bytes) -> str:
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return value.hex()
    return text if text.isprintable() else value.hex()
