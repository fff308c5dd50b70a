"""What a type checker makes of a Chain: `make check` fails if it forgets what `run_remote` takes and gives."""

from collections.abc import AsyncIterator
from typing import assert_type

import chains_stream as chains
from tests.sample import Item, Leaf, Relay


class Typed(chains.ChainletBase):
    def __init__(self, leaf: Leaf = chains.depends(Leaf)) -> None:
        self._leaf = leaf

    async def run_remote(self, name: str, count: int = 1) -> Item:
        return assert_type(await self._leaf.run_remote(Item(name, count)), Item)


async def connections() -> None:
    """Is checked and never run."""
    async with chains.connect("kafka://localhost", Typed) as typed:
        assert_type(await typed.run_remote("a"), Item)
        await typed.run_remote(3)  # type: ignore[arg-type]
        await typed.run_remote("a", cuont=3)  # type: ignore[call-arg]
        await typed.submit(3)  # type: ignore[arg-type]
    async with chains.run_chain(Relay) as relay:
        assert_type(relay.run_remote(3), AsyncIterator[str])


def test_marked_entrypoints_keep_their_type() -> None:
    marked = chains.mark_entrypoint("A name")(Typed)
    assert_type(marked, type[Typed])
    assert marked is Typed
