"""The JSON Schema of what a Chainlet takes and gives, for OpenAPI 3.1."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import pydantic

from chains_stream import foreign

_TEMPLATE = "#/components/schemas/{name}"
_DRAFT_7 = "http://json-schema.org/draft-07/schema#"


def of(arguments: Any, result: Any) -> dict[str, Any]:
    """Describe the Struct of a call's arguments, and its result: ``{"arguments": …, "result": …, "$defs": …}``.

    ``$defs`` holds the classes that the two refer to, as an OpenAPI document's ``components/schemas``. Raises TypeError
    for a type that has no form in JSON.
    """
    models = _models(arguments, result)
    for suffix in ("", ".model"):  # a model that shares its name with a class of another kind steps aside
        references, definitions = _model_schemas(models, suffix)
        schemas, classes = msgspec.json.schema_components(
            (arguments, result), schema_hook=functools.partial(_refer, references), ref_template=_TEMPLATE
        )
        if not classes.keys() & definitions.keys():
            break
    own = classes.pop(schemas[0]["$ref"].rpartition("/")[2])
    for documentation in ("title", "description"):  # that of a class that we made
        own.pop(documentation, None)
    return {"arguments": own, "result": schemas[1], "$defs": classes | definitions}


def components(taken: Sequence[Any], given: Sequence[Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Describe types together: a schema for each, and the classes that they refer to, as ``components/schemas``.

    `taken` are read, `given` are written. Raises TypeError for a type that has no form in JSON.
    """
    modes = dict.fromkeys(_models_in(given), "serialization") | dict.fromkeys(_models_in(taken), "validation")
    for suffix in ("", ".model"):
        references, definitions = _model_schemas(modes, suffix)
        schemas, classes = msgspec.json.schema_components(
            (*taken, *given), schema_hook=functools.partial(_refer, references), ref_template=_TEMPLATE
        )
        if not classes.keys() & definitions.keys():
            break
    return list(schemas), classes | definitions


def _models_in(kinds: Sequence[Any]) -> list[Any]:
    """Find the pydantic models that types hold."""
    found: list[Any] = []

    def learn(kind: Any) -> dict[str, Any]:
        if foreign.is_model(kind):
            found.append(kind)
        return {"type": "object"}

    msgspec.json.schema_components(tuple(kinds), schema_hook=learn)
    return found


def document(kind: Any) -> dict[str, Any]:
    """Give the JSON Schema of one type as a document by itself, of draft 7: registries know no newer one for sure.

    Raises TypeError for a type with no form in JSON.
    """
    template = "#/definitions/{name}"
    models = _models(kind, kind)
    for suffix in ("", ".model"):
        references, definitions = _model_schemas(models, suffix, template)
        schemas, classes = msgspec.json.schema_components(
            (kind,), schema_hook=functools.partial(_refer, references), ref_template=template
        )
        if not classes.keys() & definitions.keys():
            break
    defined = classes | definitions
    root, name = schemas[0], str(schemas[0].get("$ref", "")).rpartition("/")[2]
    if name in defined and f'"{template.format(name=name)}"'.encode() not in msgspec.json.encode(defined):
        root = defined.pop(name)  # what only the document itself refers to is the document
    whole = {"$schema": _DRAFT_7, **root, **({"definitions": defined} if defined else {})}
    _without_prefixes(whole)
    return whole


def _without_prefixes(schema: Any) -> None:
    """Describe tuples as draft 7 does, in place."""
    if isinstance(schema, dict) and isinstance(schema.get("prefixItems"), list):
        rest = schema.pop("items", True)
        schema["items"] = schema.pop("prefixItems")
        schema["additionalItems"] = rest
    for each in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        _without_prefixes(each)


def _models(arguments: Any, result: Any) -> Mapping[Any, str]:
    """Find the pydantic models, each with pydantic's mode: one that is both taken and given is shown as it is taken."""
    found: dict[Any, str] = {}

    def learn(mode: str, kind: Any) -> dict[str, Any]:
        if foreign.is_model(kind):
            found.setdefault(kind, mode)
        return {"type": "object"}

    for kind, mode in ((arguments, "validation"), (result, "serialization")):
        msgspec.json.schema_components((kind,), schema_hook=functools.partial(learn, mode))
    return found


def _model_schemas(
    models: Mapping[Any, Any], suffix: str, reference: str = _TEMPLATE
) -> tuple[dict[Any, dict[str, Any]], dict[str, Any]]:
    """Give a reference to each model, and what the references refer to."""
    template = reference.replace("{name}", "{model}") + suffix
    found, schemas = pydantic.json_schema.models_json_schema(list(models.items()), ref_template=template)
    definitions = {f"{name}{suffix}": schema for name, schema in schemas.get("$defs", {}).items()}
    return {kind: dict(schema) for (kind, _), schema in found.items()}, definitions


def _refer(references: Mapping[Any, dict[str, Any]], kind: Any) -> dict[str, Any]:
    return references[kind] if foreign.is_model(kind) else foreign.array_schema()
