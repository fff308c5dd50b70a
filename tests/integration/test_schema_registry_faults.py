"""A schema registry that is away, slow, or wants to know who asks."""

import asyncio
import struct
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
import pytest
import trustme

from chains_stream.errors import SchemaRegistryAuthorizationError, SchemaRegistryError, UnknownSchemaError
from chains_stream.formats import Avro, Format, JsonSchema, Registry
from chains_stream.settings import RegistrySettings
from tests import registry as registries
from tests.registry import fronted, read, write


class Ticket(msgspec.Struct):
    id: int
    subject: str


@pytest.fixture
async def asked(registry: registries.Registry) -> AsyncIterator[Registry]:
    ours = Registry(RegistrySettings(url=registry.url))
    yield ours
    await ours.close()


@pytest.fixture
def topic() -> str:
    return f"t{uuid4().hex[:12]}"


async def test_a_missing_schema_is_not_retryable(asked: Registry) -> None:
    data = struct.pack(">bI", 0, 2**31 - 1) + b"x"
    reader = Avro().reader(Ticket, asked)
    for _ in range(2):  # the second time without asking
        with pytest.raises(UnknownSchemaError, match=f"^schema {2**31 - 1}: the schema registry http") as caught:
            await read(reader, data)
        assert not caught.value.retryable
    assert "a moment ago" in str(caught.value)


@pytest.mark.parametrize("form", [Avro(), JsonSchema()], ids=lambda form: form.name)
async def test_a_registry_that_is_away_is_retryable(topic: str, form: Format) -> None:
    away = Registry(RegistrySettings(url="http://127.0.0.1:1", timeout=2))
    began = time.monotonic()
    said = r"the schema registry http://127\.0\.0\.1:1 can't be reached: "
    with pytest.raises(SchemaRegistryError, match=said) as caught:
        await write(form.writer(Ticket, away), Ticket(7, "x"), topic)
    assert caught.value.retryable
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 20
    await away.close()


async def test_a_registry_that_comes_back_is_asked_again(registry: registries.Registry, topic: str) -> None:
    """A record whose schema is known needs no registry; one whose schema is not waits for it."""
    async with fronted(registry) as front:
        ours = Registry(RegistrySettings(url=front.url))
        writer, reader = Avro().writer(Ticket, ours), Avro().reader(Ticket, ours)
        front.away = True
        with pytest.raises(SchemaRegistryError, match="answered 503") as caught:
            await write(writer, Ticket(7, "x"), topic)
        assert caught.value.retryable
        front.away = False
        data = await write(writer, Ticket(7, "x"), topic)
        await read(reader, data)
        front.away = True
        assert await read(reader, await write(writer, Ticket(8, "y"), topic)) == Ticket(8, "y")
        await ours.close()


async def test_who_waits_may_leave_and_the_registry_may_be_closed(
    registry: registries.Registry, asked: Registry, topic: str
) -> None:
    data = await write(Avro().writer(Ticket, asked), Ticket(7, "x"), topic)
    async with fronted(registry) as front:
        ours = Registry(RegistrySettings(url=front.url))
        reader = Avro().reader(Ticket, ours)
        front.hold.clear()
        first, second = (asyncio.create_task(read(reader, data)) for _ in range(2))
        while not front.asked:  # noqa: ASYNC110 - it is the front's own list
            await asyncio.sleep(0.01)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        front.hold.set()
        assert await second == Ticket(7, "x")
        front.hold.clear()
        other = Avro().writer(Ticket, ours).missing(topic)
        assert other is not None
        third = asyncio.ensure_future(other)
        while len(front.asked) < 2:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.01)
        await ours.close()
        with pytest.raises(SchemaRegistryError, match="was closed"):
            await third
        front.hold.set()


async def test_many_records_ask_once(registry: registries.Registry, asked: Registry, topic: str) -> None:
    data = await write(Avro().writer(Ticket, asked), Ticket(7, "x"), topic)
    async with fronted(registry) as front:
        ours = Registry(RegistrySettings(url=front.url))
        readers = [Avro().reader(Ticket, ours) for _ in range(2)]
        front.away = True
        failed = await asyncio.gather(*(read(readers[0], data) for _ in range(50)), return_exceptions=True)
        assert {type(error) for error in failed} == {SchemaRegistryError}
        assert len(front.asked) <= 5
        front.away = False
        front.asked.clear()
        found = await asyncio.gather(*(read(reader, data) for reader in readers for _ in range(50)))
        assert found == [Ticket(7, "x")] * 100
        assert len(front.asked) == 1
        await ours.close()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"username": "ada", "password": "lo:ve"}, "Basic YWRhOmxvOnZl"),
        ({"token": "abc"}, "Bearer abc"),
    ],
)
async def test_tls_and_credentials(
    registry: registries.Registry, topic: str, tmp_path: Path, given: Mapping[str, Any], expected: str
) -> None:
    ca = trustme.CA()
    trusted = tmp_path / "ca.pem"
    ca.cert_pem.write_to_path(str(trusted))
    async with fronted(registry, ca.issue_cert("127.0.0.1"), tmp_path, expected) as front:
        ours = Registry(RegistrySettings(url=front.url, cafile=str(trusted), **given))
        data = await write(Avro().writer(Ticket, ours), Ticket(7, "x"), topic)
        assert await read(Avro().reader(Ticket, ours), data) == Ticket(7, "x")
        await ours.close()
        stranger = Registry(RegistrySettings(url=front.url, cafile=str(trusted)))
        with pytest.raises(SchemaRegistryAuthorizationError, match="answered 401") as caught:
            await write(Avro().writer(Ticket, stranger), Ticket(7, "x"), topic)
        assert not caught.value.retryable
        await stranger.close()
        trusting = Registry(RegistrySettings(url=front.url))
        with pytest.raises(SchemaRegistryError, match=r"(?i)certificate"):
            await write(Avro().writer(Ticket, trusting), Ticket(7, "x"), topic)
        await trusting.close()
