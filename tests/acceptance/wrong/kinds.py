# ruff: noqa: ARG002 - the mistakes are the point
# mypy: ignore-errors
# Wrong on purpose: a comment `# ! KIND Class.method` marks each line that a mistake is to be found at.
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import chains_stream as chains

if TYPE_CHECKING:
    from decimal import Decimal


class Plain:
    pass


class Arguments(chains.ChainletBase):
    async def run_remote(
        self,
        plain: Plain,  # ! UNSUPPORTED_TYPE Arguments.run_remote
        call: Callable[[], int],  # ! UNSUPPORTED_TYPE Arguments.run_remote
        names: list[Plain],  # ! UNSUPPORTED_TYPE Arguments.run_remote
        anything: Any = None,
    ) -> str:
        return ""


class Result(chains.ChainletBase):
    async def run_remote(self, name: str) -> dict[str, Plain]:  # ! UNSUPPORTED_TYPE Result.run_remote
        return {}


@chains.mark_entrypoint
class Chunks(chains.ChainletBase):
    async def run_remote(
        self,
        price: "Decimal",  # ! UNSUPPORTED_TYPE Chunks.run_remote
    ) -> AsyncIterator[Plain]:  # ! UNSUPPORTED_TYPE Chunks.run_remote
        yield Plain()
