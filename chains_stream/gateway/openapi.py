"""The OpenAPI 3.1 document of a Chain: its own types, all that may be answered, and the problem details."""

import inspect
from typing import Any

import msgspec

from chains_stream.chain import Chain
from chains_stream.codec import Codec
from chains_stream.gateway import problems
from chains_stream.gateway.exchange import AFFINITY_HEADER, MAX_AFFINITY, TIMEOUT_HEADER
from chains_stream.gateway.problems import Problem
from chains_stream.gateway.streaming import EVENTS, LINES, OCTETS, TEXT, media_types
from chains_stream.settings import Settings

_PREFIX = "chains."  # of our schemas' names: no class of a user's has a name with a dot
_REFERENCE = f"#/components/schemas/{_PREFIX}"
_JSON = "application/json"

_FAILURES = {
    400: "The arguments, or a header, are wrong; `path` names the wrong field.",
    406: "`accept` allows none of the media types that can be had; `offered` lists them.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "Too many requests, or bytes of them, are under way: see `detail`. Try again after `retry-after` seconds.",
    499: "The request was cancelled.",
    500: "The Chain failed; `error` has the exception and its way through the Chainlets.",
    502: "The stream broke off below.",
    503: "A worker or the broker is away; try again after `retry-after` seconds.",
    504: "The deadline of the request passed.",
}
_RETRY = (429, 503)
_HEADERS = {"x-request-id": {"$ref": "#/components/headers/request-id"}}

Json = dict[str, Any]


def document(chain: Chain, codec: Codec, settings: Settings) -> Json:
    """Describe the gateway of a Chain. Raises ChainsUsageError for a type without a form in JSON."""
    websocket = codec.signature.websocket
    schema = {"$defs": {}} if websocket else codec.schema()
    _, ours = msgspec.json.schema_components((Problem,), ref_template=f"{_REFERENCE}{{name}}")
    return {
        "openapi": "3.1.0",
        "info": {
            "title": chain.name,
            "version": codec.signature.digest,
            "description": inspect.getdoc(chain.entrypoint) or f"The Chain {chain.name}.",
        },
        "paths": {
            **(
                {"/websocket": {"get": _websocket(codec, settings)}}
                if websocket
                else {"/run_remote": {"post": _run_remote(codec, schema, settings)}}
            ),
            "/healthz": {"get": _health()},
            "/readyz": {"get": _ready()},
            "/metrics": {"get": _metrics()},
        },
        "components": {
            "schemas": schema["$defs"] | {f"{_PREFIX}{name}": found for name, found in ours.items()},
            "headers": {
                "request-id": {
                    "description": "The id of the request, in the logs and for the other routes.",
                    "schema": {"type": "string"},
                },
                "retry-after": {"description": "Seconds to wait.", "schema": {"type": "integer", "minimum": 1}},
            },
        },
    }


def _run_remote(codec: Codec, schema: Json, settings: Settings) -> Json:
    arguments = schema["arguments"]
    failures = {str(status): _failure(status, text) for status, text in _FAILURES.items()}
    return {
        "operationId": "run_remote",
        "summary": f"Run {codec.signature.chainlet}",
        "parameters": _parameters(settings.deadline),
        "requestBody": {"required": bool(arguments.get("required")), "content": {_JSON: {"schema": arguments}}},
        "responses": {"200": _success(codec, schema["result"])}
        | failures
        | {"default": _failure(0, "Another failure.")},
    }


def _websocket(codec: Codec, settings: Settings) -> Json:
    described = {429, 499, 500, 503, 504}
    failures = {str(status): _failure(status, text) for status, text in _FAILURES.items() if status in described}
    return {
        "operationId": "websocket",
        "summary": f"Talk to {codec.signature.chainlet} through a WebSocket (RFC 6455)",
        "parameters": _parameters(settings.websocket_deadline),
        "responses": {
            "101": {"description": "The WebSocket is open: a worker has begun.", "headers": _HEADERS},
            "400": _failure(400, "The handshake, or a header, is wrong."),
            "426": _failure(426, "This is no handshake of a WebSocket."),
        }
        | failures
        | {"default": _failure(0, "Another failure.")},
    }


def _parameters(deadline: float) -> list[Json]:
    return [
        {
            "name": TIMEOUT_HEADER,
            "in": "header",
            "description": f"Seconds that the request may take; at most, and if not given, {deadline:g}.",
            "schema": {"type": "number", "exclusiveMinimum": 0},
        },
        {
            "name": AFFINITY_HEADER,
            "in": "header",
            "description": "Text, the id of a conversation say: requests "
            "with the same one go to the same worker, for as long as it is there.",
            "schema": {"type": "string", "minLength": 1, "maxLength": MAX_AFFINITY},
        },
    ]


def _success(codec: Codec, result: Json) -> Json:
    if not codec.signature.streaming:
        return _answer("The result.", {_JSON: {"schema": result}})
    described = {
        TEXT: "The chunks as they are, in UTF-8. A stream that fails half-way breaks the connection.",
        OCTETS: "The chunks as they are. A stream that fails half-way breaks the connection.",
        EVENTS: "Server-sent events: chunks as JSON with their sequence number as `id`; "
        "a last event `done`, or `error` with the problem.",
        LINES: 'One chunk as JSON a line; a failure is a last line `{"error": …}`.',
    }
    content = {
        # OpenAPI 3.1 has no words for the items of a stream.
        kind: {"schema": {"type": "string", "description": described[kind]}, "x-chunk-schema": result}
        for kind in media_types(codec)
    }
    text = f"The stream, in the form that `accept` asks for; {media_types(codec)[0]} unless it names another."
    return _answer(text, content)


def _health() -> Json:
    described = _probe("healthz", "Whether this process lives", "It does.")
    fields = {"status": {"const": "unhealthy"}, "reason": {"type": "string"}}
    schema = {"type": "object", "properties": fields, "required": list(fields)}
    described["responses"]["503"] = _answer(
        "It has to be started anew; `reason` says why.", {_JSON: {"schema": schema}}
    )
    return described


def _metrics() -> Json:
    answer = _answer("Metrics in the text format of Prometheus.", {"text/plain": {"schema": {"type": "string"}}})
    return {"operationId": "metrics", "summary": "What this process counts", "responses": {"200": answer}}


def _ready() -> Json:
    described = _probe("readyz", "Whether requests can be served", "They can.")
    described["responses"]["503"] = _failure(503, "Not now; `missing` says what is.")
    return described


def _probe(name: str, summary: str, text: str) -> Json:
    status = {"type": "object", "properties": {"status": {"const": "ok"}}, "required": ["status"]}
    answer = _answer(text, {_JSON: {"schema": status}})
    return {"operationId": name, "summary": summary, "responses": {"200": answer}}


def _failure(status: int, text: str) -> Json:
    content = {problems.MEDIA_TYPE: {"schema": {"$ref": f"{_REFERENCE}{Problem.__name__}"}}}
    answer = _answer(text, content)
    if status in _RETRY:
        answer["headers"]["retry-after"] = {"$ref": "#/components/headers/retry-after"}
    return answer


def _answer(text: str, content: Json) -> Json:
    return {"description": text, "headers": dict(_HEADERS), "content": content}
