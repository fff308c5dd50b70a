"""What a method that takes a WebSocket is read as, and how it runs in `run_local`, with whatever fits the Protocol."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import Any

import msgspec
import pytest

import chains_stream as chains
from chains_stream.chainlet import signature
from chains_stream.policy import current
from chains_stream.websocket import Fields, code_fault, shortened


class Script:
    """A WebSocket whose client says what it is told to, then leaves; it subclasses nothing."""

    headers: Mapping[str, str] = {}
    query_params: Mapping[str, str] = {}

    def __init__(self, *messages: str | bytes) -> None:
        self._messages = deque(messages)
        self.sent: list[str | bytes] = []
        self.closed: tuple[int, str | None] | None = None

    async def receive(self) -> str | bytes:
        if not self._messages:
            raise chains.WebSocketClosedError("it has left", close_code=1001, reason="lunch")
        return self._messages.popleft()

    async def receive_text(self) -> str:
        return str(await self.receive())

    async def receive_bytes(self) -> bytes:
        return bytes(await self.receive())  # type: ignore[arg-type] # a script of bytes

    async def receive_json(self) -> Any:
        return msgspec.json.decode(await self.receive())

    async def send(self, data: str | bytes) -> None:
        self.sent.append(data)

    async def send_text(self, data: str) -> None:
        self.sent.append(data)

    async def send_bytes(self, data: bytes) -> None:
        self.sent.append(data)

    async def send_json(self, data: Any) -> None:
        self.sent.append(msgspec.json.encode(data))

    async def iter_text(self) -> AsyncIterator[str]:
        while self._messages:
            yield await self.receive_text()

    async def iter_bytes(self) -> AsyncIterator[bytes]:
        while self._messages:
            yield await self.receive_bytes()

    async def iter_json(self) -> AsyncIterator[Any]:
        while self._messages:
            yield await self.receive_json()

    async def close(self, code: int = 1000, reason: str | None = None) -> None:
        self.closed = code, reason

    def is_connected(self) -> bool:
        return self.closed is None and bool(self._messages)


class Upper(chains.ChainletBase):
    async def run_remote(self, text: str) -> str:
        return text.upper()


@chains.mark_entrypoint
class Shout(chains.ChainletBase):
    """Sends back what comes, louder; fails at `fail`."""

    def __init__(self, upper: Upper = chains.depends(Upper)) -> None:
        self._upper = upper

    async def run_remote(self, websocket: chains.WebSocketProtocol) -> None:
        await websocket.send_text(chains.current_request().id)
        while True:
            text = await websocket.receive_text()
            if text == "fail":
                raise ValueError(text)
            await websocket.send_text(await self._upper.run_remote(text))


async def test_it_runs_locally_until_its_client_leaves() -> None:
    with chains.run_local():
        shout = Shout()
    first, second = Script("a", "b"), Script()
    await asyncio.gather(shout.run_remote(first), shout.run_remote(second))
    assert first.sent[1:] == ["A", "B"]
    assert len({first.sent[0], second.sent[0]}) == 2  # a request each
    assert current.get() is None
    with pytest.raises(ValueError, match="fail"):
        await shout.run_remote(Script("fail"))


def test_its_signature_is_one_of_its_own() -> None:
    found = signature(Shout)
    assert (found.websocket, found.streaming, found.is_async) == (True, True, True)
    assert found.topic("ns", "Shout") == "ns.Shout.Shout.run_remote.f9bf36a0"
    assert not signature(Upper).websocket


async def test_there_is_no_other_way_to_call_it() -> None:
    with pytest.raises(chains.ChainsUsageError, match="open one at /websocket"):
        async with chains.run_chain(Shout):
            pass
    with pytest.raises(chains.ChainsUsageError, match="open one at /websocket"):
        async with chains.connect("http://127.0.0.1:1", Shout):
            pass


def test_headers_in_any_case_and_of_one_name() -> None:
    fields = Fields([("X-One", "1"), ("x-one", "2"), ("two", "")])
    assert fields["x-ONE"] == "1, 2"
    assert dict(fields) == {"x-one": "1, 2", "two": ""}
    assert ("TWO" in fields, "three" in fields, len(fields)) == (True, False, 2)


@pytest.mark.parametrize(("code", "right"), [(1000, True), (3000, True), (4999, True), (999, False), (5000, False)])
def test_codes(code: int, right: bool) -> None:  # noqa: FBT001 - what is expected
    assert (code_fault(code, "") is None) is right


@pytest.mark.parametrize("code", [1004, 1005, 1006, 1015, 2999])
def test_codes_that_are_never_sent(code: int) -> None:
    assert code_fault(code, "") is not None


def test_reasons_fit() -> None:
    assert code_fault(1000, "x" * 123) is None
    assert code_fault(1000, "x" * 124) is not None
    assert shortened("a" + "ü" * 100) == "a" + "ü" * 61
    assert shortened("short") == "short"
