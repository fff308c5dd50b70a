"""The routes of asynchronous requests in the OpenAPI document."""

from chains_stream.codec import Codec
from chains_stream.gateway.asynchronous import MAX_DIGITS, Accepted, Cancellation, Queue, Report
from chains_stream.gateway.exchange import AFFINITY_HEADER, KEY_HEADER, MAX_AFFINITY, TIMEOUT_HEADER
from chains_stream.gateway.ids import PATTERN
from chains_stream.gateway.openapi_parts import JSON, REFERENCE, Json, answer, failures, stream_of
from chains_stream.gateway.streaming import EVENTS, LINES, media_types
from chains_stream.settings import Settings

SCHEMAS = (Accepted, Report, Cancellation, Queue)

_FAILURES = {
    400: "The request is wrong; `detail` says what.",
    404: "There is no request of this id, or it is not yours.",
    406: "`accept` allows none of the media types that can be had; `offered` lists them.",
    408: "The body did not arrive in time.",
    410: "The answer is not kept any more.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    422: "The idempotency key was used before, for another body.",
    429: "Too many requests, or bytes of them, are under way. Try again after `retry-after` seconds.",
    500: "The gateway failed.",
    503: "The broker is away; try again after `retry-after` seconds.",
    504: "The deadline of the request passed.",
}
_MAKING = (400, 408, 413, 415, 422, 429, 500, 503, 504)
_ASKING = (400, 404, 410, 429, 500, 503, 504)
_ID = {
    "name": "request_id",
    "in": "path",
    "required": True,
    "description": "The `x-request-id` of the answer to the request, synchronous ones included.",
    "schema": {"type": "string", "pattern": f"^{PATTERN.pattern}$"},
}
_TEXT = {"type": "string", "minLength": 1}


def request_parameters(settings: Settings) -> list[Json]:
    """Describe the headers that every request to the Chain may have."""
    return [
        _header(
            TIMEOUT_HEADER,
            f"Seconds that the request may take; at most, and if not given, {settings.deadline:g}.",
            {"type": "number", "minimum": 0.001, "maximum": 999_999_999},
        ),
        _header(
            AFFINITY_HEADER,
            "Text, the id of a conversation say: requests with the same one go to the same worker, "
            "for as long as it is there.",
            {**_TEXT, "maxLength": MAX_AFFINITY},
        ),
        _header(
            KEY_HEADER.decode(),
            "Of the requests with one key one is run; the others get its answer, and 409 until it has one.",
            {**_TEXT, "maxLength": 255},
        ),
    ]


def async_paths(codec: Codec, schema: Json, settings: Settings) -> Json:
    """Describe the routes; `schema` is that of the entrypoint's arguments and result."""
    one = "/async_request/{request_id}"
    return {
        "/async_run_remote": {"post": _submit(codec, schema["arguments"], settings)},
        one: {"get": _ask(schema["result"], streaming=codec.signature.streaming), "delete": _stop()},
        f"{one}/events": {"get": _events(codec, schema["result"])},
        "/async_queue_status": {
            "get": {
                "operationId": "async_queue_status",
                "summary": "How many requests wait, and run",
                "responses": {"200": answer("At this moment, about.", _json(Queue))}
                | failures(_FAILURES, 429, 500, 503, 504),
            }
        },
    }


def _submit(codec: Codec, arguments: Json, settings: Settings) -> Json:
    envelope = {
        "type": "object",
        "required": ["model_input"],
        "additionalProperties": False,
        "properties": {
            "model_input": arguments,
            "webhook_endpoint": {"type": ["string", "null"], "format": "uri", "maxLength": 2048},
            "priority": {"enum": [0, 1, 2], "default": 0, "description": "0 goes before 1 and 2."},
            "max_time_in_queue_seconds": {"type": "integer", "minimum": 1, "maximum": 259200, "default": 600},
            "inference_retry_config": {
                "type": ["object", "null"],
                "additionalProperties": False,
                "properties": {
                    "max_attempts": {"type": "integer", "minimum": 1, "maximum": 10, "default": 3},
                    "initial_delay_ms": {"type": "integer", "minimum": 0, "maximum": 10000, "default": 1000},
                    "max_delay_ms": {"type": "integer", "minimum": 0, "maximum": 60000, "default": 5000},
                },
            },
        },
    }
    accepted = answer("The request is stored, and will be run.", _json(Accepted))
    accepted["headers"] |= {
        "location": {"description": "Where to ask about it.", "schema": {"type": "string"}},
        "retry-after": {"$ref": "#/components/headers/retry-after"},
    }
    return {
        "operationId": "async_run_remote",
        "summary": f"Have {codec.signature.chainlet} run, and do not wait for it",
        "description": "The body is the arguments, or `model_input` with them and how to run it.",
        "parameters": request_parameters(settings),
        "requestBody": {"required": True, "content": {JSON: {"schema": {"anyOf": [envelope, arguments]}}}},
        "responses": {"202": accepted} | failures(_FAILURES, *_MAKING),
    }


def _ask(result: Json, *, streaming: bool) -> Json:
    report = {"$ref": f"{REFERENCE}{Report.__name__}"}
    outcome = {"type": "array", "items": result} if streaming else result
    schema = {"allOf": [report, {"type": "object", "properties": {"result": outcome}}]}
    return {
        "operationId": "get_async_request",
        "summary": "What became of a request",
        "parameters": [
            _ID,
            _header("prefer", "`wait=<seconds>`: answer when it has ended, or then.", {"type": "string"}),
        ],
        "responses": {"200": answer("Its status, and its result or error.", {JSON: {"schema": schema}})}
        | failures(_FAILURES, *_ASKING),
    }


def _stop() -> Json:
    return {
        "operationId": "cancel_async_request",
        "summary": "Cancel a request, waiting or running",
        "parameters": [_ID],
        "responses": {"200": answer("What became of it.", _json(Cancellation))} | failures(_FAILURES, *_ASKING),
    }


def _events(codec: Codec, result: Json) -> Json:
    kinds = media_types(codec) if codec.signature.streaming else [EVENTS, LINES]
    content = {kind: stream_of(kind, result, "The stream.") for kind in kinds}
    number = {"type": "integer", "minimum": 0, "maximum": 10**MAX_DIGITS - 1}
    return {
        "operationId": "get_async_request_events",
        "summary": "The answer to a request as a stream, again and from any point",
        "parameters": [
            _ID,
            {
                "name": "starting_after",
                "in": "query",
                "description": "The number of the last chunk that was read.",
                "schema": number,
            },
            _header(
                "last-event-id",
                "The same, as clients of server-sent events send it.",
                {"type": "string", "pattern": f"^[0-9]{{0,{MAX_DIGITS}}}$"},
            ),
        ],
        "responses": {"200": answer(f"The stream, as {EVENTS} unless `accept` names another.", content)}
        | failures(_FAILURES, *_ASKING, 406),
    }


def _header(name: str, text: str, schema: Json) -> Json:
    return {"name": name, "in": "header", "description": text, "schema": schema}


def _json(kind: type) -> Json:
    return {JSON: {"schema": {"$ref": f"{REFERENCE}{kind.__name__}"}}}
