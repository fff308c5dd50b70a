# mypy: ignore-errors
# Wrong on purpose: a comment `# ! KIND Class.method` marks each line that a mistake is to be found at.
from collections.abc import AsyncIterable, AsyncIterator, Iterator

import chains_stream as chains


class Yields(chains.ChainletBase):
    async def run_remote(self, name: str) -> str:  # ! STREAM Yields.run_remote
        yield name


class YieldsNot(chains.ChainletBase):
    async def run_remote(self, name: str) -> AsyncIterator[str]:  # ! STREAM YieldsNot.run_remote
        return name


class Sync(chains.ChainletBase):
    def run_remote(self, name: str) -> Iterator[str]:  # ! STREAM Sync.run_remote
        yield name


class OfWhat(chains.ChainletBase):
    async def run_remote(self, name: str) -> AsyncIterator:  # ! STREAM OfWhat.run_remote
        yield name


@chains.mark_entrypoint
class Iterable(chains.ChainletBase):
    async def run_remote(self, name: str) -> AsyncIterable[str]:  # ! STREAM Iterable.run_remote
        yield name
