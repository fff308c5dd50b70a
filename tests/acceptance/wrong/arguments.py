# ruff: noqa: ARG002 - the mistakes are the point
# mypy: ignore-errors
# Wrong on purpose: a comment `# ! KIND Class.method` marks each line that a mistake is to be found at.
import chains_stream as chains


class Positions(chains.ChainletBase):
    async def run_remote(self, *names: str) -> str:  # ! ARGUMENT Positions.run_remote
        return "".join(names)


class Keywords(chains.ChainletBase):
    async def run_remote(self, **names: str) -> str:  # ! ARGUMENT Keywords.run_remote
        return "".join(names)


@chains.mark_entrypoint
class First(chains.ChainletBase):
    async def run_remote(
        self,
        name: str,  # ! ARGUMENT First.run_remote
        /,
        times: int = "many",  # ! DEFAULT First.run_remote
        tags: list[str] = (1, 2),  # ! DEFAULT First.run_remote
    ) -> str:
        return name * times
