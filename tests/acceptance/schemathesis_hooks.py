"""What schemathesis can't know of a request that fits the document; loaded by its command (SCHEMATHESIS_HOOKS)."""

from typing import Any
from uuid import uuid4

import schemathesis

MAX_KEY = 255  # bytes of an idempotency key
MAX_DIMENSIONS = 4096  # of a vector that the example makes
SHORT = 2.0  # seconds
WEBHOOK = "https://hooks.invalid/"  # a name that nobody has
UNKNOWN = "x-schemathesis-unknown-property"


@schemathesis.hook
def filter_case(context: schemathesis.HookContext, case: schemathesis.Case[Any]) -> bool:
    """Leave out cases that it holds for wrong as they have one header more: HTTP allows any."""
    return UNKNOWN not in (case.headers or {})


@schemathesis.hook
def map_body(context: schemathesis.HookContext, body: Any) -> Any:
    """Write whole numbers as such, of 64 bits: JSON Schema has no bound, and takes 1.0. Have no stranger called."""
    body = _whole(body)
    if isinstance(body, dict) and isinstance(body.get("webhook_endpoint"), str) and body["webhook_endpoint"]:
        body["webhook_endpoint"] = WEBHOOK
    if isinstance(body, dict) and isinstance(body.get("dimensions"), int) and body["dimensions"] > MAX_DIMENSIONS:
        body["dimensions"] = MAX_DIMENSIONS
    return body


@schemathesis.hook
def before_call(context: schemathesis.HookContext, case: schemathesis.Case[Any], kwargs: dict[str, Any]) -> None:
    """Use no idempotency key twice, which is 422; and leave a request the time that it takes, or else it is 504."""
    headers = case.headers
    key = headers.get("idempotency-key")
    if isinstance(key, str) and 0 < len(key) <= MAX_KEY:
        headers["idempotency-key"] = uuid4().hex
    try:
        seconds = float(headers.get("x-request-timeout", SHORT))
    except (TypeError, ValueError):
        return
    if 0 < seconds < SHORT:
        headers["x-request-timeout"] = str(SHORT)


def _whole(value: Any) -> Any:
    match value:
        case float() if value.is_integer():
            return _whole(int(value))
        case int() if not isinstance(value, bool):
            return max(-(2**63), min(value, 2**64 - 1))
        case list():
            return [_whole(item) for item in value]
        case dict():
            return {name: _whole(item) for name, item in value.items()}
        case _:
            return value
