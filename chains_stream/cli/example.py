"""Arguments to try a Chain with: small, and valid wherever that can be had."""

import math
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from chains_stream.codec import Codec
from chains_stream.errors import InvalidArgumentError

_DEEP = 8  # levels; below, what may be empty is: a type that refers to itself ends here
_FORMATS = {
    "date": "2026-01-31",
    "date-time": "2026-01-31T12:00:00Z",
    "time": "12:00:00Z",
    "duration": "PT1H",
    "uuid": "123e4567-e89b-42d3-a456-426614174000",
    "decimal": "1.5",
    "email": "ada@example.org",
    "uri": "https://example.org",
    "ipv4": "127.0.0.1",
}
_BASE64 = "SGVsbG8="
_STEP = re.compile(r"\.(\w+)|\[(\d+)\]")
_TEXTS = ("2026-01-31T12:00:00Z", "2026-01-31T12:00:00", "12:00:00Z", "12:00:00")  # a schema need not tell these apart

Schema = Mapping[str, Any]


def example_arguments(codec: Codec) -> tuple[bytes, bool]:
    """Make arguments as a JSON object, and tell whether they are valid: patterns can't be made up."""
    schema = codec.schema()
    made = example(schema["arguments"], schema["$defs"])
    for _ in range(len(_TEXTS) * _DEEP):
        json = msgspec.json.encode(made)
        try:
            codec.arguments_from_json(json)
        except InvalidArgumentError as error:
            if not _mend(made, error.path or ""):
                return json, False
        else:
            return json, True
    return json, False


def _mend(value: Any, path: str) -> bool:
    """Try the next kind of text at the path, ``$.items[0].at`` say; False if there is none."""
    steps = [name or int(index) for name, index in _STEP.findall(path)]
    try:
        for step in steps[:-1]:
            value = value[step]
        found = value[steps[-1]]
        value[steps[-1]] = _TEXTS[_TEXTS.index(found) + 1 if found in _TEXTS else 0]
    except (IndexError, KeyError, TypeError):
        return False
    return isinstance(found, str)


def example(schema: Schema, definitions: Mapping[str, Schema]) -> Any:
    """Make a value of `schema`: its own example or default where it has one, else a small value.

    Objects have their required properties alone. `definitions` are what ``$ref`` refers to, by their last part.
    Patterns are not looked at.
    """
    return _Maker(definitions).value(schema, "", 0)


class _Maker:
    def __init__(self, definitions: Mapping[str, Schema]) -> None:
        self._definitions = definitions

    def value(self, schema: Schema, name: str, depth: int) -> Any:
        """Make a value for the property called `name`."""
        plain = self._plain(schema)
        given = [*plain.get("examples", ()), *plain.get("enum", ())]
        given += [plain[key] for key in ("example", "const", "default") if key in plain]
        if given:
            return given[0]
        match plain.get("type", "object" if "properties" in plain else None):
            case "object":
                return self._object(plain, depth)
            case "array":
                return self._array(plain, name, depth)
            case "string":
                return _text(plain, name)
            case "integer" | "number":
                return _number(plain)
            case kind:
                return False if kind == "boolean" else None

    def _plain(self, schema: Schema) -> Schema:
        """Follow references, and choose among alternatives, until a schema says of itself what it is."""
        if "$ref" in schema:
            return self._plain(self._definitions[schema["$ref"].rpartition("/")[2]])
        choices = [choice for choice in schema.get("anyOf", schema.get("oneOf", ())) if choice.get("type") != "null"]
        if choices and "default" not in schema:
            return self._plain(choices[0])
        if "allOf" in schema:
            return {key: value for part in schema["allOf"] for key, value in self._plain(part).items()}
        return schema

    def _object(self, schema: Schema, depth: int) -> dict[str, Any]:
        properties = schema.get("properties", {})
        return {name: self.value(properties.get(name, {}), name, depth + 1) for name in schema.get("required", ())}

    def _array(self, schema: Schema, name: str, depth: int) -> list[Any]:
        if "prefixItems" in schema:
            return [self.value(item, name, depth + 1) for item in schema["prefixItems"]]
        least = schema.get("minItems", 0)
        # One item says more than none does, where there may be one.
        count = least if depth > _DEEP else min(max(1, least), schema.get("maxItems", math.inf))
        return [self.value(schema.get("items", {}), name, depth + 1) for _ in range(count)]


def _text(schema: Schema, name: str) -> str:
    if "contentEncoding" in schema:
        return _BASE64
    found = _FORMATS.get(schema.get("format", ""))
    if found is not None:
        return found
    text = "Ada" if re.search("name", name, re.IGNORECASE) else "Hello, world."
    return text.ljust(schema.get("minLength", 0), ".")[: schema.get("maxLength")]


def _number(schema: Schema) -> int | float:
    whole = schema["type"] == "integer"
    step: int | float = schema.get("multipleOf", 1)
    low, above = schema.get("minimum", -math.inf), schema.get("exclusiveMinimum", -math.inf)
    high, below = schema.get("maximum", math.inf), schema.get("exclusiveMaximum", math.inf)
    ends = [end for end in (low, above, high, below) if math.isfinite(end)]
    near = [base + distance for end in ends for base in (end, end // step * step) for distance in (0, step, -step)]
    for value in (step, 0, *near, sum(ends) / max(1, len(ends))):
        divisible = value % step == 0 or not (whole or "multipleOf" in schema)
        if low <= value <= high and above < value < below and divisible:
            return int(value) if whole else float(value)
    return step
