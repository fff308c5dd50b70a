"""Feeding a Chainlet from a topic that the command line names, in the place of its class."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast, get_args

from chains_stream.chain import Chain
from chains_stream.errors import ChainsUsageError
from chains_stream.events import Delivery, Sink, Source, feed_of
from chains_stream.formats import named


class Declared(NamedTuple):
    """What the command line says of events."""

    source: str | None
    sinks: Sequence[str]
    style: str | None
    delivery: str | None


def declare(chain: Chain, names: Sequence[str], said: Declared) -> None:
    """Declare source and sinks on the one Chainlet that is named, or else the entrypoint. Raises ChainsUsageError."""
    if said.source is None:
        if said.sinks or said.style or said.delivery:
            raise ChainsUsageError("--sink, --format and --delivery are of events: name their topic with --source")
        return
    if len(names) > 1:
        raise ChainsUsageError(f"--source feeds one Chainlet, and these are named: {', '.join(names)}")
    kinds = get_args(Delivery)
    if said.delivery is not None and said.delivery not in kinds:
        raise ChainsUsageError(f"--delivery: should be {', '.join(kinds[:-1])} or {kinds[-1]} (got {said.delivery!r})")
    style = said.style or "json"
    named(style)
    cls: Any = chain.find(names[0]) if names else chain.entrypoint
    cls.source = Source(said.source, format=style, delivery=cast("Delivery", said.delivery or "at_least_once"))
    cls.sink = tuple(Sink(topic, format=style) for topic in said.sinks)
    feed_of(cls)  # which says what is wrong
