# ruff: noqa: ANN001, ARG002 - the mistakes are the point
# mypy: ignore-errors
# Wrong on purpose: a comment `# ! KIND Class.method` marks each line that a mistake is to be found at.
import chains_stream as chains


class Leaf(chains.ChainletBase):
    def __init__(self, model: str = "small") -> None:  # ! ARGUMENT Leaf.__init__
        self._model = model

    async def run_remote(self, name: str) -> str:
        return name


class Many(chains.ChainletBase):
    def __init__(self, *leaves: Leaf) -> None:  # ! ARGUMENT Many.__init__
        self._leaves = leaves

    async def run_remote(self, name: str) -> str:
        return name


@chains.mark_entrypoint
class Top(chains.ChainletBase):
    def __init__(
        self,
        size,  # ! ARGUMENT Top.__init__
        leaf: Leaf = chains.depends(Leaf),
        **others: int,  # ! ARGUMENT Top.__init__
    ) -> None:
        self._leaf = leaf

    async def run_remote(self, name: str) -> str:
        return name
