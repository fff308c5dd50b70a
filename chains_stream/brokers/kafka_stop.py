"""Ending a client of aiokafka for good, whatever state it is in.

Its own `stop` waits for a group to let it in, or for a server that is gone, and if that wait is given up it leaves its
inner tasks behind: they connect anew, and keep an event loop from closing. Those are ended here; and whoever is on its
way into a group leaves it, else the others in there would wait for it until its session is over.
"""

import asyncio
from collections.abc import Iterator
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka import errors as kafka
from aiokafka.client import ConnectionGroup
from aiokafka.protocol.group import LeaveGroupRequest

from chains_stream.brokers.kafka_cluster import said
from chains_stream.log import get_logger

STOP_SECONDS = 5.0  # for a client to end by itself
LEAVE_SECONDS = 1.0  # for a group to take note that somebody gave up joining it

log = get_logger(__name__)


async def stop(client: AIOKafkaConsumer | AIOKafkaProducer) -> None:
    """Stop a consumer or producer, its tasks and its connections.

    In a task of its own: where one of its inner tasks is cancelled, its `stop` ends as if it had been cancelled itself.
    """
    stopping = asyncio.create_task(client.stop())
    try:
        await asyncio.wait([stopping], timeout=0 if _joining(client) else STOP_SECONDS)
    finally:
        stopping.cancel()
        await asyncio.wait([stopping])
        error = None if stopping.cancelled() else stopping.exception()
        if stopping.cancelled() or error is not None:
            joining = _joining(client)
            reason = "it was joining a group" if joining else said(error) if error else "cancelled"
            log.info("broker.stopped_hard", client=type(client).__name__, reason=reason)
            await _end(client)
            if joining:
                await _leave(client)


def _joining(client: Any) -> bool:
    """Tell whether it has handed back what it held of a group, and waits for what it gets next."""
    return getattr(getattr(client, "_coordinator", None), "_performed_join_prepare", False)


async def _end(client: Any) -> None:
    """Do what its `stop` left undone."""
    inner = [task for task in _inner(client) if task is not None]
    for task in inner:
        task.cancel()
    await _connections(client).close()  # before: what was being sent ends with its connection
    if inner:
        ended, _ = await asyncio.wait(inner, timeout=STOP_SECONDS)
        for task in ended:
            if not task.cancelled():
                task.exception()  # it matters to nobody any more
        await _connections(client).close()  # what one of them opened meanwhile


def _inner(client: Any) -> Iterator["asyncio.Task[Any] | None"]:
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


def _connections(client: Any) -> Any:
    return client.client if isinstance(client, AIOKafkaProducer) else client._client  # noqa: SLF001 - it has no other way


async def _leave(client: Any) -> None:
    """Tell the group, over a connection of its own, as Kafka answers one request of a connection after the other."""
    coordinator, connections = client._coordinator, _connections(client)  # noqa: SLF001 - as above
    if not coordinator.member_id or coordinator._group_instance_id is not None:  # noqa: SLF001 - as above
        return
    request = LeaveGroupRequest(coordinator.group_id, coordinator.member_id)
    try:
        async with asyncio.timeout(LEAVE_SECONDS):
            await connections.send(coordinator.coordinator_id, request, group=ConnectionGroup.COORDINATION)
    except (kafka.KafkaError, TimeoutError) as error:
        log.info("broker.not_left", group=coordinator.group_id, reason=said(error))
    finally:
        await connections.close()
