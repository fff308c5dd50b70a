"""Chainlets that are fed from ordinary topics, and write to others: `Source`, `Sink`, `Event`, `Output`.

A Chainlet with a ``source`` is given the records of that topic, one after another for each key and many at once across
keys; what its ``run_remote`` returns or yields is written to its ``sink``. It may call others by `depends`, and serves
requests as well.
"""

from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import lru_cache
from types import UnionType
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import msgspec

from chains_stream.chainlet import ChainletBase, chainlet_name, signature
from chains_stream.errors import ChainsUsageError
from chains_stream.formats import Format, keying, named
from chains_stream.formats.keys import Key
from chains_stream.signature import MISSING

T = TypeVar("T")

Delivery = Literal["at_least_once", "exactly_once", "at_most_once"]

LONGEST = 249  # characters of a topic's name: Kafka's
LONGEST_SOURCE = LONGEST - len(".dlq")  # of one that has a dead-letter topic


class Event(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """A record, for a ``run_remote`` that asks for it: ``event: Event[Ticket]`` in the place of ``ticket: Ticket``.

    Attributes:
        value: what the record holds, as the type says; None for a record without a value, which a compacted topic has
            in the place of what was deleted, if the type is optional.
        key: as it is in the record; None if it has none.
        headers: the last one of each name; a header without a value counts as empty.
        timestamp_ms: Unix time.
        topic, partition, offset: where the record lies.
    """

    value: T
    key: bytes | None = None
    headers: dict[str, bytes] = {}
    timestamp_ms: int = 0
    topic: str = ""
    partition: int = 0
    offset: int = 0


class Output(msgspec.Struct, Generic[T], frozen=True):
    """A value to be written, with more than its sink would say of it by itself: ``-> Output[Scored]``.

    Attributes:
        value: of the type that is annotated.
        key: in the place of the sink's, or the event's.
        headers: of the record.
        topic: that of another sink of the Chainlet than the first one.
    """

    value: T
    key: bytes | None = None
    headers: dict[str, bytes] = {}
    topic: str | None = None


class Source(msgspec.Struct, frozen=True):
    """The topic that a Chainlet is fed from.

    Attributes:
        topic: of any name; it is created if it does not exist.
        format: of its values: see `formats`.
        key: a field of the value, or a function of it, that events are kept in order by, if not by the records' keys.
            Order holds within a partition; events without a key are in none.
        start: where a group that has read nothing yet begins.
        delivery: ``at_least_once``: what a crash interrupts is run again. ``at_most_once``: it is not.
            ``exactly_once``: it is run again, and readers of committed records meet what it gives once; its calls of
            other Chainlets are made at least once all the same.
        group: the consumer group; its own for each Chain and Chainlet if none is named.
        retries: attempts in all, the first included, after which an event that fails becomes a dead letter.
    """

    topic: str
    format: str | Format = "json"
    key: Key | None = None
    start: Literal["earliest", "latest"] | datetime = "earliest"
    delivery: Delivery = "at_least_once"
    group: str | None = None
    retries: int = 3

    def __post_init__(self) -> None:
        check_topic("Source", self.topic, LONGEST_SOURCE)
        kinds = get_args(Delivery)
        if self.delivery not in kinds:  # else a slip of the pen would promise less than is meant
            allowed = f"{', '.join(kinds[:-1])} or {kinds[-1]}"
            raise ChainsUsageError(f"Source({self.topic!r}, delivery={self.delivery!r}): use {allowed}")
        if self.start not in ("earliest", "latest") and not isinstance(self.start, datetime):
            raise ChainsUsageError(
                f"Source({self.topic!r}, start={self.start!r}): use 'earliest', 'latest' or a datetime"
            )
        if self.retries < 1:
            raise ChainsUsageError(f"Source({self.topic!r}, retries={self.retries}): there is at least one attempt")


class Sink(msgspec.Struct, frozen=True):
    """A topic that a Chainlet writes to.

    Attributes:
        topic: of any name; it is created if it does not exist.
        format: of its values.
        key: a field of the value, or a function of it, that a record is keyed by; the event's own if none is named.
    """

    topic: str
    format: str | Format = "json"
    key: Key | None = None

    def __post_init__(self) -> None:
        check_topic("Sink", self.topic, LONGEST)


class Feed(NamedTuple):
    """How a Chainlet is fed: from where, with what, and where what it gives goes.

    Attributes:
        argument: the name of the one argument of ``run_remote``.
        kind: the type of a record's value.
        whole: whether ``run_remote`` asks for the `Event` around it.
        batched: whether it takes a list of them.
        gives: the type of what is written.
    """

    source: Source
    sinks: tuple[Sink, ...]
    argument: str
    kind: Any
    whole: bool
    batched: bool
    gives: Any


def feed_of(cls: type[ChainletBase]) -> Feed | None:
    """Read how a Chainlet is fed; None if it is not. Raises ChainsUsageError, with what is wrong in a line."""
    source = getattr(cls, "source", None)
    if source is None:
        return None
    name = chainlet_name(cls)
    if not isinstance(source, Source):
        raise ChainsUsageError(f"{name}.source is a `{type(source).__name__}`; write `source = Source(…)`")
    sinks = _sinks(name, getattr(cls, "sink", ()))
    found = signature(cls)
    required = [parameter for parameter in found.parameters if parameter.default is MISSING]
    if found.websocket or len(required) != 1:
        raise ChainsUsageError(f"{name}.run_remote has a source, and so takes one argument: the value, or its `Event`")
    kind, given = required[0].annotation, found.result
    if cls.batch is not None:
        kind, given = (get_args(each)[0] for each in (kind, given))  # lists: it is checked
    gives = _without_wrapping(given)
    if gives not in (None, type(None)) and not sinks:
        raise ChainsUsageError(f"{name}.run_remote gives what goes nowhere: name a topic with `sink = Sink(…)`")
    whole = get_origin(kind) is Event or kind is Event
    inner = (get_args(kind) or (Any,))[0] if whole else kind
    fed: list[tuple[Source | Sink, Any]] = [(source, inner), *((sink, gives) for sink in sinks)]
    for declared, written in fed:
        try:
            named(declared.format)
            if declared.key is not None:
                keying(declared.key, written)
        except ChainsUsageError as error:
            raise ChainsUsageError(f"{name}, topic {declared.topic}: {error}") from None
    return Feed(source, sinks, required[0].name, inner, whole, cls.batch is not None, gives)


def group_of(source: Source, namespace: str, chain: str, chainlet: str) -> str:
    """Name the consumer group that a Chainlet is fed through."""
    return source.group or f"{namespace}.{chain}.{chainlet}.events"


def _sinks(name: str, given: Any) -> tuple[Sink, ...]:
    sinks = tuple(given) if isinstance(given, Sequence) else (given,)
    for sink in sinks:
        if not isinstance(sink, Sink):
            raise ChainsUsageError(f"{name}.sink holds a `{type(sink).__name__}`; write `sink = Sink(…)`, or several")
    if len({sink.topic for sink in sinks}) < len(sinks):
        raise ChainsUsageError(f"{name}.sink names a topic twice")
    return sinks


def _without_wrapping(kind: Any) -> Any:
    """Give the type of what is written: without None, and what is in an `Output`."""
    members = [member for member in _members(kind) if member is not type(None)]
    inner = [(get_args(m) or (Any,))[0] if get_origin(m) is Output or m is Output else m for m in members]
    if not inner:
        return None
    return Union[tuple(dict.fromkeys(inner))]  # noqa: UP007 - of as many as there are


def _members(kind: Any) -> Iterator[Any]:
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) in (Union, UnionType):
        for member in get_args(kind):
            yield from _members(member)
    else:
        yield kind


def takes_none(kind: Any) -> bool:
    """Tell whether None is a value of a type."""
    return any(member in (None, type(None)) for member in _members(kind))


def check_topic(what: str, topic: Any, longest: int = LONGEST) -> None:
    """Raise ChainsUsageError for what can't be the name of a topic."""
    legal = isinstance(topic, str) and 0 < len(topic) <= longest and topic not in (".", "..")
    if not legal or not all(character.isascii() and (character.isalnum() or character in "._-") for character in topic):
        allowed = f"1 to {longest} letters, digits, dots, underscores and hyphens"
        raise ChainsUsageError(f"{what}({topic!r}): a topic is named by {allowed}")


def partition_of(key: bytes, count: int) -> int:
    """Give the partition of a key, as Kafka's own clients do (murmur2), so that topics can be joined with theirs."""
    hashed = _known(key) if len(key) <= SHORT_KEY else _murmur2(key)
    return (hashed & 0x7FFFFFFF) % count


def _murmur2(data: bytes) -> int:
    """Hash as Kafka does: Austin Appleby's MurmurHash2, 32 bits, little-endian, with Kafka's seed."""
    mask, factor = 0xFFFFFFFF, 0x5BD1E995
    hashed = 0x9747B28C ^ len(data)
    whole = len(data) & ~3
    for at in range(0, whole, 4):
        word = int.from_bytes(data[at : at + 4], "little") * factor & mask
        word = (word ^ (word >> 24)) * factor & mask
        hashed = hashed * factor & mask ^ word
    if rest := data[whole:]:
        hashed = (hashed ^ int.from_bytes(rest, "little")) * factor & mask
    hashed = (hashed ^ (hashed >> 13)) * factor & mask
    return hashed ^ (hashed >> 15)


SHORT_KEY = 64  # bytes: of longer ones nothing is kept
_known = lru_cache(4096)(_murmur2)  # which costs as much as all else that is done to write a record
