"""A bare ASGI app that streams tokens from memory: what serving them over HTTP costs, with nothing behind it.

    python -m benchmarks.rivals.asgi

One ASGI message for each token, as they would come from an engine; their bytes are made before.
"""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from benchmarks.rivals import serving, tokens

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")],
}


async def body_of(receive: Receive) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


async def app(scope: Message, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
        return  # no lifespan
    count = json.loads(await body_of(receive))["count"]
    await send(START)
    for piece in tokens.events(count):
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def main() -> None:
    serving.serve(app)


if __name__ == "__main__":
    main()
