"""The forms of a stream: what one chunk becomes, the quick way and the slow way alike."""

from collections.abc import AsyncIterator
from typing import Annotated, Any, NewType

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import chains_stream as chains
from chains_stream.chainlet import signature
from chains_stream.codec import Codec, codec_of
from chains_stream.errors import InvalidResultError
from chains_stream.gateway.streaming import EVENTS, LINES, TEXT, form_of, json_writer, media_types

Token = NewType("Token", str)
Short = Annotated[str, msgspec.Meta(max_length=3)]


class Texts(chains.ChainletBase):
    async def run_remote(self) -> AsyncIterator[str]:
        yield ""


class Tokens(chains.ChainletBase):
    async def run_remote(self) -> AsyncIterator[Token]:
        yield Token("")


class Shorts(chains.ChainletBase):
    async def run_remote(self) -> AsyncIterator[Short]:
        yield ""


class Numbers(chains.ChainletBase):
    async def run_remote(self) -> AsyncIterator[float]:
        yield 0.0


def codec(entrypoint: type[Any]) -> Codec:
    return codec_of(signature(entrypoint))


def outcome(write: Any, value: bytes) -> bytes | str:
    """Give what is written, or what is said about why not."""
    try:
        written = write(msgspec.Raw(value))
    except InvalidResultError as error:
        return str(error)
    assert isinstance(written, bytes)
    return written


@pytest.mark.parametrize("entrypoint", [Texts, Tokens, Shorts])
@given(value=st.one_of(st.text(), st.binary(max_size=40), st.integers(0, 9), st.none()))
def test_the_quick_way_for_text_is_the_slow_one(entrypoint: type[Any], value: Any) -> None:
    data = msgspec.msgpack.encode(value) if not isinstance(value, bytes) else value
    slow = codec(entrypoint).result_to_json
    quick = json_writer(codec(entrypoint))
    assert quick != slow
    assert outcome(quick, data) == outcome(slow, data)


@given(st.text())
def test_text_is_the_same_in_every_form(text: str) -> None:
    data = msgspec.Raw(msgspec.msgpack.encode(text))
    event = form_of(EVENTS, codec(Texts)).chunk(7, data).decode()
    line = form_of(LINES, codec(Texts)).chunk(7, data).decode()
    assert event.startswith("id: 7\ndata: ")
    assert event.endswith("\n\n")
    assert len(event.splitlines()) == 3  # whatever a client takes for the end of a line
    assert len(line.splitlines()) == 1
    assert msgspec.json.decode(event[len("id: 7\ndata: ") :]) == msgspec.json.decode(line) == text
    assert form_of(TEXT, codec(Texts)).chunk(7, data) == text.encode()


@pytest.mark.parametrize(
    "value",
    [b"\xa1\xff", b"\xa3\xed\xa0\x80", b"\xa2a", b"\xa1ab", b"\xd9\x05abc", b"\xc4\x01a", b"\xc0", b"\x01", b""],
)
@pytest.mark.parametrize("kind", media_types(codec(Texts)))
def test_what_is_no_text_is_an_invalid_chunk(kind: str, value: bytes) -> None:
    with pytest.raises(InvalidResultError, match="invalid chunk"):
        form_of(kind, codec(Texts)).chunk(0, msgspec.Raw(value))


def test_a_constraint_is_kept() -> None:
    with pytest.raises(InvalidResultError, match="<= 3"):
        form_of(EVENTS, codec(Shorts)).chunk(0, msgspec.Raw(msgspec.msgpack.encode("long")))


def test_what_json_lacks_is_an_invalid_chunk() -> None:
    with pytest.raises(InvalidResultError, match="JSON has no `nan`"):
        form_of(LINES, codec(Numbers)).chunk(0, msgspec.Raw(msgspec.msgpack.encode(float("nan"))))
