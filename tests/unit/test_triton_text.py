"""Text as it comes from a model: in parts of characters, accumulated, and up to a stop."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainlets.triton_text import Text


def run(text: Text, pieces: list[bytes]) -> str:
    said = ""
    for piece in pieces:
        said += text.take(piece)
        if text.stopped:
            break
    return said + text.end()


def cut(whole: str, stops: list[str]) -> str:
    return whole[: min((at for stop in stops if (at := whole.find(stop)) >= 0), default=len(whole))]


@given(st.text("ab€", max_size=30), st.lists(st.text("ab€", min_size=1, max_size=4), max_size=3), st.data())
def test_however_it_is_cut_up_it_ends_at_the_first_stop(whole: str, stops: list[str], data: st.DataObject) -> None:
    encoded = whole.encode()
    places = sorted(data.draw(st.sets(st.integers(0, len(encoded)), max_size=8)))
    ends = [*places, len(encoded)]
    pieces = [encoded[start:end] for start, end in zip([0, *places], ends, strict=True)]
    expected = cut(whole, stops)
    assert run(Text(stops), pieces) == expected
    assert run(Text(stops, accumulated=True), [encoded[:end] for end in ends]) == expected


@pytest.mark.parametrize(
    ("stops", "expected"), [(["two"], "one two"), (["wo", "two"], "one two"), (["x", ""], "one two three")]
)
def test_a_stop_that_is_kept(stops: list[str], expected: str) -> None:
    assert run(Text(stops, included=True), [b"one t", b"wo thr", b"ee"]) == expected


def test_nothing_is_held_back_that_can_be_no_stop() -> None:
    text = Text(["###"])
    assert [text.take(piece) for piece in (b"a#", b"#b", b"c##", b"##")] == ["a", "##b", "c", ""]
    assert text.stopped
    assert text.end() == ""


def test_bytes_that_are_no_text_are_replaced() -> None:
    assert run(Text(), [b"a\xff", b"b\xe2\x82"]) == "a\ufffdb\ufffd"
