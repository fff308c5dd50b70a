"""Transactions of the embedded broker: one holder of an id at a time, and records that count together or not at all."""

import asyncio
from collections.abc import Mapping
from typing import Protocol

from chains_stream.broker import Committed
from chains_stream.brokers.memory_log import Partition
from chains_stream.errors import BrokerError, ChainsUsageError, FencedError
from chains_stream.messages import Headers


class Logs(Protocol):
    """What a transaction writes to: the broker."""

    def room(self, topic: str, partition: int, size: int) -> Partition | None:
        """Give a partition that has room for a value of so many bytes; a record is to be appended at once."""

    async def place(self, topic: str, partition: int, size: int) -> Partition:
        """Wait until a partition has room for a value of so many bytes; a record is to be appended at once."""

    def store_offsets(self, topic: str, group: str, positions: Mapping[int, Committed]) -> None:
        """Store how far a group's work is done, whoever holds the partitions. Raises BrokerError."""


class _Transaction:
    """What was written since `begin`: the offsets by partition; and how far a group is, by topic."""

    def __init__(self) -> None:
        self.written: dict[Partition, list[int]] = {}
        self.group: str | None = None
        self.positions: dict[str, dict[int, Committed]] = {}
        self.timer: asyncio.TimerHandle | None = None


class MemoryTransactor:
    """A holder of a transactional id."""

    def __init__(
        self, logs: Logs, holders: dict[str, "MemoryTransactor"], transactional_id: str, timeout_ms: int
    ) -> None:
        self._logs = logs
        self._holders = holders
        self._id = transactional_id
        self._timeout = timeout_ms / 1000
        self._open: _Transaction | None = None
        self._refusal: BrokerError | None = None  # why it is of no more use

    async def start(self) -> None:
        self._check()
        holder = self._holders.get(self._id)
        if holder is not None:
            holder._fence(f"another holder of {self._id} was started")  # noqa: SLF001 - of its own class
        self._holders[self._id] = self

    def begin(self) -> None:
        self._check()
        if self._holders.get(self._id) is not self:
            raise ChainsUsageError(f"the transactor {self._id} was not started")
        if self._open is not None:
            raise ChainsUsageError(f"a transaction of {self._id} is open: commit it, or abort it")
        self._open = _Transaction()

    def put(
        self, topic: str, value: bytes, *, partition: int, key: bytes | None = None, headers: Headers = ()
    ) -> asyncio.Future[int] | None:
        transaction = self._current()
        log = self._logs.room(topic, partition, len(value))
        return None if log is None else self._append(transaction, log, (key, value, headers))

    async def publish(
        self, topic: str, value: bytes, *, partition: int, key: bytes | None = None, headers: Headers = ()
    ) -> asyncio.Future[int]:
        transaction = self._current()
        log = await self._logs.place(topic, partition, len(value))
        if transaction is not self._open:  # it ended while this one waited for room
            self._check()
            raise BrokerError(f"the transaction of {self._id} ended before a record for {topic} had its place")
        return self._append(transaction, log, (key, value, headers))

    def _append(
        self, transaction: _Transaction, log: Partition, record: tuple[bytes | None, bytes, Headers]
    ) -> asyncio.Future[int]:
        offset = log.append(*record, transaction)
        transaction.written.setdefault(log, []).append(offset)
        if transaction.timer is None:
            reason = f"a transaction of {self._id} was open for more than {self._timeout:g} s"
            transaction.timer = asyncio.get_running_loop().call_later(self._timeout, self._fence, reason)
        return stored_at(offset)

    def add_offsets(self, topic: str, group: str, positions: Mapping[int, Committed]) -> None:
        transaction = self._current()
        if group != (transaction.group or group):
            raise ChainsUsageError(f"a transaction of {self._id} has offsets of {transaction.group}, not of {group}")
        transaction.group = group
        transaction.positions.setdefault(topic, {}).update(positions)

    async def commit(self) -> None:
        transaction = self._current()
        try:
            for topic, positions in transaction.positions.items():
                assert transaction.group is not None, "set with the positions"
                self._logs.store_offsets(topic, transaction.group, positions)
        except BrokerError as error:
            self._end(aborted=True)
            self._refusal = BrokerError(f"the transactor {self._id} is spent: {error}")
            raise
        self._end(aborted=False)

    async def abort(self) -> None:
        self._current()
        self._end(aborted=True)

    async def close(self) -> None:
        if self._open is not None:
            self._end(aborted=True)
        if self._holders.get(self._id) is self:
            del self._holders[self._id]
        self._refusal = self._refusal or BrokerError(f"the transactor {self._id} was closed")

    def _current(self) -> _Transaction:
        self._check()
        if self._open is None:
            raise ChainsUsageError(f"no transaction of {self._id} was begun")
        return self._open

    def _check(self) -> None:
        if self._refusal is not None:
            raise self._refusal

    def _fence(self, reason: str) -> None:
        if self._open is not None:
            self._end(aborted=True)
        self._refusal = self._refusal or FencedError(f"memory:// fenced this holder: {reason}")

    def _end(self, *, aborted: bool) -> None:
        transaction, self._open = self._open, None
        assert transaction is not None, "open"
        if transaction.timer is not None:
            transaction.timer.cancel()
        for log, offsets in transaction.written.items():
            log.settle(transaction, offsets if aborted else ())


def stored_at(offset: int) -> asyncio.Future[int]:
    """Give a future that is done."""
    stored: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    stored.set_result(offset)
    return stored
