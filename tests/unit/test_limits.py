"""The limits of a gateway, without the gateway."""

import tracemalloc

import pytest

from chains_stream.errors import OverloadedError
from chains_stream.gateway.limits import Limits
from chains_stream.settings import Settings


def headers(key: str) -> dict[bytes, bytes]:
    return {b"authorization": f"Bearer {key}".encode()}


def test_keys_are_forgotten_with_their_requests() -> None:
    limits = Limits(Settings(max_requests_per_key=1))
    limits.enter(headers("first")).leave()
    tracemalloc.start()
    try:
        for number in range(10_000):
            limits.enter(headers(str(number))).leave()
        grown, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert grown < 100_000


def test_what_is_refused_takes_nothing() -> None:
    limits = Limits(Settings(max_requests=1, max_body_bytes=10, max_buffered_bytes=10))
    place = limits.enter(headers("a"))
    for _ in range(3):
        with pytest.raises(OverloadedError):
            limits.enter(headers("b"))
        with pytest.raises(OverloadedError):
            place.hold(11)
    place.hold(10)
    place.leave()
    again = limits.enter(headers("b"))
    again.hold(10)
    again.leave()


def test_bytes_are_of_all_requests_together() -> None:
    limits = Limits(Settings(max_body_bytes=10, max_buffered_bytes=10))
    first, second = limits.enter(headers("a")), limits.enter(headers("a"))
    first.hold(6)
    with pytest.raises(OverloadedError, match="bodies and results of 6 bytes, and 5 more"):
        second.hold(5)
    second.hold(4)
    first.hold(0)  # it is published
    second.hold(10)


def test_results_count_with_bodies_and_one_larger_than_all_passes_alone() -> None:
    limits = Limits(Settings(max_body_bytes=10, max_buffered_bytes=10))
    first, second = limits.enter(headers("a")), limits.enter(headers("a"))
    first.hold(6)
    with pytest.raises(OverloadedError, match="and 11 more"):
        second.hold_result(11)
    first.leave()
    second.hold_result(11)
    with pytest.raises(OverloadedError, match="bodies and results of 11 bytes"):
        limits.enter(headers("a")).hold(1)
    second.leave()
    limits.enter(headers("a")).hold(10)
