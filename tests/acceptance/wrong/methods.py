# ruff: noqa: N805 - the mistakes are the point
# mypy: ignore-errors
# Wrong on purpose: a comment `# ! KIND Class.method` marks each line that a mistake is to be found at.
import chains_stream as chains


class Nothing(chains.ChainletBase):  # ! MISSING_METHOD Nothing
    async def run(self, name: str) -> str:
        return name


class Value(chains.ChainletBase):
    run_remote = "text"  # ! NOT_A_METHOD Value.run_remote


class NoSelf(chains.ChainletBase):
    async def run_remote(name: str) -> str:  # ! NOT_A_METHOD NoSelf.run_remote
        return name


class Static(chains.ChainletBase):
    @staticmethod
    async def run_remote(name: str) -> str:  # ! NOT_A_METHOD Static.run_remote
        return name


@chains.mark_entrypoint
class Made(chains.ChainletBase):
    @classmethod
    async def run_remote(cls, name: str) -> str:  # ! NOT_A_METHOD Made.run_remote
        return name
