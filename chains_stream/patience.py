"""Trying again for as long as the broker is away."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from chains_stream.broker import Record
from chains_stream.errors import BrokerError
from chains_stream.log import get_logger
from chains_stream.messages import now_ms
from chains_stream.policy import backoff

T = TypeVar("T")

log = get_logger(__name__)


def place_of(record: Record) -> dict[str, Any]:
    """Say where a record lies, for the log."""
    return {"topic": record.topic, "partition": record.partition, "offset": record.offset}


async def persist(action: Callable[[], Awaitable[T]], record: Record, until_ms: float | None = None) -> T:
    """Do something with the broker for a request, again while it is away, until a Unix time, if any.

    Raises BrokerError.
    """
    attempt = 1
    while True:
        try:
            return await action()
        except BrokerError as error:
            late = until_ms is not None and now_ms() > until_ms
            if late or not error.retryable:
                raise
            log.warning("broker.retry", **place_of(record), attempt=attempt, reason=str(error))
            await asyncio.sleep(backoff(attempt))
            attempt += 1
