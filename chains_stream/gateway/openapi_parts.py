"""What the parts of an OpenAPI document have in common: failures, answers, their headers."""

from typing import Any

from chains_stream.gateway import problems
from chains_stream.gateway.problems import Problem
from chains_stream.gateway.streaming import EVENTS

PREFIX = "chains."  # of our schemas' names: no class of a user's has a name with a dot
REFERENCE = f"#/components/schemas/{PREFIX}"
JSON = "application/json"
RETRY = (429, 503)
HEADERS = {
    "request-id": {
        "description": "The id of the request, in the logs and for the other routes.",
        "schema": {"type": "string"},
    },
    "retry-after": {"description": "Seconds to wait.", "schema": {"type": "integer", "minimum": 1}},
}

Json = dict[str, Any]


def failure(status: int, text: str) -> Json:
    """Describe an answer with a problem."""
    content = {problems.MEDIA_TYPE: {"schema": {"$ref": f"{REFERENCE}{Problem.__name__}"}}}
    described = answer(text, content)
    if status in RETRY:
        described["headers"]["retry-after"] = {"$ref": "#/components/headers/retry-after"}
    return described


def answer(text: str, content: Json) -> Json:
    """Describe an answer."""
    headers = {"x-request-id": {"$ref": "#/components/headers/request-id"}}
    return {"description": text, "headers": headers, "content": content}


def failures(texts: dict[int, str], *statuses: int) -> Json:
    """Describe those of the failures that a route may answer with, and any other."""
    chosen = {str(status): failure(status, texts[status]) for status in statuses or texts}
    return chosen | {"default": failure(0, "Another failure.")}


def stream_of(media_type: str, chunk: Json, text: str) -> Json:
    """Describe a stream, for whose items OpenAPI 3.1 has no words; events are no text to those who read them."""
    kind = {} if media_type == EVENTS else {"type": "string"}
    return {"schema": kind | {"description": text}, "x-chunk-schema": chunk}
