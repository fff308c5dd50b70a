"""``Accept``: what the client names most closely among what it likes best, and never what it refuses."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chains_stream.gateway.negotiation import choose

STREAM = ["text/plain", "text/event-stream", "application/x-ndjson"]


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        # No preference at all.
        (None, "text/plain"),
        ("", "text/plain"),
        ("*/*", "text/plain"),
        # What is named is had, whatever its case, its spaces and its parameters.
        ("text/event-stream", "text/event-stream"),
        ("Application/X-NDJSON", "application/x-ndjson"),
        ("  text/event-stream ; charset=utf-8 ", "text/event-stream"),
        ('text/event-stream;note="a, b;q=0"', "text/event-stream"),
        # Quality decides first,
        ("text/plain;q=0.4, text/event-stream;q=0.5", "text/event-stream"),
        ("text/event-stream;q=0.001", "text/event-stream"),
        ("*/*;q=0.8, application/x-ndjson", "application/x-ndjson"),
        # then how closely it is named,
        ("text/event-stream, */*", "text/event-stream"),
        ("*/*, application/*", "application/x-ndjson"),
        ("application/json, text/plain, */*", "text/plain"),
        # then our own order.
        ("application/x-ndjson, text/event-stream", "text/event-stream"),
        ("text/*", "text/plain"),
        # The closest range speaks for a media type, though a wider one likes it better.
        ("text/*, text/plain;q=0", "text/event-stream"),
        ("*/*, text/*;q=0.1", "application/x-ndjson"),
        ("text/html, application/xhtml+xml, application/xml;q=0.9, */*;q=0.8", "text/plain"),
        # Nothing fits.
        ("application/json", None),
        ("image/*", None),
        ("*/*;q=0", None),
        ("text/plain;q=0, text/event-stream;q=0.000", None),
        # What is malformed counts for nothing, and what stands beside it counts.
        ("nonsense", None),
        ("*/plain", None),
        ("text/event-stream;q=high", None),
        ("text/event-stream;q=2", None),
        ("text/plain;q=, , ;;,text/event-stream", "text/event-stream"),
    ],
)
def test_choice(accept: str | None, chosen: str | None) -> None:
    assert choose(accept, STREAM) == chosen


@given(st.text(max_size=60) | st.text(alphabet='*/;,="q.0159 \\atex', max_size=60))
def test_any_header_gives_an_offer_or_none(accept: str) -> None:
    assert choose(accept, STREAM) in {*STREAM, None}


@pytest.mark.parametrize("accept", ['"' * 60_000, "a/b," * 20_000, "text/plain;" * 20_000, 'a/b;c="' + "\\" * 60_000])
def test_a_long_header_takes_no_time(accept: str) -> None:
    began = time.perf_counter()
    choose(accept, STREAM)
    assert time.perf_counter() - began < 0.5
