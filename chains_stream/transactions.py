"""Outputs and offsets of a topic's partitions, stored together: what `exactly_once` is made of.

Each partition has a transactor of its own, which is started before it is read where to go on, so that nothing of an
earlier holder can come in between (Kafka's KIP-98, and KIP-447 for what could be had with fewer of them).
"""

import asyncio
from collections.abc import Collection, Mapping
from typing import NamedTuple

from chains_stream.broker import Broker, Committed, Transactor
from chains_stream.errors import BrokerError
from chains_stream.log import get_logger
from chains_stream.messages import Headers
from chains_stream.offsets import Note

log = get_logger(__name__)


class Unsent(NamedTuple):
    """A record that is to be written."""

    topic: str
    partition: int
    key: bytes | None
    value: bytes
    headers: Headers


class Transactions:
    """The transactors of the partitions of one topic, and what was given for events of them and is not stored yet."""

    def __init__(self, broker: Broker, topic: str, group: str) -> None:
        self._broker = broker
        self._topic = topic
        self._group = group
        self._transactors: dict[int, Transactor] = {}
        self._unsent: dict[int, list[Unsent]] = {}

    def add(self, partition: int, records: Collection[Unsent]) -> None:
        """Have the next commit of a partition write these too: those of an event that is finished by then."""
        self._unsent.setdefault(partition, []).extend(records)

    async def take_over(self, partitions: Collection[int]) -> None:
        for number in partitions:
            self._unsent.pop(number, None)
            await self._start(number)

    async def commit(self, positions: Mapping[int, Committed]) -> frozenset[int]:
        """Write what is finished of partitions, and how far they are done. Raises BrokerError if one of them failed."""
        numbers = [number for number in positions if number in self._transactors]
        results = await asyncio.gather(*(self._commit(n, positions[n]) for n in numbers), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return frozenset(number for number, stored in zip(numbers, results, strict=True) if stored)

    async def lose(self, partitions: Collection[int]) -> None:
        for number in partitions:
            self._unsent.pop(number, None)
            transactor = self._transactors.pop(number, None)
            if transactor is not None:
                await transactor.close()

    async def _start(self, number: int) -> None:
        old = self._transactors.pop(number, None)
        if old is not None:
            await old.close()
        transactor = self._broker.transactor(f"{self._group}.{self._topic}.{number}")
        try:
            await transactor.start()
        except BaseException:
            await transactor.close()
            raise
        self._transactors[number] = transactor

    async def _commit(self, number: int, committed: Committed) -> bool:
        transactor, records = self._transactors[number], self._unsent.pop(number, [])
        try:
            transactor.begin()
            for record in records:
                await transactor.publish(
                    record.topic, record.value, partition=record.partition, key=record.key, headers=record.headers
                )
            transactor.add_offsets(self._topic, self._group, {number: committed})
            await transactor.commit()
        except BaseException as error:
            self._unsent[number] = records + self._unsent.get(number, [])
            if not isinstance(error, BrokerError):
                raise
            log.warning("transaction.failed", topic=self._topic, partition=number, reason=str(error))
            return await self._recovered(number, committed, len(records), error)
        return True

    async def _recovered(self, number: int, committed: Committed, count: int, error: BrokerError) -> bool:
        """Find out what became of a transaction that failed. Raises its error if it is to be tried again."""
        if self._transactors.get(number) is None:
            raise error
        await self._start(number)
        found = await self._broker.committed(self._topic, self._group, [number])
        at = found.get(number, Committed(0))
        if at == committed:
            del self._unsent[number][:count]
            return True
        if Note.read(at.metadata).epoch > Note.read(committed.metadata).epoch:
            return False  # another worker has it, and will be told by the group
        raise error
