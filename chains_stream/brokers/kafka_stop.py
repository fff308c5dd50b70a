"""Ending a client of aiokafka for good, whatever state it is in.

Its own `stop` waits for a group to let it in, or for a server that is gone, and if that wait is given up it leaves its
inner tasks behind: they connect anew, and keep an event loop from closing. Those are ended here; and whoever had no
time to leave its group does so, else the others in there would wait for it until its session is over.
"""

import asyncio
import time
from collections.abc import Collection, Iterator
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka import errors as kafka
from aiokafka.client import ConnectionGroup, CoordinationType
from aiokafka.protocol.group import LeaveGroupRequest

from chains_stream.brokers.kafka_cluster import checked, said, to_the_end
from chains_stream.log import get_logger

STOP_SECONDS = 5.0  # for a client to end by itself
LEAVE_SECONDS = 2.0  # for a group to take note that somebody left it
_LOOK_SECONDS = 0.1  # between two looks at whether it only waits for its group
_CANCEL_SECONDS, _CANCELS = 1.0, 5  # aiokafka takes a cancellation for one of its own here and there

log = get_logger(__name__)


async def stop(client: AIOKafkaConsumer | AIOKafkaProducer) -> None:
    """Stop a consumer or producer, its tasks and its connections.

    In a task of its own: where one of its inner tasks is cancelled, its `stop` ends as if it had been cancelled itself.
    """
    stopping = asyncio.create_task(client.stop())
    try:
        end = time.monotonic() + STOP_SECONDS
        patience = 0.0
        while not stopping.done() and time.monotonic() < end:
            await asyncio.wait([stopping], timeout=patience)
            if _waits_for_its_group(client):
                break
            patience = _LOOK_SECONDS
    finally:
        await to_the_end(_end(client, stopping))


def _waits_for_its_group(client: Any) -> bool:
    """Tell whether it has handed back what it held, and has nothing to lose by leaving without an answer.

    A member with an instance id has: it stays, and the group counts on it. So has one that knows no id of its own yet,
    while the group knows it.
    """
    coordinator = getattr(client, "_coordinator", None)
    return getattr(coordinator, "_performed_join_prepare", False) and _leaves(coordinator)


def _leaves(coordinator: Any) -> bool:
    return bool(getattr(coordinator, "member_id", "")) and coordinator._group_instance_id is None  # noqa: SLF001 - it has no other way


async def _end(client: Any, stopping: asyncio.Task[None]) -> None:
    """Do what its `stop` did not get done."""
    waited = _waits_for_its_group(client)
    await _ended([stopping])
    error = None if stopping.cancelled() or not stopping.done() else stopping.exception()
    if stopping.done() and not stopping.cancelled() and error is None:
        return
    reason = "it was joining a group" if waited else said(error) if error else "it did not end by itself"
    log.info("broker.stopped_hard", client=type(client).__name__, reason=reason)
    connections = client.client if isinstance(client, AIOKafkaProducer) else client._client  # noqa: SLF001 - as above
    await _disconnected(connections)  # first: what is being sent ends with its connection
    await _ended([task for task in _inner(client, connections) if task is not None])
    await _disconnected(connections)  # what one of them opened meanwhile
    await _leave(getattr(client, "_coordinator", None), connections)


def _inner(client: Any, connections: Any) -> Iterator["asyncio.Task[Any] | None"]:
    # Not all of them are there at once, nor in each kind of client.
    parts = {
        "_coordinator": ("_coordination_task", "_heartbeat_task", "_commit_refresh_task", "_reset_committed_task"),
        "_fetcher": ("_fetch_task",),
        "_sender": ("_sender_task",),
    }
    for part, names in parts.items():
        for name in names:
            yield getattr(getattr(client, part, None), name, None)
    yield from getattr(getattr(client, "_fetcher", None), "_pending_tasks", ())
    yield connections._sync_task  # noqa: SLF001 - as above


async def _ended(tasks: Collection["asyncio.Task[Any]"]) -> None:
    """Cancel tasks until they are done; what they raise matters to nobody any more."""
    pending = {task for task in tasks if not task.done()}
    for _ in range(_CANCELS):
        if not pending:
            break
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=_CANCEL_SECONDS)
    if pending:
        log.warning("broker.task_left", tasks=[task.get_name() for task in pending], reason="it takes no cancellation")
    for task in tasks:
        if task.done() and not task.cancelled():
            task.exception()


async def _disconnected(connections: Any) -> None:
    """Close its connections without waiting for what they have not sent, which a silent server would never take."""
    open_ = list(connections._conns.values())  # noqa: SLF001 - as above
    connections._conns.clear()  # noqa: SLF001 - as above
    closing = []
    for connection in open_:
        writer = connection._writer  # noqa: SLF001 - as above
        closing.append(connection.close())
        if writer is not None:
            writer.transport.abort()
    if waiting := [closed for closed in closing if closed is not None and not closed.done()]:
        await asyncio.wait(waiting, timeout=_CANCEL_SECONDS)


async def _leave(coordinator: Any, connections: Any) -> None:
    """Tell its group, over a connection of its own, as Kafka answers one request of a connection after the other."""
    if not _leaves(coordinator):
        return
    group = coordinator.group_id
    try:
        async with asyncio.timeout(LEAVE_SECONDS):
            node = coordinator.coordinator_id
            if node is None:
                node = await connections.coordinator_lookup(CoordinationType.GROUP, group)
            request = LeaveGroupRequest(group, coordinator.member_id)
            response = await connections.send(node, request, group=ConnectionGroup.COORDINATION)
            checked(response.error_code, group)
    except (kafka.KafkaError, TimeoutError) as error:
        log.info("broker.not_left", group=group, reason=said(error))
    finally:
        await _disconnected(connections)
