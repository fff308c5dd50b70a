"""How much a topic takes at once: as the broker says, or not; and through an outlet, as that says."""

from types import SimpleNamespace
from typing import Any

import pytest

from chains_stream.broker import TopicSpec
from chains_stream.brokers.kafka_cluster import Cluster
from chains_stream.brokers.memory import MemoryBroker
from chains_stream.brokers.supplied import SuppliedBroker
from chains_stream.settings import KafkaSettings, Settings
from chains_stream.supply import SupplyConsumer, TopicOutlet


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([{"config_name": "max.message.bytes", "config_value": "2000"}], 2000),
        ([{"config_name": "max.message.bytes", "config_value": None}], None),
        ([], None),
    ],
    ids=["told", "empty", "left out"],
)
async def test_a_limit_that_a_broker_leaves_out_is_unknown(
    entries: list[dict[str, str | None]], expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = {"resources": [{"error_code": 0, "config_entries": entries}]}

    async def answer(_node: int | None, _request: Any) -> Any:
        return SimpleNamespace(to_object=lambda: described)

    cluster = Cluster(["127.0.0.1:1"], KafkaSettings())
    monkeypatch.setattr(cluster, "_send", answer)
    assert await cluster.record_limit("t") == expected
    assert cluster.limits.get("t") == expected


class _Nothing:
    starts = {0: 0}  # noqa: RUF012 - as `Supply` has it

    async def fetch(self, max_records: int) -> list[Any]:  # noqa: ARG002 - there are none
        return []


async def test_an_outlet_takes_no_more_than_its_topic() -> None:
    narrow = MemoryBroker(Settings(max_record_bytes=10_000))
    await narrow.ensure_topics([TopicSpec("again", 1, 1000)])
    outlets = {"out": TopicOutlet(narrow, "again")}
    broker = SuppliedBroker(Settings(), "in", SupplyConsumer(_Nothing()), outlets)
    assert await broker.record_limit("out") == await narrow.record_limit("again")
    assert await broker.record_limit("out") < await broker.record_limit("other")
