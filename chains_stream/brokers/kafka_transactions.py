"""Transactions on Kafka: a producer of aiokafka for each transactional id.

Facts about aiokafka that this rests on: it commits a transaction of which records could not be stored, so their batches
are awaited and looked at first. It forgets, after an error that it calls abortable, that the coordinator knows of the
transaction, and would not abort it there; and a record that was given up leaves a gap in the numbers of its partition.
So a transactor is spent by any error. That offsets are stored with the transaction takes no part of the group's
protocol: what fences a member that lost its partitions is that another one has started a transactor of the same id.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka import errors as kafka
from aiokafka.client import CoordinationType
from aiokafka.producer.sender import AddOffsetsToTxnHandler, AddPartitionsToTxnHandler
from aiokafka.producer.transaction_manager import TransactionState
from aiokafka.structs import OffsetAndMetadata

from chains_stream.broker import Committed
from chains_stream.brokers.kafka_cluster import Cluster, check_size, said, to_the_end
from chains_stream.brokers.kafka_sending import drained, heard_of, last_batch, sends_itself
from chains_stream.brokers.kafka_stop import stop
from chains_stream.errors import BrokerError, ChainsUsageError, FencedError
from chains_stream.log import get_logger
from chains_stream.messages import Headers

BUSY_SECONDS = 0.001  # the coordinator still writes the markers of the last transaction; aiokafka waits 20 times that
CLOSE_SECONDS = 2.0  # for aborting what is open when a transactor is closed

log = get_logger(__name__)

_FENCED = (kafka.ProducerFenced, kafka.InvalidProducerEpoch)


class _AddPartitions(AddPartitionsToTxnHandler):  # type: ignore[misc] # aiokafka has no types
    def handle_response(self, response: Any) -> float | None:
        wait: float | None = super().handle_response(response)
        codes = {code for _, partitions in response.errors for _, code in partitions}
        return BUSY_SECONDS if codes == {kafka.ConcurrentTransactions.errno} else wait


class _AddOffsets(AddOffsetsToTxnHandler):  # type: ignore[misc] # as above
    def handle_response(self, response: Any) -> float | None:
        wait: float | None = super().handle_response(response)
        return BUSY_SECONDS if response.error_code == kafka.ConcurrentTransactions.errno else wait


class KafkaTransactor:
    """A holder of a transactional id."""

    def __init__(
        self,
        cluster: Cluster,
        make: Callable[[], AIOKafkaProducer],
        transactional_id: str,
        *,
        timeout_ms: int,
        max_record_bytes: int,
        registry: set["KafkaTransactor"],
    ) -> None:
        self._cluster = cluster
        self._make = make
        self._id = transactional_id
        self._timeout = timeout_ms / 1000
        # A transaction that is not committed by then was aborted by its coordinator, or will be.
        self._patience = self._timeout + cluster.patience
        self._max_record_bytes = max_record_bytes
        self._registry = registry
        self._producer: AIOKafkaProducer | None = None
        self._open = False
        self._group: str | None = None
        self._positions: dict[TopicPartition, OffsetAndMetadata] = {}
        self._error: BrokerError | None = None  # why it is of no more use

    async def start(self) -> None:
        self._check()
        if self._producer is not None:
            raise ChainsUsageError(f"the transactor {self._id} was started already")
        producer = None
        try:
            async with asyncio.timeout(self._cluster.patience):
                await self._cluster.find_a_server()
                producer = _prepared(self._make())
                await producer.start()
        except BaseException as error:
            if producer is not None:
                await to_the_end(stop(producer))
            if isinstance(error, TimeoutError):
                reason = f"did not let {self._id} start a transaction within {self._cluster.patience:g} s"
                raise BrokerError(f"{self._cluster.url} {reason}") from None
            if isinstance(error, kafka.InvalidTransactionTimeout):
                reason = (
                    f"allows no transactions with a timeout of {self._timeout:g} s (its transaction.max.timeout.ms)"
                )
                raise ChainsUsageError(f"{self._cluster.url} {reason}") from None
            if isinstance(error, kafka.KafkaError | OSError):
                raise self._translated(error, "start transactions of") from error
            raise
        if self._error is not None:  # closed meanwhile
            await to_the_end(stop(producer))
            raise self._error
        self._producer = producer

    def begin(self) -> None:
        manager = self._manager(open_=False)
        manager.begin_transaction()
        self._open = True

    def put(
        self, topic: str, value: bytes, *, partition: int, key: bytes | None = None, headers: Headers = ()
    ) -> asyncio.Future[int] | None:
        self._manager(open_=True)
        assert self._producer is not None, "it has a manager"
        waiting = self._producer._message_accumulator._batches.get((topic, partition))  # noqa: SLF001 - as in `kafka_sending`
        if not waiting or len(value) > self._max_record_bytes:
            return None
        return waiting[-1].put(key, value, headers)  # type: ignore[no-any-return] # as above

    async def publish(
        self, topic: str, value: bytes, *, partition: int, key: bytes | None = None, headers: Headers = ()
    ) -> asyncio.Future[int]:
        check_size(topic, value, self._max_record_bytes)
        stored = self.put(topic, value, partition=partition, key=key, headers=headers)
        if stored is not None:
            return stored
        manager = self._manager(open_=True)
        producer, transaction = self._producer, manager.wait_for_transaction_end()
        assert producer is not None, "it has a manager"
        if not 0 <= partition < self._cluster.counts.get(topic, 0):
            await self._cluster.require(topic, partition)
        place = TopicPartition(topic, partition)
        try:
            while True:
                await heard_of(producer, place)
                self._same(transaction)
                batch = last_batch(producer, place, (key, value, headers), self._failed, self._cluster.limits)
                stored = batch.put(key, value, headers)
                if stored is not None:
                    return stored
                await drained(producer, batch)
                self._same(transaction)
        except kafka.KafkaError as error:
            self._check()
            raise self._translated(error, "write", topic) from error

    def add_offsets(self, topic: str, group: str, positions: Mapping[int, Committed]) -> None:
        self._manager(open_=True)
        if group != (self._group or group):
            raise ChainsUsageError(f"a transaction of {self._id} has offsets of {self._group}, not of {group}")
        self._group = group
        for number, committed in positions.items():
            self._positions[TopicPartition(topic, number)] = OffsetAndMetadata(*committed)

    async def commit(self) -> None:
        manager = self._manager(open_=True)
        for place in self._positions:
            await self._cluster.require(*place)
        self._open = False
        async with self._ending("commit"):
            if self._positions:
                manager.add_offsets_to_txn(self._positions, self._group).add_done_callback(_retrieved)
            assert self._producer is not None, "it has a manager"
            await self._producer._message_accumulator.flush()  # noqa: SLF001 - as above
            self._check()
            manager.committing_transaction()
            await asyncio.shield(manager.wait_for_transaction_end())

    async def abort(self) -> None:
        manager = self._manager(open_=True)
        self._open = False
        async with self._ending("abort"):
            manager.aborting_transaction()
            await asyncio.shield(manager.wait_for_transaction_end())

    async def close(self) -> None:
        await to_the_end(self._close())

    async def _close(self) -> None:
        producer, self._producer = self._producer, None
        self._error = self._error or BrokerError(f"the transactor {self._id} was closed")
        self._registry.discard(self)
        if producer is None:
            return
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await _abort_what_is_open(producer)
        except (TimeoutError, kafka.KafkaError) as error:
            log.info("transaction.left_open", transactional_id=self._id, reason=said(error))
        finally:
            unsent = kafka.KafkaConnectionError("closed before the record was stored")
            producer._message_accumulator.fail_all(unsent)  # noqa: SLF001 - its `stop` would wait for a broker that is gone
            await stop(producer)
            ending = producer._txn_manager.wait_for_transaction_end()  # noqa: SLF001 - as above
            if ending is not None and not ending.done():  # somebody waits in `commit`
                producer._txn_manager.fatal_error(unsent)  # noqa: SLF001 - as above

    # --- what it is in

    def _manager(self, *, open_: bool) -> Any:
        """Give aiokafka's state of transactions, if one is open, or not, as the caller needs. Raises what is wrong."""
        self._check()
        if self._producer is None:
            raise ChainsUsageError(f"the transactor {self._id} was not started")
        ended = self._producer._sender.sender_task  # noqa: SLF001 - it tells nobody that it has ended
        if ended.done():
            error = None if ended.cancelled() else ended.exception()
            raise self._spend(error or kafka.ProducerClosed())
        if self._open is not open_:
            wrong = "none was begun" if open_ else "one is open: commit it, or abort it"
            raise ChainsUsageError(f"transactions of {self._id}: {wrong}")
        return self._producer._txn_manager  # noqa: SLF001 - as above

    def _same(self, transaction: object) -> None:
        """Raise if a transaction ended while somebody waited."""
        manager = self._manager(open_=True)
        if manager.wait_for_transaction_end() is not transaction:
            raise BrokerError(f"the transaction of {self._id} ended before a record had its place")

    @asynccontextmanager
    async def _ending(self, doing: str) -> AsyncIterator[None]:
        """End a transaction: whatever comes in between leaves open what became of it."""
        try:
            async with asyncio.timeout(self._patience):
                yield
        except TimeoutError:
            reason = f"did not {doing} a transaction of {self._id} within {self._patience:g} s"
            raise self._spend(BrokerError(f"{self._cluster.url} {reason}")) from None
        except kafka.KafkaError as error:
            raise self._spend(error) from error
        except BaseException as error:
            self._spend(BrokerError(f"to {doing} a transaction of {self._id} was given up: {error!r}"))
            raise
        finally:
            self._group, self._positions = None, {}

    # --- what is wrong

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _failed(self, topic: str, error: BaseException) -> BrokerError:
        """Take note that a record was not stored."""
        if self._error is None:
            self._spend(error, "write", topic)
        assert self._error is not None, "spent"
        return self._error

    def _spend(self, error: BaseException, doing: str = "end a transaction of", what: str = "") -> BrokerError:
        """Be of no more use, for the first reason that there is, and give that."""
        if self._error is None:
            self._error = self._translated(error, doing, what)
            log.info("transactor.spent", transactional_id=self._id, reason=str(self._error))
        return self._error

    def _translated(self, error: BaseException, doing: str, what: str = "") -> BrokerError:
        if isinstance(error, _FENCED):
            reason = "another holder was started, or a transaction was open for too long"
            return FencedError(f"{self._cluster.url} fenced this holder of {self._id}: {reason}")
        if isinstance(error, kafka.GroupAuthorizationFailedError):
            return self._cluster.translated(error, "commit for", right="READ", what=self._group or "the group")
        if isinstance(error, kafka.TransactionalIdAuthorizationFailed):
            what = f"the transactional id {self._id}"
        elif isinstance(error, kafka.TopicAuthorizationFailedError):
            doing, what = "write to", what or ", ".join(map(str, *error.args))
        return self._cluster.translated(error, doing, right="WRITE", what=what or self._id)


def _prepared(producer: AIOKafkaProducer) -> AIOKafkaProducer:
    """Have a producer ask its coordinator again sooner, and of partitions and the group together."""
    sender = sends_itself(producer)._sender  # noqa: SLF001 - as above
    ask_next = sender._maybe_do_transactional_request  # noqa: SLF001 - as above

    async def ask(*handlers: Any) -> None:
        manager = sender._txn_manager  # noqa: SLF001 - as above
        node = await sender._find_coordinator(CoordinationType.TRANSACTION, manager.transactional_id)  # noqa: SLF001 - as above
        await asyncio.gather(*[handler.do(node) for handler in handlers])

    def ask_together() -> asyncio.Task[None] | None:
        manager = sender._txn_manager  # noqa: SLF001 - as above
        places, group = manager.partitions_to_add(), manager.consumer_group_to_add()
        handlers = [_AddPartitions(sender, places)] if places else []
        if group is not None:
            handlers.append(_AddOffsets(sender, group))
        if handlers:
            return asyncio.create_task(ask(*handlers), name="add to transaction")
        return ask_next()  # type: ignore[no-any-return] # as above

    def fail(error: BaseException) -> None:
        fatal_error(error)
        sender._txn_manager.wait_for_transaction_end().add_done_callback(_retrieved)  # noqa: SLF001 - as above

    fatal_error, sender._txn_manager.fatal_error = sender._txn_manager.fatal_error, fail  # noqa: SLF001 - as above
    sender._maybe_do_transactional_request = ask_together  # noqa: SLF001 - as above
    return producer


async def _abort_what_is_open(producer: AIOKafkaProducer) -> None:
    """Let readers go on that wait for the transaction, if there is one. Raises KafkaError."""
    manager = producer._txn_manager  # noqa: SLF001 - as above
    if producer._sender.sender_task.done():  # noqa: SLF001 - as above
        return
    if manager.state is TransactionState.ABORTABLE_ERROR:
        manager._txn_consumer_group = ""  # noqa: SLF001 - it takes the transaction for empty, and its coordinator does not
    elif manager.state is not TransactionState.IN_TRANSACTION:
        return
    manager.aborting_transaction()
    await asyncio.shield(manager.wait_for_transaction_end())


def _retrieved(future: asyncio.Future[None]) -> None:
    """Nobody may await it: asyncio should not complain that nobody did."""
    if not future.cancelled():
        future.exception()
