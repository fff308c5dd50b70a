"""Static membership (KIP-345), beyond what aiokafka does for it.

aiokafka joins a group with its instance id, and heartbeats and commits without. A member whose place another process
took with the same id would so be told that the group does not know it, join anew, and take the place back, for ever.
With the id in these requests, Kafka says that it was fenced.
"""

from collections.abc import Callable
from typing import Any

from aiokafka import AIOKafkaConsumer
from aiokafka import errors as kafka
from aiokafka.protocol.api import Request, RequestStruct
from aiokafka.protocol.commit import OffsetCommitRequest, OffsetCommitResponse_v3
from aiokafka.protocol.group import HeartbeatRequest, HeartbeatResponse_v1
from aiokafka.protocol.types import Array, Int32, Int64, Schema, String

_FENCED = 82  # FENCED_INSTANCE_ID, which aiokafka has no class for


class FencedInstanceIdError(kafka.KafkaError):  # type: ignore[misc] # aiokafka has no types
    """Another process joined the group with the same instance id. Give each process an id of its own."""


class _HeartbeatResponse(HeartbeatResponse_v1):  # type: ignore[misc] # as above
    API_VERSION = 3


class _HeartbeatStruct(RequestStruct):  # type: ignore[misc] # as above
    API_KEY = 12
    API_VERSION = 3
    RESPONSE_TYPE = _HeartbeatResponse
    SCHEMA = Schema(
        ("group", String("utf-8")),
        ("generation_id", Int32),
        ("member_id", String("utf-8")),
        ("group_instance_id", String("utf-8")),
    )


class _OffsetCommitResponse(OffsetCommitResponse_v3):  # type: ignore[misc] # as above
    API_VERSION = 7


class _OffsetCommitStruct(RequestStruct):  # type: ignore[misc] # as above
    API_KEY = 8
    API_VERSION = 7
    RESPONSE_TYPE = _OffsetCommitResponse
    SCHEMA = Schema(
        ("group", String("utf-8")),
        ("generation_id", Int32),
        ("member_id", String("utf-8")),
        ("group_instance_id", String("utf-8")),
        (
            "topics",
            Array(
                ("topic", String("utf-8")),
                (
                    "partitions",
                    Array(
                        ("partition", Int32),
                        ("offset", Int64),
                        ("leader_epoch", Int32),
                        ("metadata", String("utf-8")),
                    ),
                ),
            ),
        ),
    )


class _Heartbeat(Request[_HeartbeatStruct]):  # type: ignore[misc] # as above
    API_KEY = 12

    def __init__(self, plain: HeartbeatRequest, instance_id: str) -> None:
        self._values = (plain._group, plain._generation_id, plain._member_id, instance_id)  # noqa: SLF001

    def build(self, request_struct_class: type[_HeartbeatStruct]) -> _HeartbeatStruct:
        return request_struct_class(*self._values)


class _OffsetCommit(Request[_OffsetCommitStruct]):  # type: ignore[misc] # as above
    API_KEY = 8

    def __init__(self, plain: OffsetCommitRequest, instance_id: str) -> None:
        topics = [
            (topic, [(partition, offset, -1, metadata) for partition, offset, metadata in partitions])
            for topic, partitions in plain._topics  # noqa: SLF001 - it has no other way
        ]
        member = (plain._consumer_group, plain._consumer_group_generation_id, plain._consumer_id)  # noqa: SLF001
        self._values = (*member, instance_id, topics)

    def build(self, request_struct_class: type[_OffsetCommitStruct]) -> _OffsetCommitStruct:
        return request_struct_class(*self._values)


def name_instance(client: AIOKafkaConsumer, instance_id: str, fenced: Callable[[], None]) -> None:
    """Have a consumer that was started name its instance in all that it asks of its group, and call `fenced`.

    Committing then raises FencedInstanceIdError.
    """
    coordinator = client._coordinator  # noqa: SLF001 - it has no other way
    send = coordinator._send_req  # noqa: SLF001 - as above

    async def send_named(request: Any) -> Any:
        commits = isinstance(request, OffsetCommitRequest)
        if commits:
            request = _OffsetCommit(request, instance_id)
        elif isinstance(request, HeartbeatRequest):
            request = _Heartbeat(request, instance_id)
        response = await send(request)
        if commits:
            codes = {code for _, partitions in response.topics for _, code in partitions}
        else:
            codes = {getattr(response, "error_code", 0)}
        if _FENCED in codes:
            fenced()
            if commits:
                raise FencedInstanceIdError
        return response

    coordinator._send_req = send_named  # noqa: SLF001 - as above
