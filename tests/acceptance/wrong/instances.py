# ruff: noqa: B905 - the mistakes are the point
# mypy: ignore-errors
# Wrong on purpose: a comment `# ! KIND Class.method` marks each line that a mistake is to be found at.
import chains_stream as chains


class Leaf(chains.ChainletBase):
    async def run_remote(self, name: str) -> str:
        return name


@chains.mark_entrypoint
class Top(chains.ChainletBase):
    def __init__(self) -> None:
        self._leaf = Leaf()  # ! INSTANTIATION Top.__init__

    async def run_remote(self, names: list[str]) -> list[str]:
        leaves = [Leaf() for _ in names]  # ! INSTANTIATION Top.run_remote
        return [await leaf.run_remote(name) for leaf, name in zip(leaves, names)]
