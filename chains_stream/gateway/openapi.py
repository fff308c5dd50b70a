"""The OpenAPI 3.1 document of a Chain: its own types, all that may be answered, and the problem details."""

import inspect

import msgspec

from chains_stream.chain import Chain
from chains_stream.chainlet import ChainletBase
from chains_stream.codec import Codec
from chains_stream.gateway import openai_paths
from chains_stream.gateway.gate import OPEN
from chains_stream.gateway.openapi_async import SCHEMAS, async_paths, request_parameters
from chains_stream.gateway.openapi_parts import (
    HEADERS,
    JSON,
    PREFIX,
    REFERENCE,
    Json,
    answer,
    failure,
    failures,
    stream_of,
)
from chains_stream.gateway.openapi_websocket import websocket_paths
from chains_stream.gateway.problems import Problem
from chains_stream.gateway.streaming import EVENTS, LINES, OCTETS, TEXT, media_types
from chains_stream.settings import Settings

_PREFER = {
    "name": "prefer",
    "in": "header",
    "description": "`resume=<seconds>`: the request goes on for so long after its client has left.",
    "schema": {"type": "string"},
}
_FAILURES = {
    400: "The arguments, or a header, are wrong; `path` names the wrong field.",
    406: "`accept` allows none of the media types that can be had; `offered` lists them.",
    408: "The body did not arrive in time.",
    409: "The request with this idempotency key is still under way.",
    410: "The answer to the request with this idempotency key is not kept any more.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    422: "The idempotency key was used before, for another body.",
    429: "Too many requests, or bytes of them, are under way, or came: see `detail`. Try again after `retry-after` "
    "seconds.",
    499: "The request was cancelled.",
    500: "The Chain failed; `error` has the exception and its way through the Chainlets.",
    502: "The stream broke off below.",
    503: "A worker or the broker is away; try again after `retry-after` seconds.",
    504: "The deadline of the request passed.",
}
_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}


def document(chain: Chain, codec: Codec, settings: Settings) -> Json:
    """Describe the gateway of a Chain. Raises ChainsUsageError for a type without a form in JSON."""
    websocket = codec.signature.websocket
    schema = {"$defs": {}} if websocket else codec.schema()
    _, ours = msgspec.json.schema_components((Problem, *SCHEMAS), ref_template=f"{REFERENCE}{{name}}")
    described: Json = {
        "openapi": "3.1.0",
        "info": {
            "title": chain.name,
            "version": codec.signature.digest,
            "description": _said_of(chain) or f"The Chain {chain.name}.",
        },
        "paths": {
            **(websocket_paths(codec, settings) if websocket else _call_paths(codec, schema, settings)),
            "/healthz": {"get": _health()},
            "/readyz": {"get": _ready()},
            "/metrics": {"get": _metrics()},
        },
        "components": {
            "schemas": schema["$defs"] | {f"{PREFIX}{name}": found for name, found in ours.items()},
            "headers": HEADERS,
        },
    }
    described = openai_paths.added(described, chain, settings)
    if settings.api_keys is not None:
        _ask_for_keys(described)
    return described


def _said_of(chain: Chain) -> str:
    """Give what its author says of the entrypoint: what the base of all Chainlets says of itself is none of that."""
    said = inspect.getdoc(chain.entrypoint) or ""
    return "" if said == inspect.getdoc(ChainletBase) else said


def _call_paths(codec: Codec, schema: Json, settings: Settings) -> Json:
    return {
        "/run_remote": {"post": _run_remote(codec, schema, settings)},
        **async_paths(codec, schema, settings),
    }


def _ask_for_keys(described: Json) -> None:
    """Say that all operations need an API key, but for those of `OPEN` paths."""
    described["components"]["securitySchemes"] = _SCHEMES
    described["security"] = [{name: []} for name in _SCHEMES]
    for path, operations in described["paths"].items():
        for operation in operations.values():
            if path in OPEN:
                operation["security"] = []
            else:
                describe = openai_paths.failure if path in openai_paths.PATHS else failure
                refused = describe(401, "There is no API key, or a wrong one.")
                refused["headers"]["www-authenticate"] = {"schema": {"const": "Bearer"}}
                operation["responses"]["401"] = refused


def _run_remote(codec: Codec, schema: Json, settings: Settings) -> Json:
    arguments = schema["arguments"]
    return {
        "operationId": "run_remote",
        "summary": f"Run {codec.signature.chainlet}",
        "parameters": [*request_parameters(settings), _PREFER],
        "requestBody": {"required": bool(arguments.get("required")), "content": {JSON: {"schema": arguments}}},
        "responses": {"200": _success(codec, schema["result"])} | failures(_FAILURES),
    }


def _success(codec: Codec, result: Json) -> Json:
    if not codec.signature.streaming:
        return answer("The result.", {JSON: {"schema": result}})
    described = {
        TEXT: "The chunks as they are, in UTF-8. A stream that fails half-way breaks the connection.",
        OCTETS: "The chunks as they are. A stream that fails half-way breaks the connection.",
        EVENTS: "Server-sent events: chunks as JSON with their sequence number as `id`; "
        "a last event `done`, or `error` with the problem.",
        LINES: 'One chunk as JSON a line; a failure is a last line `{"error": …}`.',
    }
    content = {kind: stream_of(kind, result, described[kind]) for kind in media_types(codec)}
    text = f"The stream, in the form that `accept` asks for; {media_types(codec)[0]} unless it names another."
    return answer(text, content)


def _health() -> Json:
    described = _probe("healthz", "Whether this process lives", "It does.")
    fields = {"status": {"const": "unhealthy"}, "reason": {"type": "string"}}
    schema = {"type": "object", "properties": fields, "required": list(fields)}
    described["responses"]["503"] = answer("It has to be started anew; `reason` says why.", {JSON: {"schema": schema}})
    return described


def _metrics() -> Json:
    text = answer("Metrics in the text format of Prometheus.", {"text/plain": {"schema": {"type": "string"}}})
    return {"operationId": "metrics", "summary": "What this process counts", "responses": {"200": text}}


def _ready() -> Json:
    described = _probe("readyz", "Whether requests can be served", "They can.")
    described["responses"]["503"] = failure(503, "Not now; `missing` says what is.")
    return described


def _probe(name: str, summary: str, text: str) -> Json:
    status = {"type": "object", "properties": {"status": {"const": "ok"}}, "required": ["status"]}
    well = answer(text, {JSON: {"schema": status}})
    return {"operationId": name, "summary": summary, "responses": {"200": well}}
