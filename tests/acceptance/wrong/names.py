# ruff: noqa: RUF012 - the mistakes are the point
# mypy: ignore-errors
# Wrong on purpose: a comment `# ! KIND Class.method` marks each line that a mistake is to be found at.
import chains_stream as chains


class First(chains.ChainletBase):
    remote_config = chains.RemoteConfig(name="Same")

    async def run_remote(self, name: str) -> str:
        return name


class Second(chains.ChainletBase):  # ! NAME Second
    remote_config = chains.RemoteConfig(name="Same")

    async def run_remote(self, name: str) -> str:
        return name


class Third(chains.ChainletBase):
    remote_config = chains.RemoteConfig(name="So/so?")  # ! NAME Third

    async def run_remote(self, name: str) -> str:
        return name


@chains.mark_entrypoint("Grüße")
class Fourth(chains.ChainletBase):  # ! NAME Fourth
    remote_config = {"name": "Fourth"}  # ! CONFIG Fourth

    async def run_remote(self, name: str) -> str:
        return name
