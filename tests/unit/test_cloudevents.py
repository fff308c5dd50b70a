"""CloudEvents over Kafka: the bytes of both modes, and the official library at the other end."""

import json
import re
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from cloudevents.core.bindings import kafka
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from hypothesis import given
from hypothesis import strategies as st

from chains_stream.errors import InvalidArgumentError, InvalidResultError
from chains_stream.formats import CloudEvents, Registry

TOPIC = "tickets"
MODES = [CloudEvents("binary", "/tickets", "ticket.opened"), CloudEvents("structured", "/tickets", "ticket.opened")]
ATTRIBUTES = {"ce_id": b"1", "ce_source": b"/tickets", "ce_specversion": b"1.0", "ce_type": b"ticket.opened"}


class Ticket(msgspec.Struct):
    id: int
    subject: str | None = None


def read(kind: Any, data: bytes, headers: dict[str, bytes]) -> Any:
    reader = CloudEvents().reader(kind, Registry())
    assert reader.needs_headers
    assert reader.missing(data) is None
    return reader.read(data, headers, TOPIC)


def written(form: CloudEvents, kind: Any, value: Any, **given: bytes) -> tuple[bytes, dict[str, bytes]]:
    data, headers = form.writer(kind, Registry()).write(value, TOPIC, given)
    return data, {name: text for name, text in headers if text is not None}


def test_binary_mode() -> None:
    given = {"ce_id": b"1", "ce_time": b"2026-01-02T03:04:05Z", "ce_subject": b"x", "traceparent": b"t"}
    assert written(MODES[0], Ticket, Ticket(7), **given) == (
        b'{"id":7,"subject":null}',
        {**ATTRIBUTES, **given, "content-type": b"application/json"},
    )


def test_structured_mode() -> None:
    given = {"ce_id": b"1", "ce_time": b"2026-01-02T03:04:05Z", "traceparent": b"t"}
    data, headers = written(MODES[1], Ticket, Ticket(7), **given)
    assert headers == {"content-type": b"application/cloudevents+json", "traceparent": b"t"}
    assert data == (
        b'{"id":"1","specversion":"1.0","source":"/tickets","type":"ticket.opened","time":"2026-01-02T03:04:05Z",'
        b'"datacontenttype":"application/json","data":{"id":7,"subject":null}}'
    )


def test_an_event_has_an_id_of_its_own_and_the_present_time() -> None:
    before = datetime.now(UTC)
    events = [written(CloudEvents(), Ticket, Ticket(7))[1] for _ in range(2)]
    assert events[0]["ce_id"] != events[1]["ce_id"]
    assert events[0]["ce_type"] == b"Ticket"
    assert re.fullmatch(r"[0-9T:.-]+Z", events[0]["ce_time"].decode())
    assert before <= datetime.fromisoformat(events[0]["ce_time"].decode()) <= datetime.now(UTC)


def test_attributes_of_a_structured_event_become_headers() -> None:
    event = {
        "specversion": "1.0",
        "id": "1",
        "source": "/s",
        "type": "t",
        "data": {"id": 7},
        "flag": True,
        "count": 5,
        "none": None,
        "name": "é",
    }
    headers = {"content-type": b"application/cloudevents+json; charset=utf-8", "traceparent": b"x"}
    assert read(Ticket, json.dumps(event).encode(), headers) == Ticket(7)
    assert headers == {
        "content-type": b"application/json",
        "traceparent": b"x",
        "ce_specversion": b"1.0",
        "ce_id": b"1",
        "ce_source": b"/s",
        "ce_type": b"t",
        "ce_flag": b"true",
        "ce_count": b"5",
        "ce_name": "é".encode(),
    }


@pytest.mark.parametrize("form", MODES, ids=lambda form: form.mode)
@pytest.mark.parametrize(("kind", "value"), [(Ticket, Ticket(7, "x")), (str, "é"), (bytes, b"\xff\0"), (int, 5)])
def test_data_of_any_kind_passes_in_either_mode(form: CloudEvents, kind: Any, value: Any) -> None:
    assert read(kind, *written(form, kind, value)) == value


@pytest.mark.parametrize("form", MODES, ids=lambda form: form.mode)
@given(subject=st.text(), number=st.integers(0, 2**60))
def test_what_is_written_is_read(form: CloudEvents, subject: str, number: int) -> None:
    assert read(Ticket, *written(form, Ticket, Ticket(number, subject))) == Ticket(number, subject)


def test_an_event_without_data_is_null() -> None:
    assert read(Ticket | None, b"", dict(ATTRIBUTES)) is None
    event = b'{"specversion":"1.0","id":"1","source":"/s","type":"t"}'
    assert read(Ticket | None, event, {"content-type": b"application/cloudevents+json"}) is None
    with pytest.raises(InvalidArgumentError, match="Expected `object`, got `null`"):
        read(Ticket, b"", dict(ATTRIBUTES))


@pytest.mark.parametrize("form", MODES, ids=lambda form: form.mode)
def test_the_official_library_reads_ours(form: CloudEvents) -> None:
    data, headers = written(form, Ticket, Ticket(7, "x"), ce_subject=b"s", ce_traceid=b"abc")
    event = kafka.from_kafka_event(kafka.KafkaMessage(headers, None, data))
    assert event.get_data() == {"id": 7, "subject": "x"}
    assert (event.get_source(), event.get_type(), event.get_subject()) == ("/tickets", "ticket.opened", "s")
    assert event.get_extension("traceid") == "abc"
    assert (event.get_time() or datetime.min.replace(tzinfo=UTC)) <= datetime.now(UTC)


@pytest.mark.parametrize("write", [kafka.to_binary, kafka.to_structured])
def test_we_read_the_official_library(write: Any) -> None:
    attributes = {"id": "1", "source": "/s", "type": "t", "datacontenttype": "application/json", "traceid": "abc"}
    message = write(CloudEvent(attributes, {"id": 7, "subject": "x"}), JSONFormat())
    headers = dict(message.headers)
    assert read(Ticket, message.value, headers) == Ticket(7, "x")
    assert (headers["ce_id"], headers["ce_traceid"]) == (b"1", b"abc")
    assert headers["content-type"] == b"application/json"


@pytest.mark.parametrize("write", [kafka.to_binary, kafka.to_structured])
def test_we_read_bytes_of_the_official_library(write: Any) -> None:
    attributes = {"id": "1", "source": "/s", "type": "t", "datacontenttype": "application/octet-stream"}
    message = write(CloudEvent(attributes, b"\xff\0"), JSONFormat())
    assert read(bytes, message.value, dict(message.headers)) == b"\xff\0"


@pytest.mark.parametrize(
    ("data", "headers", "said"),
    [
        (b"{}", {}, "the record is no CloudEvent: it has no headers ce_"),
        (b"{}", {**ATTRIBUTES, "ce_id": b""}, "the CloudEvent has no `id`"),
        (b"{}", {**ATTRIBUTES, "ce_specversion": b"0.3"}, "is of version 0.3, and only 1.0 can be read"),
        (b"{}", {"content-type": b"application/cloudevents+avro"}, "application/cloudevents\\+avro can't be read"),
        (b"{}", {"content-type": b"application/cloudevents-batch+json"}, "batch\\+json can't be read"),
        (b"{}", {"content-type": b"application/cloudevents+json"}, "the record is no CloudEvent"),
        (b"{", {"content-type": b"application/cloudevents+json"}, "the data is malformed"),
        (b'{"id": []}', {"content-type": b"application/cloudevents+json"}, "attribute `id` is no text"),
        (
            b'{"specversion":"1.0","id":"1","source":"/s","type":"t","data_base64":"*"}',
            {"content-type": b"application/cloudevents+json"},
            "`data_base64` is no base64",
        ),
        (b'{"id": "x"}', ATTRIBUTES, r"Expected `int`, got `str` - at `\$\.id`"),
    ],
)
def test_what_is_no_event_is_one_line(data: bytes, headers: dict[str, bytes], said: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"^tickets: .*{said}") as caught:
        read(Ticket, data, dict(headers))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ce_Bad-Name": b"x"}, "`ce_Bad-Name` names no attribute"),
        ({"ce_data": b"x"}, "`ce_data` names no attribute"),
        ({"ce_id": b""}, "the CloudEvent's `id` is empty"),
        ({"ce_specversion": b"2.0"}, "written in version 1.0 alone"),
    ],
)
def test_attributes_that_are_none_are_not_written(given: dict[str, bytes], said: str) -> None:
    with pytest.raises(InvalidResultError, match=said):
        written(CloudEvents(), Ticket, Ticket(7), **given)


def test_an_attribute_that_is_not_utf8_is_not_written() -> None:
    with pytest.raises(InvalidResultError, match="not UTF-8"):
        written(MODES[1], Ticket, Ticket(7), ce_subject=b"\xff")


@pytest.mark.parametrize("form", MODES, ids=lambda form: form.mode)
def test_a_value_of_a_wrong_type_is_not_written(form: CloudEvents) -> None:
    wrong: Any = "7"
    with pytest.raises(InvalidResultError, match=r"Expected `int`, got `str` - at `\$\.id`"):
        written(form, Ticket, Ticket(wrong))
