"""The brokers there are, opened by URL."""

import re
from collections.abc import Mapping

from chains_stream.broker import Broker
from chains_stream.errors import ChainsUsageError
from chains_stream.settings import Settings
from chains_stream.supply import Outlet, SupplyConsumer

_DEFAULT_PORT = 9092
_SERVER = re.compile(r"(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.%]+\])(:(?P<port>[0-9]{1,5}))?")


def open_broker(settings: Settings) -> Broker:
    """Make the broker that `settings.broker` names; `start` it next. Raises ChainsUsageError for a wrong URL."""
    scheme, separator, rest = settings.broker.partition("://")
    if "@" in rest:
        raise ChainsUsageError(
            "credentials don't belong in the broker's URL, which is logged: "
            "set CHAINS_KAFKA_SASL_USERNAME and CHAINS_KAFKA_SASL_PASSWORD"
        )
    if separator and scheme == "memory":
        if rest:
            raise ChainsUsageError(f"the broker's URL is `{settings.broker}`: nothing may follow memory://")
        from chains_stream.brokers.memory import MemoryBroker

        return MemoryBroker(settings)
    if separator and scheme == "kafka":
        servers = [_server(part, settings.broker) for part in rest.removesuffix("/").split(",")]
        # Imported only here: the embedded broker should not pay for a Kafka client.
        from chains_stream.brokers.kafka import KafkaBroker

        return KafkaBroker(servers, settings)
    raise ChainsUsageError(
        f"the broker's URL is `{settings.broker}`: write memory:// for the embedded one, or kafka://host:port[,host:port]"
    )


def open_supplied(settings: Settings, topic: str, consumer: SupplyConsumer, outlets: Mapping[str, Outlet]) -> Broker:
    """Make an embedded broker whose `topic` is given by `consumer`, and whose topics with `outlets` go there."""
    from chains_stream.brokers.supplied import SuppliedBroker

    return SuppliedBroker(settings, topic, consumer, outlets)


def _server(text: str, url: str) -> str:
    found = _SERVER.fullmatch(text)
    port = int(found["port"] or _DEFAULT_PORT) if found else 0
    if found is None or not 0 < port <= 65_535:  # noqa: PLR2004 - a port's limit
        raise ChainsUsageError(f"the broker's URL is `{url}`: `{text}` is not host:port")
    return f"{found['host']}:{port}"
