"""The route of a Chain that takes a WebSocket in the OpenAPI document."""

from chains_stream.codec import Codec
from chains_stream.gateway.exchange import AFFINITY_HEADER, TIMEOUT_HEADER
from chains_stream.gateway.openapi_async import request_parameters
from chains_stream.gateway.openapi_parts import HEADERS, Json, failures
from chains_stream.settings import Settings

_FAILURES = {
    400: "The handshake, or a header, is wrong.",
    403: "Pages of this origin may not call.",
    426: "This is no handshake of a WebSocket.",
    429: "Too many requests are under way, or came: see `detail`. Try again after `retry-after` seconds.",
    499: "The request was cancelled.",
    500: "The Chain failed before the WebSocket was open.",
    503: "A worker or the broker is away; try again after `retry-after` seconds.",
    504: "The deadline passed before a worker had begun.",
}


def websocket_paths(codec: Codec, settings: Settings) -> Json:
    """Describe the route. What goes through a WebSocket OpenAPI has no words for."""
    known = request_parameters(settings.model_copy(update={"deadline": settings.websocket_deadline}))
    operation = {
        "operationId": "websocket",
        "summary": f"Talk to {codec.signature.chainlet} through a WebSocket (RFC 6455)",
        "parameters": [each for each in known if each["name"] in (TIMEOUT_HEADER, AFFINITY_HEADER)],
        "responses": {
            "101": {
                "description": "The WebSocket is open: a worker has begun.",
                "headers": {"x-request-id": HEADERS["request-id"]},
            },
            **failures(_FAILURES),
        },
    }
    return {"/websocket": {"get": operation}}
