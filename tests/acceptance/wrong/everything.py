# ruff: noqa: ANN001, ANN201, ARG002 - the mistakes are the point
# mypy: ignore-errors
# Wrong on purpose: a comment `# ! KIND Class.method` marks each line that a mistake is to be found at.
from collections.abc import AsyncIterator

import chains_stream as chains


class Leaf(chains.ChainletBase):
    async def run_remote(
        self,
        name,  # ! MISSING_ANNOTATION Leaf.run_remote
    ) -> list[object]:  # ! UNSUPPORTED_TYPE Leaf.run_remote
        return [name]


class Empty(chains.ChainletBase):  # ! MISSING_METHOD Empty
    remote_config = None  # ! CONFIG Empty


@chains.mark_entrypoint
class Top(chains.ChainletBase):
    def __init__(
        self,
        context: chains.DeploymentContext = chains.depends_context(),  # ! CONTEXT Top.__init__
        leaf: Leaf = chains.depends(Leaf),
        empty: str = chains.depends(Empty),  # ! DEPENDENCY Top.__init__
        size: int = 3,  # ! ARGUMENT Top.__init__
    ) -> None:
        self._leaf = Leaf()  # ! INSTANTIATION Top.__init__

    def is_healthy(self):  # ! HEALTH_CHECK Top.is_healthy
        return True

    async def run_remote(
        self,
        count: int = "1",  # ! DEFAULT Top.run_remote
    ) -> AsyncIterator[str]:  # ! STREAM Top.run_remote
        return "no"
