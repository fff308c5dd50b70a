# ruff: noqa: ARG002 - the mistakes are the point
# mypy: ignore-errors
# Wrong on purpose: a comment `# ! KIND Class.method` marks each line that a mistake is to be found at.
import chains_stream as chains


class Leaf(chains.ChainletBase):
    def __init__(self, ctx: chains.DeploymentContext = chains.depends_context()) -> None:  # ! CONTEXT Leaf.__init__
        self._context = ctx

    async def run_remote(self, name: str) -> str:
        return name


class NotLast(chains.ChainletBase):
    def __init__(
        self,
        context: chains.DeploymentContext = chains.depends_context(),  # ! CONTEXT NotLast.__init__
        leaf: Leaf = chains.depends(Leaf),
    ) -> None:
        self._leaf = leaf

    async def run_remote(self, name: str) -> str:
        return name


class NoDefault(chains.ChainletBase):
    def __init__(self, context: chains.DeploymentContext) -> None:  # ! CONTEXT NoDefault.__init__
        self._context = context

    async def run_remote(self, name: str) -> str:
        return name


@chains.mark_entrypoint
class Mistyped(chains.ChainletBase):
    def __init__(self, context: dict = chains.depends_context()) -> None:  # ! CONTEXT Mistyped.__init__
        self._context = context

    async def run_remote(self, name: str) -> str:
        return name
