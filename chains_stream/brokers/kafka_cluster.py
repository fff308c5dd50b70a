"""A Kafka cluster as all its clients see it: where it is, how it lets us in, what it tells, and what its errors mean.

It is asked in Kafka's own protocol, again while brokers restart: aiokafka's admin client can't tell some of it, and
tells other things wrongly (an error of a whole group reads as "has stored nothing"; asking for a topic may create it).
"""

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from aiokafka import errors as kafka
from aiokafka.admin import NewTopic
from aiokafka.client import AIOKafkaClient, CoordinationType
from aiokafka.conn import create_conn
from aiokafka.helpers import create_ssl_context
from aiokafka.protocol.admin import (
    CreateTopicsRequest,
    DeleteRecordsRequest,
    DescribeConfigsRequest,
    DescribeGroupsRequest,
)
from aiokafka.protocol.commit import OffsetCommitRequest, OffsetFetchRequest
from aiokafka.protocol.metadata import MetadataRequest
from aiokafka.protocol.offset import OffsetRequest

from chains_stream.broker import Committed, Isolation
from chains_stream.brokers.kafka_static import FencedInstanceIdError
from chains_stream.errors import (
    BrokerAuthorizationError,
    BrokerError,
    ChainsUsageError,
    OffsetExpiredError,
    RecordTooLargeError,
    UnknownTopicError,
)
from chains_stream.log import get_logger
from chains_stream.settings import KafkaSettings

PAUSE = 0.1  # seconds before asking a broker again that is not ready
_TOPIC_RESOURCE, _RECORD_LIMIT = 2, "max.message.bytes"  # in Kafka's protocol
END, BEGIN = -1, -2  # instead of a time stamp, when offsets are asked for

T = TypeVar("T")

log = get_logger(__name__)

_UNAUTHORIZED = (
    kafka.TopicAuthorizationFailedError,
    kafka.GroupAuthorizationFailedError,
    kafka.ClusterAuthorizationFailedError,
    kafka.TransactionalIdAuthorizationFailed,
)
_REFUSED = (
    kafka.SaslAuthenticationFailed,
    kafka.AuthenticationFailedError,
    kafka.AuthenticationMethodNotSupported,
    kafka.UnsupportedSaslMechanismError,
    kafka.IllegalSaslStateError,
)
_OUT_OF_RANGE = (kafka.OffsetOutOfRangeError, kafka.NoOffsetForPartitionError)
_HAS_MEMBERS = (
    kafka.UnknownMemberIdError.errno,
    kafka.IllegalGenerationError.errno,
    kafka.RebalanceInProgressError.errno,
)

# What another connection, or more patience, won't mend.
FINAL = (
    *_UNAUTHORIZED,
    *_REFUSED,
    *_OUT_OF_RANGE,
    kafka.InvalidTopicError,
    kafka.InvalidGroupIdError,
    kafka.InvalidSessionTimeoutError,
    kafka.InconsistentGroupProtocolError,
    kafka.IncompatibleBrokerVersion,
    FencedInstanceIdError,
)


class Cluster:
    """The servers of a cluster; `connection` are the arguments that every client of aiokafka takes."""

    def __init__(self, servers: Sequence[str], settings: KafkaSettings) -> None:
        self.url = f"kafka://{','.join(servers)}"
        self.patience = settings.connect_timeout
        self.counts: dict[str, int] = {}  # of the partitions of topics that are known to exist
        self.limits: dict[str, int] = {}  # bytes of records that topics take at once, where that was asked
        self._servers = list(servers)
        self._user = settings.sasl_username
        self._security = security_arguments(settings)
        self.connection: dict[str, Any] = {"bootstrap_servers": self._servers, **self._security}
        self._reasons: dict[str, str] = {}  # why servers did not answer
        self._client: AIOKafkaClient | None = None

    async def start(self) -> None:
        """Connect, for as long as the caller lets us; `unreachable` then says why not."""
        await self.find_a_server()
        self._client = AIOKafkaClient(**self.connection)
        await self._client.bootstrap()

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()
            self._client = None

    async def find_a_server(self) -> None:
        """Wait until one server answers, and have the next client begin there.

        aiokafka would begin at any of them, and stay for 40 s at one that swallows what it is sent.
        """
        # One that swallows what we send must not use up the time of the others, and of what comes next.
        share = self.patience / (len(self._servers) + 1)
        while True:
            for server in tuple(self._servers):
                try:
                    async with asyncio.timeout(share):
                        await self._probe(server)
                except (OSError, EOFError, kafka.KafkaError) as error:
                    if server not in self._reasons:
                        log.info("broker.waiting", broker=server, reason=said(error))
                    self._reasons[server] = said(error)
                else:
                    self._servers.sort(key=lambda other: other != server)
                    self.connection["bootstrap_servers"] = [server]
                    self._reasons.clear()
                    return
            await asyncio.sleep(PAUSE)

    async def _probe(self, server: str) -> None:
        """Connect to a server and ask it something: aiokafka keeps the reasons of what fails to its log."""
        host, _, port = server.rpartition(":")
        try:
            connection = await create_conn(host.strip("[]"), int(port), **self._security)
            try:
                await connection.send(MetadataRequest([]))
            finally:
                connection.close()
        except (kafka.SaslAuthenticationFailed, kafka.AuthenticationFailedError) as error:
            reason = f"{self.url} refused the credentials of {self._user}: {said(error)}"
            raise BrokerAuthorizationError(reason) from None
        except (kafka.UnsupportedSaslMechanismError, ssl.SSLError) as error:
            raise BrokerError(f"{self.url} refused the connection: {said(error)}") from None
        except kafka.KafkaConnectionError as error:
            wants = "if it wants TLS or SASL, set CHAINS_KAFKA_SECURITY_PROTOCOL"
            raise kafka.KafkaConnectionError(f"it closed the connection; {wants}") from error

    def unreachable(self) -> BrokerError:
        """Say why the cluster could not be used in time."""
        within = f"within {self.patience:g} s"
        brokers = self._client.cluster.brokers() if self._client is not None else ()
        if brokers and not self._reasons:
            named = ", ".join(f"{broker.host}:{broker.port}" for broker in brokers)
            hint = f"the brokers that it names ({named}) do not: check its advertised.listeners"
            return BrokerError(f"{self.url} answers, and {hint} ({within})")
        why = "; ".join(f"{server}: {reason}" for server, reason in self._reasons.items()) or "no answer"
        return BrokerError(f"no Kafka broker answered at {self.url} {within} ({why})")

    def translated(self, error: BaseException, doing: str, *, right: str, what: str) -> BrokerError:
        """Say in one line what went wrong; `right` is the ACL that `doing` this to `what` needs."""
        if isinstance(error, BrokerError):
            return error
        kind: type[BrokerError] = BrokerError
        if isinstance(error, _UNAUTHORIZED):
            kind = BrokerAuthorizationError
            text = f"{self.url} does not let us {doing} {what}: the right {right} is missing"
        elif isinstance(error, _REFUSED):
            kind = BrokerAuthorizationError
            text = f"{self.url} refused the credentials: {said(error)}"
        elif isinstance(error, kafka.MessageSizeTooLargeError | kafka.RecordListTooLargeError):
            kind = RecordTooLargeError
            text = f"{self.url} takes no record of this size for {what}: {said(error)}"
        elif isinstance(error, _OUT_OF_RANGE):
            kind = OffsetExpiredError
            text = f"{self.url} no longer holds the offset asked for of {what}"
        elif isinstance(error, kafka.UnknownTopicOrPartitionError | kafka.InvalidTopicError):
            kind = UnknownTopicError
            text = f"{self.url}: there is no such topic or partition: {what}"
        else:
            text = f"{self.url} failed to {doing} {what}".rstrip() + f": {said(error)}"
        return kind(text)

    # --- what it tells

    async def partitions(self, topic: str) -> int:
        """Give the number of partitions of a topic. Raises UnknownTopicError, BrokerError."""
        if topic not in self.counts:
            self.counts |= await self._ask(lambda: self._describe([topic]), "look for", topic)
        if topic not in self.counts:
            raise UnknownTopicError(f"{self.url}: there is no topic {topic}, or we have no right to DESCRIBE it")
        return self.counts[topic]

    async def require(self, topic: str, partition: int) -> None:
        """Raise UnknownTopicError unless the topic has such a partition, which may have been added since we asked."""
        if 0 <= partition < self.counts.get(topic, 0):
            return
        self.counts.pop(topic, None)
        count = await self.partitions(topic)
        if not 0 <= partition < count:
            raise UnknownTopicError(f"{self.url}: the topic {topic} has no partition {partition}; it has {count}")

    async def ensure(self, topics: Mapping[str, NewTopic]) -> None:
        """Create those topics that don't exist, and wait until all can be used."""
        names = ", ".join(topics)
        found = await self._ask(lambda: self._describe(topics), "look for", names)
        missing = [new for name, new in topics.items() if name not in found]
        if missing:
            await self._ask(lambda: self._create(missing), "create", names)
        self.counts |= await self._ask(lambda: self._with_leaders(topics), "wait for leaders of", names)

    async def _describe(self, names: Collection[str]) -> dict[str, int]:
        """Give the numbers of partitions of those topics that exist."""
        return {name: len(partitions) for name, partitions in (await self._metadata(names)).items()}

    async def _with_leaders(self, names: Collection[str]) -> dict[str, int]:
        found = await self._metadata(names)
        if len(found) < len(names) or not all(leader >= 0 for leaders in found.values() for leader in leaders.values()):
            raise kafka.LeaderNotAvailableError
        return {name: len(leaders) for name, leaders in found.items()}

    async def _metadata(self, names: Collection[str]) -> dict[str, dict[int, int]]:
        """Give the leader of each partition of those topics that exist; asking must not create them."""
        response = await self._send(None, MetadataRequest(list(names), allow_auto_topic_creation=False))
        found = {}
        for described in response.to_object()["topics"]:
            if described["error_code"] in (
                kafka.UnknownTopicOrPartitionError.errno,
                kafka.TopicAuthorizationFailedError.errno,  # Kafka hides them in the same way
            ):
                continue
            checked(described["error_code"], described["topic"])
            found[described["topic"]] = {entry["partition"]: entry["leader"] for entry in described["partitions"]}
        return found

    async def _create(self, topics: Sequence[NewTopic]) -> None:
        wanted: list[Any] = [
            (new.name, new.num_partitions, new.replication_factor, [], list(new.topic_configs.items()))
            for new in topics
        ]
        assert self._client is not None, "started"
        controller = self._client.cluster.controller
        request = CreateTopicsRequest(wanted, timeout=int(self.patience * 1000), validate_only=False)
        response = await self._send(None if controller is None else controller.nodeId, request)
        for name, code, message in (entry[:3] for entry in response.topic_errors):
            if code in (kafka.TopicAuthorizationFailedError.errno, kafka.ClusterAuthorizationFailedError.errno):
                raise BrokerAuthorizationError(
                    f"{self.url} does not let us create the topic {name}: the right CREATE on the cluster or the topic "
                    "is missing, or, if it exists, DESCRIBE"
                )
            if code != kafka.TopicAlreadyExistsError.errno:
                checked(code, message or name)

    async def record_limit(self, topic: str) -> int | None:
        """Give how many bytes of records a topic takes at once; None if we have no right to know, or are not told."""

        async def describe() -> int | None:
            resource = (_TOPIC_RESOURCE, topic, [_RECORD_LIMIT])
            response = await self._send(None, DescribeConfigsRequest([resource]))
            described = response.to_object()["resources"][0]
            checked(described["error_code"], topic)
            told = [entry["config_value"] for entry in described["config_entries"]]
            return int(told[0]) if told and told[0] else None  # not every broker that speaks Kafka's protocol has it

        try:
            limit = await self._ask(describe, "read the settings of", topic, right="DESCRIBE_CONFIGS")
        except BrokerAuthorizationError as error:
            log.info("topic.limit_unknown", topic=topic, reason=str(error))
            return None
        if limit is not None:
            self.limits[topic] = limit
        return limit

    async def members(self, group: str) -> int:
        """Give the number of members of a group."""

        async def describe() -> int:
            response = await self._send(await self._coordinator(group), DescribeGroupsRequest([group]))
            described = response.to_object()["groups"][0]
            if described["error_code"] == kafka.GroupIdNotFound.errno:
                return 0
            checked(described["error_code"], group)
            return len(described["members"])

        return await self._ask(describe, "describe the group", group)

    async def offsets(
        self, topic: str, partitions: Collection[int], at: int, isolation: Isolation = "read_uncommitted"
    ) -> dict[int, int]:
        """Say where partitions BEGIN, or END, or have the first record from a time stamp on, which may be the end."""
        if not partitions:
            return {}
        for number in partitions:
            await self.require(topic, number)

        found = await self._ask(lambda: self._offsets(topic, partitions, at, isolation), "read offsets of", topic)
        late = [number for number, offset in found.items() if offset < 0]
        return found | await self.offsets(topic, late, END, isolation)

    async def ends(self, topic: str, partitions: Collection[int], isolation: Isolation) -> dict[int, int]:
        """Say where partitions end, asking once. Raises errors of Kafka's."""
        try:
            return await self._offsets(topic, partitions, END, isolation)
        except (kafka.KafkaError, OSError):
            if self._client is not None:
                self._client.force_metadata_update()
            raise

    async def _offsets(self, topic: str, partitions: Collection[int], at: int, isolation: Isolation) -> dict[int, int]:
        found = {}
        wanted = dict.fromkeys(partitions, at)
        level = int(isolation == "read_committed")
        for response in await self._ask_leaders(topic, wanted, lambda topics: OffsetRequest(-1, level, topics)):
            for number, code, _, offset in (entry for _, entries in response.topics for entry in entries):
                checked(code, topic, number)
                found[number] = offset
        return found

    async def delete_before(self, topic: str, positions: Mapping[int, int]) -> None:
        """Delete the records of partitions before these offsets."""
        for number in positions:
            await self.require(topic, number)

        def request(topics: list[tuple[str, list[tuple[int, int]]]]) -> DeleteRecordsRequest:
            return DeleteRecordsRequest(topics, int(self.patience * 1000))

        async def ask() -> None:
            for response in await self._ask_leaders(topic, positions, request):
                for number, _, code in (entry[:3] for _, entries, *_ in response.topics for entry in entries):
                    checked(code, topic, number)

        await self._ask(ask, "delete records of", topic, right="DELETE")

    async def _ask_leaders(
        self,
        topic: str,
        wanted: Mapping[int, int],
        request: Callable[[list[tuple[str, list[tuple[int, int]]]]], Any],
    ) -> list[Any]:
        """Send each leader of the partitions one request, with a number for each partition."""
        leaders = (await self._metadata([topic])).get(topic, {})
        answers = []
        for node in {leaders.get(number, -1) for number in wanted}:
            if node < 0:
                raise kafka.LeaderNotAvailableError(topic)
            of_node = [(number, value) for number, value in wanted.items() if leaders.get(number) == node]
            answers.append(await self._send(node, request([(topic, of_node)])))
        return answers

    async def committed(self, group: str, topic: str, partitions: Collection[int]) -> dict[int, Committed]:
        """Give what a group has stored for partitions, with its notes; those without are left out."""
        if not partitions:
            return {}

        async def ask() -> dict[int, Committed]:
            request = OffsetFetchRequest(group, [(topic, sorted(partitions))])
            response = await self._send(await self._coordinator(group), request)
            checked(getattr(response, "error_code", 0), group)
            found = {}
            for number, offset, note, code in (entry for _, entries in response.topics for entry in entries):
                checked(code, topic, number)
                if offset >= 0:
                    found[number] = Committed(offset, note or "")
            return found

        return await self._ask(ask, "read what is committed by the group", group)

    async def begin_group(self, group: str, topic: str, offsets: Mapping[int, int]) -> None:
        """Store where a group begins on a topic, unless it has members: whoever joined before has settled it."""

        async def ask() -> None:
            places = [(number, offset, "") for number, offset in offsets.items()]
            nobody = (OffsetCommitRequest.DEFAULT_GENERATION_ID, "", OffsetCommitRequest.DEFAULT_RETENTION_TIME)
            request = OffsetCommitRequest(group, *nobody, [(topic, places)])
            response = await self._send(await self._coordinator(group), request)
            for number, code in (entry for _, entries in response.topics for entry in entries):
                if code not in _HAS_MEMBERS:
                    checked(code, topic, number)

        await self._ask(ask, "commit for", group, right="READ")

    async def _coordinator(self, group: str) -> int:
        assert self._client is not None, "started"
        node: int = await self._client.coordinator_lookup(CoordinationType.GROUP, group)
        return node

    async def _send(self, node: int | None, request: Any) -> Any:
        if self._client is None:
            raise BrokerError(f"{self.url}: not connected")
        return await self._client.send(self._client.get_random_node() if node is None else node, request)

    async def _ask(self, question: Callable[[], Awaitable[T]], doing: str, what: str, *, right: str = "DESCRIBE") -> T:
        """Ask, and ask again while brokers restart and leaders move, for `patience` at most. Raises BrokerError."""
        failed = "no answer"
        limit = asyncio.timeout(self.patience)
        try:
            async with limit:
                while True:
                    try:
                        return await question()
                    except (kafka.KafkaError, OSError) as error:
                        if not getattr(error, "retriable", True):
                            raise self.translated(error, doing, right=right, what=what) from error
                        failed = said(error)
                    if self._client is not None:
                        self._client.force_metadata_update()
                    await asyncio.sleep(PAUSE)
        except TimeoutError:
            if not limit.expired():
                raise
            reason = f"failed to {doing} {what} within {self.patience:g} s: {failed}"
            raise BrokerError(f"{self.url} {reason}") from None


def said(error: BaseException) -> str:
    """Give an error's own words on one line, or its name if it has none."""
    text = " ".join(str(error).split())
    return text or type(error).__name__


def check_size(topic: str, value: bytes, limit: int) -> None:
    """Raise RecordTooLargeError for a value of more bytes than a record may have."""
    if len(value) > limit:
        raise RecordTooLargeError(f"a record of {len(value)} bytes for {topic} is over the limit of {limit}")


def checked(code: int, *details: object) -> None:
    """Raise the error that a code in an answer of Kafka's stands for, if any."""
    if code:
        raise kafka.for_code(code)(*details)


def security_arguments(settings: KafkaSettings) -> dict[str, Any]:
    """Give the arguments for TLS and SASL that every client of aiokafka takes. Raises ChainsUsageError."""
    arguments: dict[str, Any] = {"security_protocol": settings.security_protocol}
    if "SSL" in settings.security_protocol.split("_"):
        try:
            arguments["ssl_context"] = create_ssl_context(
                cafile=settings.ssl_cafile,
                certfile=settings.ssl_certfile,
                keyfile=settings.ssl_keyfile,
                password=settings.ssl_password.get_secret_value() if settings.ssl_password else None,
            )
        except (OSError, ssl.SSLError) as error:
            raise ChainsUsageError(f"the TLS files of the settings kafka_ssl_… can't be used: {error}") from None
    if settings.security_protocol.startswith("SASL"):
        if settings.sasl_username is None or settings.sasl_password is None:
            raise ChainsUsageError(
                f"the security protocol {settings.security_protocol} needs a user: "
                "set CHAINS_KAFKA_SASL_USERNAME and CHAINS_KAFKA_SASL_PASSWORD"
            )
        arguments["sasl_mechanism"] = settings.sasl_mechanism or "PLAIN"
        arguments["sasl_plain_username"] = settings.sasl_username
        arguments["sasl_plain_password"] = settings.sasl_password.get_secret_value()
    elif settings.sasl_username is not None:
        raise ChainsUsageError(
            f"a SASL user is set, and the security protocol {settings.security_protocol} has none: "
            "set CHAINS_KAFKA_SECURITY_PROTOCOL to SASL_SSL or SASL_PLAINTEXT"
        )
    return arguments


async def to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Do some work to its end, also if whoever waits for it is cancelled: so that nothing is left half closed."""
    task = asyncio.create_task(work)
    try:
        await asyncio.shield(task)
    finally:
        if not task.done():
            await asyncio.wait([task])
