"""A schema registry with Confluent's API, and the frame that it gives to values: see the Wire Format in its manual.

The client is Confluent's own. What a record needs of it is kept by readers and writers, so it is asked once for each
schema, and never while a record waits whose schema is known.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar
from urllib.parse import urlsplit, urlunsplit

from chains_stream.errors import (
    ChainsUsageError,
    IncompatibleSchemaError,
    InvalidArgumentError,
    SchemaRegistryAuthorizationError,
    SchemaRegistryError,
    UnknownSchemaError,
)
from chains_stream.settings import RegistrySettings

if TYPE_CHECKING:
    from confluent_kafka.schema_registry import AsyncSchemaRegistryClient, RegisteredSchema, Schema

T = TypeVar("T")

MAGIC = b"\0"
FRAME_BYTES = 5  # of the magic byte, and the schema's id: 4 bytes, big-endian
Naming = Literal["topic", "record", "topic-record"]
Register = Literal["register", "lookup", "latest"]

_TRIES, _RETRY_MS, _MAX_RETRY_MS = 2, 100, 1_000  # after the first; whoever asked has retries of its own
_FORGET_SECONDS = 10.0  # until a schema that was missing is asked for again
_MAX_MISSING = 10_000
_MAX_DEPTH = 64  # of schemas that refer to others
# Of the API: what is not there, what is no schema, and what is not compatible.
_ABSENT = (404,)
_REFUSED = (409, 422)
_FORBIDDEN = (401, 403)


class Registered(NamedTuple):
    """A schema as the registry keeps it. `references` are the schemas that it refers to, each after its own."""

    id: int
    type: str
    text: str
    references: tuple[str, ...] = ()


class Registry:
    """The schema registry of a process. It connects when it is first asked; close it at the end."""

    def __init__(self, settings: RegistrySettings | None = None) -> None:
        self._settings = settings or RegistrySettings()
        self._client: AsyncSchemaRegistryClient | None = None
        self._asking: dict[object, asyncio.Task[Registered]] = {}
        self._known: dict[int, Registered] = {}
        self._missing: dict[int, float] = {}

    @property
    def url(self) -> str:
        """Where the registry is, without credentials: for messages."""
        parts = urlsplit(self._settings.url or "")
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))

    def require(self, name: str) -> None:
        """Check that the format of that name can ask a registry. Raises ChainsUsageError."""
        if self._settings.url is None:
            raise ChainsUsageError(f"the format `{name}` needs a schema registry: set CHAINS_REGISTRY_URL")
        try:
            import confluent_kafka.schema_registry  # noqa: F401 - only whoever reads such records has it
        except ImportError:
            raise ChainsUsageError(
                f"the format `{name}` needs a client of the schema registry: pip install 'chains-stream[registry]'"
            ) from None

    async def schema(self, schema_id: int) -> Registered:
        """Give a schema by its id. Raises SchemaRegistryError; an UnknownSchemaError if there is none."""
        known = self._known.get(schema_id)
        if known is not None:
            return known
        if self._missing.get(schema_id, 0.0) > time.monotonic():
            raise UnknownSchemaError(f"schema {schema_id}: the schema registry {self.url} had none a moment ago")
        return await self._once(schema_id, partial(self._fetched, schema_id))

    async def of_subject(self, subject: str, kind: str, text: str, how: Register) -> Registered:
        """Give the schema to write to a subject with: `text`, which is registered or looked up, or the latest one.

        `kind` is the registry's name for its kind: ``AVRO``, ``JSON``. Raises SchemaRegistryError.
        """
        return await self._once((subject, kind, text, how), partial(self._settled, subject, kind, text, how))

    async def close(self) -> None:
        """Close the connection. It may be asked again, and then connects again."""
        asking = list(self._asking.values())
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def _once(self, what: object, ask: Callable[[], Coroutine[Any, Any, Registered]]) -> Registered:
        """Ask, or wait for who asks the same already: many records wait for one schema, and for one failure too."""
        task = self._asking.get(what)
        if task is None:
            task = self._asking[what] = asyncio.create_task(ask())
            task.add_done_callback(partial(self._answered_once, what))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():  # not we: `close` did
                raise SchemaRegistryError(f"the connection to the schema registry {self.url} was closed") from None
            raise
        except SchemaRegistryError as error:
            raise type(error)(error.message) from error  # each its own, or their tracebacks would add up

    def _answered_once(self, what: object, task: asyncio.Task[Registered]) -> None:
        self._asking.pop(what, None)
        if not task.cancelled():
            task.exception()  # seen, also if nobody waits any more

    async def _fetched(self, schema_id: int) -> Registered:
        try:
            schema = await self._ask(f"schema {schema_id}", lambda client: client.get_schema(schema_id))
            found = self._known[schema_id] = await self._whole(schema_id, schema)
        except UnknownSchemaError:
            self._remember_missing(schema_id)
            raise
        return found

    async def _settled(self, subject: str, kind: str, text: str, how: Register) -> Registered:
        what = f"subject {subject}"
        if how == "latest":
            latest = await self._ask(what, lambda client: client.get_latest_version(subject))
            return await self._whole(int(latest.schema_id or 0), latest.schema)
        schema = _schema(text, kind)
        if how == "lookup":
            found = await self._ask(what, lambda client: client.lookup_schema(subject, schema))
            return Registered(int(found.schema_id or 0), kind, text)
        return Registered(await self._ask(what, lambda client: client.register_schema(subject, schema)), kind, text)

    async def _whole(self, schema_id: int, schema: "Schema") -> Registered:
        references: dict[tuple[str, int], str] = {}
        await self._follow(schema, references, 0)
        return Registered(schema_id, schema.schema_type or "AVRO", schema.schema_str or "", tuple(references.values()))

    async def _follow(self, schema: "Schema", found: dict[tuple[str, int], str], depth: int) -> None:
        """Fetch what a schema refers to, depth first."""
        if depth > _MAX_DEPTH:
            raise UnknownSchemaError(f"{self.url}: its schemas refer to each other more than {_MAX_DEPTH} deep")
        for reference in schema.references or ():
            subject, version = str(reference.subject), int(reference.version or 0)
            if (subject, version) in found:
                continue
            what = f"subject {subject}, version {version}"
            below = await self._ask(what, partial(_version, subject, version))
            await self._follow(below.schema, found, depth + 1)
            found[subject, version] = below.schema.schema_str or ""

    async def _ask(self, what: str, question: "Callable[[AsyncSchemaRegistryClient], Awaitable[T]]") -> T:
        from confluent_kafka.schema_registry import SchemaRegistryError as Answer

        try:
            if self._client is None:
                self._client = self._connected()
            return await question(self._client)
        except Answer as error:
            raise self._answered(what, error.http_status_code, error.error_message) from None
        except SchemaRegistryError:
            raise
        except Exception as error:
            # The client lets through what its HTTP library, its JSON and its TLS raise.
            said = " ".join(str(error).split()) or type(error).__name__
            raise SchemaRegistryError(f"{what}: the schema registry {self.url} can't be reached: {said}") from error

    def _answered(self, what: str, status: int, said: object) -> SchemaRegistryError:
        kind: type[SchemaRegistryError] = SchemaRegistryError
        if status in _ABSENT:
            kind = UnknownSchemaError
        elif status in _REFUSED:
            kind = IncompatibleSchemaError
        elif status in _FORBIDDEN:
            kind = SchemaRegistryAuthorizationError
        text = " ".join(str(said or "").split()) or "no reason"
        return kind(f"{what}: the schema registry {self.url} answered {status}: {text}")

    def _remember_missing(self, schema_id: int) -> None:
        # Records of one bad producer come in thousands; the registry need not hear of each.
        if len(self._missing) >= _MAX_MISSING:
            self._missing.clear()
        self._missing[schema_id] = time.monotonic() + _FORGET_SECONDS

    def _connected(self) -> "AsyncSchemaRegistryClient":
        from confluent_kafka.schema_registry import AsyncSchemaRegistryClient

        settings = self._settings
        given = {
            "url": settings.url,
            "ssl.ca.location": settings.cafile,
            "ssl.certificate.location": settings.certfile,
            "ssl.key.location": settings.keyfile,
            "ssl.key.password": settings.key_password.get_secret_value() if settings.key_password else None,
            "timeout": settings.timeout,
            "max.retries": _TRIES,
            "retries.wait.ms": _RETRY_MS,
            "retries.max.wait.ms": _MAX_RETRY_MS,
        }
        if settings.username is not None and settings.password is not None:
            given["basic.auth.user.info"] = f"{settings.username}:{settings.password.get_secret_value()}"
        if settings.token is not None:
            given |= {
                "bearer.auth.credentials.source": "STATIC_TOKEN",
                "bearer.auth.token": settings.token.get_secret_value(),
                "bearer.auth.logical.cluster": settings.cluster or "",
            }
        return AsyncSchemaRegistryClient({name: value for name, value in given.items() if value is not None})


def framed_id(data: bytes, topic: str) -> bytes:
    """Give the four bytes of the schema's id that a value begins with. Raises InvalidArgumentError."""
    if len(data) < FRAME_BYTES or data[:1] != MAGIC:
        start = data[:FRAME_BYTES].hex(" ") or "nothing"
        raise InvalidArgumentError(
            f"{topic}: the value has no schema id of a registry: it begins with {start}, not with a byte 00 and an id"
        )
    return data[1:FRAME_BYTES]


def frame(schema_id: int) -> bytes:
    """Give what a value of a schema begins with."""
    return MAGIC + schema_id.to_bytes(4, "big")


def subject_of(naming: Naming, topic: str, part: str, record: str | None) -> str:
    """Name the subject of a topic's value or key, as Confluent's strategies of these names do."""
    match naming:
        case "topic":
            return f"{topic}-{part}"
        case "record":
            return str(record)
        case "topic-record":
            return f"{topic}-{record}"


def _version(subject: str, version: int, client: "AsyncSchemaRegistryClient") -> "Awaitable[RegisteredSchema]":
    return client.get_version(subject, version)


def _schema(text: str, kind: str) -> "Schema":
    from confluent_kafka.schema_registry import Schema

    return Schema(text, kind)
