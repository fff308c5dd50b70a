"""The AsyncAPI 3 document of a Chain: its topics, and what lies on them.

Source: the AsyncAPI specification 3.0.0, with its Kafka bindings 0.5.0.
"""

import inspect
from typing import Any

from chains_stream import schema
from chains_stream.chain import Chain
from chains_stream.chainlet import ChainletBase, chainlet_name, signature
from chains_stream.codec import codec_of
from chains_stream.errors import ChainsUsageError
from chains_stream.events import Feed, feed_of, group_of
from chains_stream.formats import named
from chains_stream.letters import dead_letter_topic
from chains_stream.messages import CORRELATION_ID, MSGPACK, REPLY_PARTITION, REPLY_TOPIC, REQUEST_ID
from chains_stream.settings import Settings

Json = dict[str, Any]

_BINDINGS = "0.5.0"
_TEXT, _BYTES = {"type": "string"}, {"type": "string", "contentEncoding": "binary"}
_REQUEST_HEADERS = {
    CORRELATION_ID: _BYTES | {"description": "16 bytes, of which the answer carries the same"},
    REPLY_TOPIC: _TEXT | {"description": "where the answer goes"},
    REPLY_PARTITION: _BYTES | {"description": "4 bytes, big-endian"},
    REQUEST_ID: _TEXT,
}


def document(chain: Chain, settings: Settings) -> Json:
    """Describe the topics of a Chain. Raises ChainsUsageError for a type without a form in JSON."""
    made = _Document(chain, settings)
    for cls in reversed(chain.chainlets):
        made.add(cls)
    return made.finished()


class _Document:
    """A document as far as it is written."""

    def __init__(self, chain: Chain, settings: Settings) -> None:
        self._chain = chain
        self._settings = settings
        self._channels: Json = {}
        self._operations: Json = {}
        self._messages: dict[str, Json] = {}
        self._taken: dict[str, Any] = {}  # the types of messages, by name
        self._given: dict[str, Any] = {}
        self._replies = f"{settings.namespace}.replies"

    def add(self, cls: type[ChainletBase]) -> None:
        """Describe what a Chainlet takes and gives."""
        name, found = chainlet_name(cls), signature(cls)
        if not found.websocket:
            self._request(cls, name)
        if (feed := feed_of(cls)) is not None:
            self._events(name, feed)

    def finished(self) -> Json:
        try:
            schemas, classes = schema.components([*self._taken.values()], [*self._given.values()])
        except TypeError as error:
            raise ChainsUsageError(f"{self._chain.name} has a type that has no form in JSON: {error}") from error
        for name, described in zip([*self._taken, *self._given], schemas, strict=True):
            self._messages[name]["payload"] = _in_asyncapi(described)
        return {
            "asyncapi": "3.0.0",
            "info": {
                "title": self._chain.name,
                "version": signature(self._chain.entrypoint).digest,
                "description": inspect.getdoc(self._chain.entrypoint) or f"The Chain {self._chain.name}.",
            },
            **({} if self._settings.embedded else {"servers": self._servers()}),
            "channels": self._channels,
            "operations": self._operations,
            "components": {"messages": self._messages, "schemas": _in_asyncapi(classes)},
        }

    def _servers(self) -> Json:
        """Describe the brokers that a client may begin with: ``kafka``, ``kafka-2`` and so on."""
        secure = self._settings.kafka.security_protocol.endswith("SSL")
        protocol = "kafka-secure" if secure else "kafka"
        hosts = self._settings.broker.removeprefix("kafka://").split(",")
        names = ["kafka", *(f"kafka-{number}" for number in range(2, len(hosts) + 1))]
        return {name: {"host": host, "protocol": protocol} for name, host in zip(names, hosts, strict=True)}

    def _request(self, cls: type[ChainletBase], name: str) -> None:
        found, topic = signature(cls), self._chain.topic(cls, self._settings.namespace)
        asked, answered = f"{name}.request", f"{name}.{'chunk' if found.streaming else 'result'}"
        self._message(asked, f"Run {name}", MSGPACK, _REQUEST_HEADERS)
        self._message(answered, f"What {name} gives", MSGPACK, {CORRELATION_ID: _BYTES})
        self._taken[asked], self._given[answered] = codec_of(found).arguments, found.result
        self._channel(topic, f"Requests to {name}", asked)
        self._channel(dead_letter_topic(topic), f"Requests to {name} that were put aside", asked)
        self._channel(self._replies, "Answers", answered)
        self._operations[f"{name}.run_remote"] = {
            "action": "receive",
            "summary": f"Run {name}",
            "channel": _to("channels", topic),
            "messages": [_to("channels", topic, "messages", asked)],
            "reply": {
                "channel": _to("channels", self._replies),
                "messages": [_to("channels", self._replies, "messages", answered)],
                "address": {"location": f"$message.header#/{REPLY_TOPIC}"},
            },
        }

    def _events(self, name: str, feed: Feed) -> None:
        topic, taken = feed.source.topic, f"{name}.event"
        group = group_of(feed.source, self._settings.namespace, self._chain.name, name)
        self._message(taken, f"An event for {name}", named(feed.source.format).content_type, {})
        self._taken[taken] = feed.kind
        self._channel(topic, f"Events for {name}", taken)
        self._channel(dead_letter_topic(topic), f"Events for {name} that were put aside", taken)
        self._operations[f"{name}.events"] = {
            "action": "receive",
            "summary": f"Feed {name}",
            "channel": _to("channels", topic),
            "messages": [_to("channels", topic, "messages", taken)],
            "bindings": {"kafka": {"groupId": {"const": group}, "bindingVersion": _BINDINGS}},
        }
        for sink in feed.sinks:
            given = f"{name}.{sink.topic}"
            self._message(given, f"What {name} writes", named(sink.format).content_type, {})
            self._given[given] = feed.gives
            self._channel(sink.topic, f"What {name} writes", given)
            self._operations[f"{name}.writes.{sink.topic}"] = {
                "action": "send",
                "summary": f"What {name} writes to {sink.topic}",
                "channel": _to("channels", sink.topic),
                "messages": [_to("channels", sink.topic, "messages", given)],
            }

    def _message(self, name: str, title: str, content_type: str, headers: Json) -> None:
        described: Json = {"name": name, "title": title, "contentType": content_type}
        if headers:
            described["headers"] = {"type": "object", "properties": headers}
        described["bindings"] = {"kafka": {"key": {"type": "string"}, "bindingVersion": _BINDINGS}}
        self._messages[name] = described

    def _channel(self, topic: str, title: str, message: str) -> None:
        """Describe a topic, or that a message lies on it too."""
        channel = self._channels.setdefault(
            topic,
            {
                "address": topic,
                "title": title,
                "messages": {},
                "bindings": {"kafka": {"topic": topic, "bindingVersion": _BINDINGS}},
            },
        )
        channel["messages"][message] = _to("components", "messages", message)


def _in_asyncapi(described: Any) -> Any:
    """Give a schema of OpenAPI's in AsyncAPI's words, in which a `discriminator` is the name of a property."""
    if isinstance(described, list):
        return [_in_asyncapi(each) for each in described]
    if not isinstance(described, dict):
        return described
    named = {name: _in_asyncapi(each) for name, each in described.items()}
    if isinstance(found := named.get("discriminator"), dict) and "propertyName" in found:
        named["discriminator"] = found["propertyName"]
    return named


def _to(*path: str) -> Json:
    """Refer to a part of the document, by its way from the root (a JSON pointer, RFC 6901)."""
    return {"$ref": "#/" + "/".join(part.replace("~", "~0").replace("/", "~1") for part in path)}
