# ruff: noqa: ARG002 - the mistakes are the point
# mypy: ignore-errors
# Wrong on purpose: a comment `# ! KIND Class.method` marks each line that a mistake is to be found at.
from typing import Protocol

import chains_stream as chains


class NoChainlet:
    async def run_remote(self, name: str) -> str:
        return name


class Counts(Protocol):
    async def count(self, name: str) -> int: ...


class Leaf(chains.ChainletBase):
    async def run_remote(self, name: str) -> str:
        return name


class Other(chains.ChainletBase):
    async def run_remote(self, name: str) -> str:
        return name


@chains.mark_entrypoint
class Top(chains.ChainletBase):
    def __init__(
        self,
        first: Leaf = chains.depends(Leaf),
        again: Leaf = chains.depends(Leaf),  # ! DEPENDENCY Top.__init__
        none: NoChainlet = chains.depends(NoChainlet),  # ! DEPENDENCY Top.__init__
        counts: Counts = chains.depends(Other),  # ! DEPENDENCY Top.__init__
    ) -> None:
        self._first = first

    async def run_remote(self, name: str) -> str:
        return name
