"""How the value, and the key, of an ordinary Kafka record is read into a typed value, and written from one.

A format is declared by its name, or as an object where it has options: ``format="avro"``, ``Avro(register="latest")``.
It makes a `Reader` or a `Writer` once for each type.
"""

from chains_stream.errors import ChainsUsageError
from chains_stream.formats.avro import Avro
from chains_stream.formats.cloudevents import CloudEvents
from chains_stream.formats.format import Format, Part, Reader, Writer
from chains_stream.formats.json_schema import JsonSchema
from chains_stream.formats.keys import keying
from chains_stream.formats.plain import Bytes, Json, Msgpack, Text
from chains_stream.formats.registry import Registry

__all__ = [
    "NAMES",
    "Avro",
    "Bytes",
    "CloudEvents",
    "Format",
    "Json",
    "JsonSchema",
    "Msgpack",
    "Part",
    "Reader",
    "Registry",
    "Text",
    "Writer",
    "keying",
    "named",
]

NAMES: dict[str, Format] = {
    each.name: each for each in (Json(), Msgpack(), Text(), Bytes(), Avro(), JsonSchema(), CloudEvents())
}


def named(given: str | Format) -> Format:
    """Give the format of a name, as it is without options; an object is given back. Raises ChainsUsageError."""
    if not isinstance(given, str):
        return given
    if given not in NAMES:
        raise ChainsUsageError(f"there is no format `{given}`: use one of {', '.join(NAMES)}")
    return NAMES[given]
