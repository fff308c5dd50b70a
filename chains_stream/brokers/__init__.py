"""The brokers there are, opened by URL."""

from chains_stream.broker import Broker
from chains_stream.errors import ChainsUsageError
from chains_stream.settings import Settings

_DEFAULT_PORT = 9092


def open_broker(settings: Settings) -> Broker:
    """Make the broker that `settings.broker` names; `start` it next. Raises ChainsUsageError for a wrong URL."""
    scheme, separator, rest = settings.broker.partition("://")
    if separator and scheme == "memory":
        if rest:
            raise ChainsUsageError(f"the broker's URL is `{settings.broker}`: nothing may follow memory://")
        from chains_stream.brokers.memory import MemoryBroker

        return MemoryBroker(settings)
    if separator and scheme == "kafka":
        servers = [_server(part, settings.broker) for part in rest.rstrip("/").split(",")]
        # Imported only here: the embedded broker should not pay for a Kafka client.
        from chains_stream.brokers.kafka import KafkaBroker

        return KafkaBroker(servers, settings)
    raise ChainsUsageError(
        f"the broker's URL is `{settings.broker}`: write memory:// for the embedded one, or kafka://host:port[,host:port]"
    )


def _server(text: str, url: str) -> str:
    if "@" in text:
        raise ChainsUsageError(
            "credentials don't belong in the broker's URL, which is logged: "
            "set CHAINS_KAFKA_SASL_USERNAME and CHAINS_KAFKA_SASL_PASSWORD"
        )
    host, separator, port = text.rpartition(":") if not text.endswith("]") else (text, "", "")
    if not separator:
        host, port = text, str(_DEFAULT_PORT)
    if not host or not port.isdigit() or not 0 < int(port) <= 65_535:  # noqa: PLR2004 - a port's limit
        raise ChainsUsageError(f"the broker's URL is `{url}`: `{text}` is not host:port")
    return f"{host}:{port}"
