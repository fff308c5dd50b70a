"""What a format is: it makes readers and writers, each once for a type."""

from collections.abc import Awaitable, Mapping
from types import MappingProxyType
from typing import Any, Literal, Protocol

from chains_stream import codec
from chains_stream.errors import ChainsUsageError, InvalidArgumentError, InvalidResultError
from chains_stream.formats.registry import Registry
from chains_stream.messages import Headers

Part = Literal["value", "key"]  # of a record
_LONGEST = 500  # characters of a message
NO_HEADERS: Mapping[str, bytes] = MappingProxyType({})


class Reader(Protocol):
    """Reads the bytes of records into values of one type.

    Attributes:
        needs_headers: whether `read` looks at a record's headers, or puts some there; else they may be left out.
        needs_registry: whether `missing` may ever give something.
    """

    needs_headers: bool
    needs_registry: bool = False

    def missing(self, data: bytes) -> Awaitable[None] | None:
        """Give what must be awaited before `read` can read this: nothing, but for a schema that was never seen.

        It raises SchemaRegistryError: an UnknownSchemaError is the record's fault, any other the registry's.
        """

    def read(self, data: bytes, headers: dict[str, bytes], topic: str) -> Any:
        """Read and validate a value. Headers that the value itself holds are put into `headers`.

        Raises InvalidArgumentError, whose `path` names the field at fault where there is one.
        """


class Writer(Protocol):
    """Writes values of one type as bytes.

    Attributes:
        needs_registry: whether `missing` may ever give something.
    """

    needs_registry: bool = False

    def missing(self, topic: str) -> Awaitable[None] | None:
        """Give what must be awaited before `write` can write to a topic: nothing, but where a registry must be asked.

        It raises SchemaRegistryError: IncompatibleSchemaError if the registry won't have the type's schema.
        """

    def write(self, value: Any, topic: str, headers: Mapping[str, bytes] = NO_HEADERS) -> tuple[bytes, Headers]:
        """Give a record's value and its headers: those given, and the format's own. Raises InvalidResultError."""


class Format(Protocol):
    """How values lie in records. An object of one is what `Source` and `Sink` are given.

    Attributes:
        name: as users write it.
        content_type: the media type of a value.
    """

    @property
    def name(self) -> str: ...

    @property
    def content_type(self) -> str: ...

    def reader(self, kind: Any, registry: Registry, part: Part = "value") -> Reader:
        """Make a reader for a type. Raises ChainsUsageError for one that the format can't hold."""

    def writer(self, kind: Any, registry: Registry, part: Part = "value") -> Writer:
        """Make a writer for a type. Raises ChainsUsageError for one that the format can't hold."""


def unfit(name: str, kind: Any, why: object) -> ChainsUsageError:
    """Say that a format can't hold a type."""
    return ChainsUsageError(f"the format `{name}` can't hold `{shown(kind)}`: {one_line(why)}")


def unreadable(topic: str, error: Exception) -> InvalidArgumentError:
    """Say what is wrong with a record's bytes."""
    text, path = codec.explain(error)
    return InvalidArgumentError(f"{topic}: {one_line(text)}", path=path)


def unwritable(topic: str, error: Exception) -> InvalidResultError:
    """Say what is wrong with a value that is to be written."""
    return InvalidResultError(f"{topic}: {one_line(codec.explain(error)[0])}")


def one_line(said: object) -> str:
    """Give what a library said as one line that is not too long: it may show a whole value."""
    text = " ".join(str(said).split()) or type(said).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def shown(kind: Any) -> str:
    """Give a type's name for a message."""
    return getattr(kind, "__qualname__", None) or str(kind)
