"""A bare ASGI app that streams tokens from memory: what serving them over HTTP costs, with nothing behind it.

    python -m benchmarks.rivals.asgi

One ASGI message for each token, as they would come from an engine; their bytes are made before.
"""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from benchmarks.rivals import serving, tokens

Message = MutableMapping[str, Any]

START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")],
}


async def app(
    scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
) -> None:
    assert scope["type"] == "http", scope
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    await send(START)
    for piece in tokens.events(json.loads(body)["count"]):
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def main() -> None:
    serving.serve(_without_lifespan)


async def _without_lifespan(scope: Message, receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        await app(scope, receive, send)


if __name__ == "__main__":
    main()
