"""A unary and a streaming entrypoint whose types say much about their values: what a document is to tell clients."""

from collections.abc import AsyncIterator
from datetime import datetime
from typing import Annotated, Literal

import msgspec

import chains_stream as chains

WIDE = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=64))


class Note(msgspec.Struct):
    text: Annotated[str, msgspec.Meta(max_length=50)]
    count: Annotated[int, msgspec.Meta(ge=0, le=5)] = 1
    kind: Literal["plain", "bold"] = "plain"
    tags: list[str] | None = None


class Copy(msgspec.Struct):
    texts: list[str]
    at: datetime | None
    note: Note


@chains.mark_entrypoint
class Plain(chains.ChainletBase):
    """Copies a note."""

    remote_config = WIDE

    async def run_remote(self, note: Note, title: str = "") -> Copy:
        return Copy([f"{title}{note.text}"] * note.count, None, note)


@chains.mark_entrypoint
class Flow(chains.ChainletBase):
    """Streams the text of a note."""

    remote_config = WIDE

    async def run_remote(self, note: Note) -> AsyncIterator[str]:
        for _ in range(note.count):
            yield note.text
