"""A Kafka cluster as all its clients see it: where it is, how it lets us in, and what its errors mean."""

import asyncio
import ssl
from collections.abc import Sequence
from typing import Any

from aiokafka import errors as kafka
from aiokafka.conn import create_conn
from aiokafka.helpers import create_ssl_context

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

log = get_logger(__name__)


class Cluster:
    """The servers of a cluster; `connection` are the arguments that every client of aiokafka takes."""

    def __init__(self, servers: Sequence[str], settings: KafkaSettings) -> None:
        self.settings = settings
        self.servers = list(servers)
        self.url = f"kafka://{','.join(self.servers)}"
        self._security = security_arguments(settings)
        self.connection = {"bootstrap_servers": self.servers, **self._security}

    async def find_a_server(self) -> None:
        """Wait until one server answers, for as long as `connect_timeout`, and say why if none does."""
        timeout = self.settings.connect_timeout
        reasons: dict[str, str] = {}
        try:
            async with asyncio.timeout(timeout):
                while not await self._any_answers(reasons):  # noqa: ASYNC110 - nobody tells us when a broker is up
                    await asyncio.sleep(PAUSE)
        except TimeoutError:
            said = "; ".join(f"{server}: {reason}" for server, reason in reasons.items()) or "no answer"
            raise BrokerError(f"no Kafka broker answered at {self.url} within {timeout:g} s ({said})") from None

    async def _any_answers(self, reasons: dict[str, str]) -> bool:
        for server in self.servers:
            host, _, port = server.rpartition(":")
            try:
                connection = await create_conn(host.strip("[]"), int(port), **self._security)
            except (kafka.SaslAuthenticationFailed, kafka.AuthenticationFailedError) as error:
                raise BrokerAuthorizationError(
                    f"{self.url} refused the credentials of {self.settings.sasl_username}: {said(error)}"
                ) from None
            except (kafka.UnsupportedSaslMechanismError, ssl.SSLError) as error:
                raise BrokerError(f"{self.url} refused the connection: {said(error)}") from None
            except (OSError, kafka.KafkaError) as error:
                if not reasons:
                    log.info("broker.waiting", broker=self.url, reason=said(error))
                reasons[server] = said(error)
            else:
                connection.close()
                return True
        return False

    def errors(self, doing: str, *, right: str = "", what: str = "") -> "_Errors":
        """Translate aiokafka's errors inside the block; `right` is the ACL that `doing` this to `what` needs."""
        return _Errors(self, doing, right, what)

    def translated(self, error: BaseException, doing: str, *, right: str, what: str) -> BrokerError:
        """Say in one line what aiokafka's error means to somebody who runs this."""
        if isinstance(error, BrokerError):
            return error
        kind: type[BrokerError] = BrokerError
        match error:
            case (
                kafka.TopicAuthorizationFailedError()
                | kafka.GroupAuthorizationFailedError()
                | kafka.ClusterAuthorizationFailedError()
            ):
                kind = BrokerAuthorizationError
                text = f"{self.url} does not let us {doing} {what}: the right {right} is missing"
            case kafka.MessageSizeTooLargeError() | kafka.RecordListTooLargeError():
                kind = RecordTooLargeError
                text = f"{self.url} takes no record of this size for {what}: {said(error)}"
            case kafka.OffsetOutOfRangeError() | kafka.NoOffsetForPartitionError():
                kind = OffsetExpiredError
                text = f"{self.url} no longer holds the offset asked for of {what}"
            case kafka.KafkaConnectionError():
                wants = "if it wants TLS or SASL, set CHAINS_KAFKA_SECURITY_PROTOCOL"
                text = f"{self.url} closed the connection ({said(error)}); {wants}"
            case kafka.UnknownTopicOrPartitionError() | kafka.InvalidTopicError():
                kind = UnknownTopicError
                text = f"{self.url}: there is no such topic or partition: {what}"
            case _:
                text = f"{self.url} failed to {doing} {what}".rstrip() + f": {said(error)}"
        return kind(text)


class _Errors:
    """Translates what aiokafka raises inside the block."""

    def __init__(self, cluster: Cluster, doing: str, right: str, what: str) -> None:
        self._cluster = cluster
        self._doing = doing
        self._right = right
        self._what = what

    async def __aenter__(self) -> None: ...

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, kafka.KafkaError | OSError):
            raise self._cluster.translated(error, self._doing, right=self._right, what=self._what) from error


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


def said(error: BaseException) -> str:
    """Give an error's own words on one line, or its name if it has none."""
    text = " ".join(str(error).split())
    return text or type(error).__name__
