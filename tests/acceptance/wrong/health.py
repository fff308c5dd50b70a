# ruff: noqa: FBT001 - the mistakes are the point
# mypy: ignore-errors
# Wrong on purpose: a comment `# ! KIND Class.method` marks each line that a mistake is to be found at.
import chains_stream as chains


class Takes(chains.ChainletBase):
    def is_healthy(self, deeply: bool) -> bool:  # ! HEALTH_CHECK Takes.is_healthy
        return deeply

    async def run_remote(self, name: str) -> str:
        return name


class Says(chains.ChainletBase):
    async def is_healthy(self) -> str:  # ! HEALTH_CHECK Says.is_healthy
        return "yes"

    async def run_remote(self, name: str) -> str:
        return name


@chains.mark_entrypoint
class Holds(chains.ChainletBase):
    is_healthy = True  # ! HEALTH_CHECK Holds.is_healthy

    async def run_remote(self, name: str) -> str:
        return name
