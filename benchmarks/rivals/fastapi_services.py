"""The HTTP way of composing services, as Truss Chains does it: FastAPI, pydantic bodies, aiohttp between them.

    python -m benchmarks.rivals.fastapi_services [--next URL]

A service hands a text on to the next one, or gives it back if it is the last. One `ClientSession` for all calls, with
as many connections as are needed. A stream of the next service is passed on in raw chunks, as they arrive.
"""

import argparse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from benchmarks.rivals import serving, tokens


class Text(BaseModel):
    text: str


class Count(BaseModel):
    count: int


def service(following: str | None) -> FastAPI:
    """Build a service that stands before the one with that URL, or last."""
    session: aiohttp.ClientSession

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        nonlocal session
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            yield

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.post("/run_remote")
    async def run_remote(body: Text) -> Text:
        if following is None:
            return body
        async with session.post(
            f"{following}/run_remote",
            data=body.model_dump_json().encode(),
            headers={"content-type": "application/json"},
        ) as answer:
            answer.raise_for_status()
            return Text.model_validate_json(await answer.read())

    @app.post("/stream")
    async def stream(body: Count) -> StreamingResponse:
        return StreamingResponse(pieces(body), media_type="text/event-stream")

    async def pieces(body: Count) -> AsyncIterator[bytes]:
        if following is None:
            for piece in tokens.events(body.count):
                yield piece
            return
        async with session.post(f"{following}/stream", json=body.model_dump()) as answer:
            answer.raise_for_status()
            async for piece in answer.content.iter_any():
                yield piece

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--next", help="URL of the service to call")
    serving.serve(service(parser.parse_args().next))


if __name__ == "__main__":
    main()
