"""Feeding a Chainlet from a topic that the command line names, in the place of its class."""

from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import msgspec

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
    """Declare source and sinks on the one Chainlet that is named, or else the entrypoint. Raises ChainsUsageError.

    What is not said stays as its class declares it.
    """
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
    given: dict[str, Any] = {"topic": said.source}
    given |= {name: value for name, value in (("format", said.style), ("delivery", said.delivery)) if value is not None}
    declared = getattr(cls, "source", None)
    cls.source = msgspec.structs.replace(declared, **given) if isinstance(declared, Source) else Source(**given)
    if said.sinks:
        cls.sink = tuple(Sink(topic, format=style) for topic in said.sinks)
    feed_of(cls)  # which says what is wrong
